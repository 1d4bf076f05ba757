"""``sparsekern plan``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from sparsekern.cli.options import with_config_options
from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import ConfigError

_FIELDS = (
    "width",
    "data",
    "data_dir",
    "batch_size",
    "sparsity",
    "block",
    "allocation",
    "budget",
    "pattern",
    "exclude",
    "override",
    "below_break_even",
    "tune",
    "seed",
    "device",
    "threads",
    "channels_last",
)


@with_config_options(_FIELDS)
def plan_command(
    model: Annotated[str, typer.Argument(help="Model name.")],
    in_shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Shape of a sample; default: that of --data.")
    ] = None,
    classes: Annotated[int, typer.Option(help="Classes, with --in-shape.", min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    **values: Any,
) -> None:
    """Show what sparsity would do to a model, layer by layer, without training."""
    import torch

    from sparsekern.training.network import build_network, resolve_device
    from sparsekern.training.progress import TerminalReporter

    config = TrainConfig(model=model, **values)
    if config.sparsity == 0 and not config.override:
        raise ConfigError("plan: expected a sparsity above 0, got 0; nothing would change")
    if config.allocation in ("snip", "grasp"):
        raise ConfigError(f"plan: allocation {config.allocation} scores weights on training data; use sparsekern train")
    if config.threads:
        torch.set_num_threads(config.threads)
    shape, classes = (_shape(in_shape), classes) if in_shape else _of_data(config)
    x = torch.randn(config.batch_size, *shape, generator=torch.Generator().manual_seed(0))
    x = x.to(resolve_device(config.device))
    if config.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    network, plan = build_network(config, x, classes, dry_run=True)
    if as_json:
        typer.echo(json.dumps(network.plan, indent=1))
    else:
        TerminalReporter(bar=False).show(plan)


def _shape(text: str) -> tuple[int, int, int]:
    try:
        c, h, w = (int(n) for n in text.replace("x", ",").split(","))
    except ValueError:
        raise ConfigError(f"in-shape: expected C,H,W such as 3,32,32, got {text!r}") from None
    return c, h, w


def _of_data(config: TrainConfig) -> tuple[tuple[int, int, int], int]:
    from sparsekern.data import load

    bundle = load(config.data, config.data_dir, splits=("test",))
    return bundle.in_shape, bundle.num_classes
