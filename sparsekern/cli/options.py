"""Command-line options made from the fields of :class:`TrainConfig`, so that each is described once."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape

from sparsekern.training.config import Option, TrainConfig

Command = Callable[..., None]


def with_config_options(
    names: Iterable[str] | None = None, *, before: str | None = None
) -> Callable[[Command], Command]:
    """Decorator: a command that takes ``**values`` gets an option per field of :class:`TrainConfig`.

    ``values`` holds only the options that were given, so that a recipe, a file and the command line can be layered.

    Args:
        names: fields to offer, all by default.
        before: the command's own parameter that ``--help`` lists after them; all by default.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    chosen = [fields[name] for name in (fields if names is None else names)]

    def decorate(command: Command) -> Command:
        def wrapper(**arguments: Any) -> None:
            given = {f.name: arguments.pop(f.name) for f in chosen}
            command(**arguments, **{name: value for name, value in given.items() if value is not None and value != []})

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        place = [p.name for p in own].index(before) if before is not None else 0
        parameters = own[:place] + [_parameter(f) for f in chosen] + own[place:]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        return wrapper

    return decorate


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    option: Option = field.metadata["option"]
    hint = typing.get_type_hints(TrainConfig)[field.name]
    flag = "--" + field.name.replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}"] if hint is bool else [flag]
    many = hint == dict[str, float] or typing.get_origin(hint) is tuple
    kind: Any = list[str] if many else {int: int, float: float, bool: bool}.get(hint, str)
    help = option.help
    if option.choices and not option.metavar:
        help = f"{help.rstrip('.')}: {', '.join(option.choices)}."
    annotation = Annotated[
        Optional[kind],  # noqa: UP045 - built from a value
        typer.Option(
            *names,
            help=escape(f"{help} Default: {_shown(field)}."),
            show_default=False,
            rich_help_panel=option.group,
            metavar=option.metavar,
        ),
    ]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shown(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple) and default:
        return ",".join(str(entry) for entry in default)
    if default is None or default == () or default is dataclasses.MISSING:
        return "none"
    return f"{default:g}" if isinstance(default, float) else str(default)
