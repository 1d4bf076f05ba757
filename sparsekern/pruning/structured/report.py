"""What pruning left of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsekern.models import count_macs, count_params
from sparsekern.models.count import Example
from sparsekern.pruning.structured.channels import Channels


@dataclass(frozen=True)
class Layer:
    """One linear or convolution layer; ``*_after`` is 0 where its block was dropped. MACs are per sample."""

    name: str
    channels_before: int
    channels_after: int
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class Report:
    """Channels, parameters and multiply-accumulates before and after; prints as a table.

    Attributes:
        channels: the record to save with the model; see :func:`replay_`.
        blocks: residual blocks that were dropped.
    """

    method: str
    target: str | None
    layers: list[Layer]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    channels: Channels

    @property
    def blocks(self) -> list[str]:
        return self.channels.blocks

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, without the record of channels."""
        names = ("method", "target", "params_before", "params_after", "macs_before", "macs_after")
        return {
            **{name: getattr(self, name) for name in names},
            "blocks": list(self.blocks),
            "layers": [vars(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        return (
            f"{self.method}{f' ({self.target})' if self.target else ''}: "
            f"{self.params_before:,} -> {self.params_after:,} parameters, "
            f"{self.macs_before:,} -> {self.macs_after:,} MACs per sample"
        )

    def __rich__(self) -> Any:
        from rich.table import Table

        name = f"{self.method} ({self.target})" if self.target else self.method
        title = f"{name}: {self.params_before:,} -> {self.params_after:,} parameters"
        table = Table(title=title, title_justify="left", show_footer=True)
        table.add_column("layer", footer="total")
        table.add_column("channels", justify="right")
        table.add_column("left", justify="right")
        table.add_column("MACs", justify="right", footer=f"{self.macs_before:,}")
        table.add_column("left", justify="right", footer=f"{self.macs_after:,}")
        table.add_column("", justify="right", footer=_percent(self.macs_after, self.macs_before))
        for row in self.layers:
            left = str(row.channels_after) if row.channels_after else "dropped"
            macs = f"{row.macs_before:,}", f"{row.macs_after:,}", _percent(row.macs_after, row.macs_before)
            table.add_row(row.name, str(row.channels_before), left, *macs)
        return table


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


@dataclass(frozen=True)
class Size:
    """Widths, MACs and parameters of a dense network."""

    widths: dict[str, int]
    macs: dict[str, int]
    params: int


def size(model: nn.Module, example_input: Example) -> Size:
    """Measure ``model`` on one sample of ``example_input``."""
    macs = count_macs(model, example_input)
    modules = dict(model.named_modules())
    return Size({name: modules[name].weight.shape[0] for name in macs}, macs, count_params(model))


def make_report(method: str, target: str | None, before: Size, after: Size, channels: Channels) -> Report:
    """Compare two measurements."""
    layers = [
        Layer(name, width, after.widths.get(name, 0), before.macs[name], after.macs.get(name, 0))
        for name, width in before.widths.items()
    ]
    total = sum(before.macs.values()), sum(after.macs.values())
    return Report(method, target, layers, before.params, after.params, *total, channels)
