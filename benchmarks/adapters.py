"""The few calls into the Triton backend's own tables; each answers in words where the backend has none."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.device import one_line
from benchmarks.problems import Problem
from sparsekern.backends import ConvGeometry


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"sparsekern.backends.triton.{name}")
    except ImportError:
        return None


def chip_name() -> str | None:
    """The backend's name of the current GPU, None where it has no table of GPUs."""
    chips = _module("chips")
    return str(chips.current("cuda").name) if chips is not None and hasattr(chips, "current") else None


def remember(figures: dict[str, Any]) -> str:
    """Keep measured limits for the backend's model of this GPU; returns what was done."""
    chips = _module("chips")
    if chips is None or not hasattr(chips, "remember"):
        return "not kept: the backend has no table of GPUs"
    if not figures:
        return "nothing to keep"
    try:
        chips.remember(chip_name(), **figures)
    except Exception as error:
        return f"not kept: {one_line(error)}"
    return f"kept for {chip_name()}: {', '.join(figures)}"


_LAUNCHES = {
    "linear": ("forward", "dgrad"),
    "linear_wgrad": ("wgrad",),
    "conv2d": ("forward", "dgrad"),
    "conv2d_wgrad": ("wgrad",),
}
Launch = Callable[[], object]


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, Launch]]]:
    """The kernel launches that calls within the context come down to, each ready to be made again by itself.

    They are those of the Triton backend, or of the dense backend where that was chosen: ``("linear.forward", call)``.
    """
    launches: list[tuple[str, Launch]] = []
    with contextlib.ExitStack() as undo:
        found = {name: _module(f"launch.{name}") for name in _LAUNCHES}
        wrapped = [(module, f, f"{name}.{f}") for name, module in found.items() if module for f in _LAUNCHES[name]]
        dense = importlib.import_module("sparsekern.backends.dense")
        wrapped += [
            (dense, f"{op}_{f}", f"dense {op}.{f}")
            for op in ("linear", "conv2d")
            for f in ("forward", "dgrad", "wgrad")
        ]
        for module, function, name in wrapped:
            original = getattr(module, function, None)
            if original is not None:
                undo.callback(setattr, module, function, original)
                setattr(module, function, _recording(launches, name, original))
        yield launches


def _recording(launches: list[tuple[str, Launch]], name: str, original: Callable[..., object]) -> Callable[..., object]:
    def call(*args: Any, **more: Any) -> object:
        launches.append((name, functools.partial(original, *args, **more)))
        return original(*args, **more)

    return call


def tile_of(launch: Launch) -> Any:
    """The tile among a recorded launch's arguments as plain data, None where there is none."""
    assert isinstance(launch, functools.partial)
    given = (*launch.args, *launch.keywords.values())
    return next((dataclasses.asdict(a) for a in given if type(a).__name__ == "Tile"), None)


def choices(problem: Problem, pass_: str, fallback: bool) -> dict[str, Any]:
    """The tile that the Triton backend takes for each op of a pass, where it comes from, and the times it expects."""
    tiles, facts, chips = _module("tiles"), _module("problem"), _module("chips")
    if tiles is None or facts is None or chips is None:
        return {}
    out: dict[str, Any] = {}
    for op in ("forward", "dgrad", "wgrad") if pass_ == "step" else (pass_,):
        try:
            found = tiles.choose(_asked(facts, problem, op), chips.current(problem.device), fallback)
            tile = None if found.tile is None else dataclasses.asdict(found.tile)
            out[op] = {"tile": tile, "source": found.source, "seconds": found.seconds, "dense": found.dense_seconds}
        except Exception as error:
            out[op] = one_line(error)
    return out


def _asked(facts: Any, problem: Problem, op: str) -> Any:
    """What the backend would ask its tiles for."""
    shape, capacity, grid = problem.shape, problem.values.shape[0], problem.layout.grid
    name, dtype = f"{problem.op}_{op}", facts.precision(problem.dtype, problem.op)
    if problem.op == "linear":
        return facts.Problem(name, dtype, grid.block, shape.m, shape.o, shape.i, capacity)
    geometry = ConvGeometry((shape.stride,) * 2, (shape.padding,) * 4, (1, 1))
    return facts.conv_problem(name, dtype, grid, geometry, tuple(problem.operands.x.shape), capacity)


def export_tiles(path: Path) -> str:
    """Write the table of tuned tiles, the user's measurements merged in; returns what was done."""
    table, name = _module("table"), chip_name()
    if table is None or not hasattr(table, "export") or name is None:
        return "not exported: the backend has no table of tiles"
    try:
        table.export(path, (name,))
    except Exception as error:
        return f"not exported: {one_line(error)}"
    return f"exported to {path.name}"
