"""RigL: growth by gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsekern.topology.layer import Layer
from sparsekern.topology.method import DropAndGrow, Update


@dataclass(frozen=True)
class RigL(DropAndGrow):
    """Rigging the lottery (Evci et al. 2020): drop small blocks, grow where the gradient is largest.

    Growth ranks the Frobenius norms of the weight gradient's blocks of the update step. They are made inside that
    step's backward, a panel or tile at a time, so no dense gradient is in memory (at block 1x1 the norms themselves
    are as many as the weights). Norms do not add up over micro-batches and ranks; the rule is their sum. The paper
    skips the gradient step where it updates the mask; here both happen, as in in-time over-parameterization.

    Attributes:
        exact: norms of the summed gradient instead: dense gradients of all layers are in memory on update steps, and
            ranks add them up a panel of rows at a time.
    """

    exact: bool = False

    @property
    def probe(self) -> str:  # type: ignore[override]
        return "dense" if self.exact else "norms"

    def grow(self, update: Update, layer: Layer, drop: Tensor, count: int) -> Tensor:
        return self.best_places(update, layer, drop, count, update.found[layer.name])
