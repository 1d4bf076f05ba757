"""Probes: what an update wants to know of a backward, collected inside it and added up over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.topology import ranks
from sparsekern.topology.layer import Layer

_PANEL_ELEMENTS = 1 << 22  # of a dense gradient, added up over the ranks at once


def arm(layer: Layer, kind: str) -> None:
    """Let the next backwards collect "norms" of gradient blocks, or the "dense" gradient."""
    shape = (layer.grid.blocks,) if kind == "norms" else layer.grid.weight_shape
    dtype = torch.float64 if layer.values.dtype == torch.float64 else torch.float32
    layer.module.probe = torch.zeros(shape, dtype=dtype, device=layer.device, requires_grad=True)


def disarm(layer: Layer) -> None:
    layer.module.probe = None


def collected(layer: Layer) -> Tensor | None:
    """What the probe holds, None if no backward reached the layer."""
    probe = layer.module.probe
    return None if probe is None else probe.grad


def clear(layer: Layer) -> None:
    """Forget what the probe collected so far."""
    if layer.module.probe is not None:
        layer.module.probe.grad = None


def scores(layer: Layer, found: Tensor, group: ranks.Group) -> Tensor:
    """Growth scores [blocks] from what a probe collected, the same on every rank; -inf at stored blocks.

    Norms are added up; dense gradients are added up first, a panel of rows at a time, and then give their norms.
    """
    if found.dim() == 1:
        return ranks.sum_(found.clone(), group)
    rows = max(1, _PANEL_ELEMENTS // max(1, found[0].numel()))
    whole = torch.cat([ranks.sum_(panel.clone(), group) for panel in found.split(rows)])
    norms = layer.grid.to_blocks(whole).flatten(1).norm(dim=1)
    return norms.masked_fill(layer.stored(), -torch.inf)


def usable(scores: Tensor) -> bool:
    """False if a score is NaN or +inf, as after an overflow that a gradient scaler will skip. One host sync."""
    return bool(scores.max() < torch.inf)
