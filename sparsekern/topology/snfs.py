"""SNFS: sparse momentum, which moves blocks to the layers that learn most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsekern.topology.layer import Layer
from sparsekern.topology.method import Change, DropAndGrow, Update
from sparsekern.topology.redistribute import check_room, redistribute, room

# Layers less sparse than this drop at most as large a share as their sparsity (Dettmers & Zettlemoyer's code).
NEARLY_DENSE = 0.2


@dataclass(frozen=True)
class SNFS(DropAndGrow):
    """Sparse networks from scratch (Dettmers & Zettlemoyer 2019, arXiv:1907.04840): sparse momentum.

    Every layer drops its small blocks. What all layers dropped is grown again in proportion to the mean momentum
    magnitude of the layers' stored weights, where the momentum of absent blocks is largest (L1 norms). The total of
    stored blocks stays exactly; what a layer has no room for goes to the others.

    The momentum of absent weights needs the dense gradient of every step and a buffer of each layer's dense size: the
    one method here whose memory is not sparse. The optimizer's own state stays sparse. Gradients count as the backward
    gives them, loss scale included; a layer's gradient that is not finite is left out.

    Layers need the same block size, and spare slots for what they gain: ``SparsityConfig(capacity=1.5)``.

    Attributes:
        momentum: beta of m <- beta m + g, within [0, 1).
    """

    momentum: float = 0.9

    probe: ClassVar[str | None] = "dense"
    probe_always: ClassVar[bool] = True
    redistributes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"SNFS: momentum: expected a factor within [0, 1), got {self.momentum!r}")

    def check(self, layers: Mapping[str, Layer]) -> None:
        super().check(layers)
        check_room("SNFS", layers)

    def observe(self, layer: Layer, found: Tensor, memory: dict[str, Any]) -> None:
        key = f"momentum:{layer.name}"
        if key not in memory:
            memory[key] = torch.zeros_like(found)
        finite = found.isfinite().all()
        # On the device: a host that waited for `finite` would stop the queue at every step.
        factor = torch.where(finite, found.new_full((), self.momentum), 1.0)
        memory[key].mul_(factor).add_(torch.where(finite, found, 0.0))

    def changes(self, update: Update) -> dict[str, Change]:
        layers = update.layers
        scores, shares = {}, {}
        for name, layer in layers.items():
            scores[name], shares[name] = self._momenta(update, layer)
        drops = self._global_drops(update) if self.scope == "global" else self._own_drops(update)
        grown = redistribute(
            sum(count for _, count in drops.values()),
            dict(zip(shares, torch.stack(list(shares.values())).tolist(), strict=True)),
            {name: room(layer, drops[name][1]) for name, layer in layers.items()},
            {name: int(drops[name][1] == layer.nnz > 0) for name, layer in layers.items()},
        )
        return {
            name: Change(
                drop, self.best_places(update, layers[name], drop, grown[name], scores[name]), count, grown[name]
            )
            for name, (drop, count) in drops.items()
            if count or grown[name]
        }

    def _momenta(self, update: Update, layer: Layer) -> tuple[Tensor, Tensor]:
        """L1 norms of the momentum's blocks [blocks], -inf at stored ones; mean magnitude [] over stored weights.

        Padding does not count. Summed over the ranks here alone: momentum is linear in the gradient.
        """
        buffer = update.memory.get(f"momentum:{layer.name}")
        if buffer is None:  # no gradient has reached the layer
            dtype = torch.float64 if layer.values.dtype == torch.float64 else torch.float32
            buffer = torch.zeros(layer.grid.weight_shape, dtype=dtype, device=layer.device)
        norms = layer.grid.to_blocks(update.over_ranks(buffer).abs()).flatten(1).sum(1)
        stored = layer.stored()
        inside = layer.elements_of_block.to(stored.device)
        share = (norms * stored).sum().double() / (inside * stored).sum().clamp(min=1)
        return norms.masked_fill(stored, -torch.inf), share

    def _own_drops(self, update: Update) -> dict[str, tuple[Tensor, int]]:
        drops: dict[str, tuple[Tensor, int]] = {}
        for name, layer in update.layers.items():
            sparsity = layer.free / layer.grid.blocks
            fraction = min(sparsity, update.fraction) if sparsity < NEARLY_DENSE else update.fraction
            drops |= self._layer_drops(replace(update, fraction=fraction, layers={name: layer}))
        return drops
