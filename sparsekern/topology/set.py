"""Static masks, and sparse evolutionary training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern.topology.layer import Layer
from sparsekern.topology.method import Change, DropAndGrow, Method, Update
from sparsekern.topology.select import random_free

GROWTH = ("random", "unexplored")


@dataclass(frozen=True)
class Static(Method):
    """The masks stay as drawn (Liu et al. 2022, "The unreasonable effectiveness of random pruning")."""

    def due(self, step: int, total_steps: int) -> bool:
        return False

    def changes(self, update: Update) -> dict[str, Change]:
        return {}


@dataclass(frozen=True)
class SET(DropAndGrow):
    """Sparse evolutionary training (Mocanu et al. 2018): drop small blocks, grow random ones.

    The recommended default: it needs no dense gradient, and blocks of 16 learn nearly as well as single weights with
    it (Dietrich et al. 2022, "Towards structured dynamic sparse pre-training of BERT": block L1 norms, random growth).

    Attributes:
        growth: "random", or "unexplored": blocks that were never stored first (in-time over-parameterization, Liu et
            al. 2021).
    """

    growth: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.growth not in GROWTH:
            raise ValueError(f"SET: growth: expected one of {', '.join(GROWTH)}, got {self.growth!r}")

    def check(self, layers: Mapping[str, Layer]) -> None:
        super().check(layers)
        if self.growth == "unexplored" and (self.min_per_row or self.min_per_col):
            raise ValueError("SET: growth='unexplored' does not go with min_per_row or min_per_col; leave them at 0")

    def grow(self, update: Update, layer: Layer, drop: Tensor, count: int) -> Tensor:
        if self.growth == "random":
            return super().grow(update, layer, drop, count)
        stream = update.stream(layer.name, "grow")
        explored, blocks = layer.explored.nonzero().flatten(), layer.grid.blocks
        fresh = blocks - explored.numel()
        first = random_free(explored, blocks, min(count, fresh), stream)
        taken = (~layer.explored | layer.stored()).nonzero().flatten()
        return torch.cat([first, random_free(taken, blocks, count - first.numel(), stream)])
