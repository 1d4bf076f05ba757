"""From target densities to exact block counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsekern.layout import BlockGrid


def block_counts(densities: Mapping[str, float], grids: Mapping[str, BlockGrid]) -> dict[str, int]:
    """Number of stored blocks of every layer: exact integers, at least 1 and at most all blocks of the grid.

    The total is held: stored elements (``count * bo * bi``, padding of edge blocks included) end within half of the
    smallest block that can still be moved from ``sum(d_l * blocks_l * bo_l * bi_l)``. Two steps: layers whose target is
    below one block are lifted to one and the others, dense ones excepted, pay in proportion; counts are then rounded
    and the residual goes by the largest remainder, weighted by the elements of a block. Layers of density 1
    keep every block. Where even one block per layer is more than the target, the minimum wins;
    :func:`count_report` shows what was realised.

    Args:
        densities: ``{name: density}`` within [0, 1].
        grids: ``{name: BlockGrid}`` with an entry for each of them.

    Raises:
        ValueError: a density out of range, or a layer without a grid.
    """
    _check(densities, grids)
    cost = {name: grids[name].block[0] * grids[name].block[1] for name in densities}
    most = {name: grids[name].blocks for name in densities}
    counts = {name: n for name, n in most.items() if densities[name] == 1.0}
    open_ = [name for name in densities if name not in counts]
    wanted = {name: densities[name] * most[name] for name in open_}
    budget = math.fsum(wanted[name] * cost[name] for name in open_)
    exact = _lifted(wanted, cost, budget)
    counts |= {name: min(max(round(exact[name]), 1), most[name]) for name in open_}

    residual = budget - sum(counts[name] * cost[name] for name in open_)
    while True:
        step = 1 if residual > 0 else -1
        movable = [name for name in open_ if 1 <= counts[name] + step <= most[name] and cost[name] < 2 * abs(residual)]
        if not movable:
            return {name: counts[name] for name in densities}
        best = max(movable, key=lambda name: step * (exact[name] - counts[name]) * cost[name])
        counts[best] += step
        residual -= step * cost[best]


@dataclass(frozen=True)
class CountReport:
    """Realised densities of block counts.

    Attributes:
        density: ``{name: stored blocks / blocks}``.
        target: ``{name: density asked for}``.
        total_density: stored elements over the elements of all blocks, whole model.
        total_target: the same of the targets.
        lifted: layers that hold one block although their target is less than half a block.
    """

    density: dict[str, float]
    target: dict[str, float]
    total_density: float
    total_target: float
    lifted: tuple[str, ...]

    def __str__(self) -> str:
        rows = [f"{name}: {d:.4f} (target {self.target[name]:.4f})" for name, d in self.density.items()]
        return "\n".join([*rows, f"total: {self.total_density:.4f} (target {self.total_target:.4f})"])


def count_report(
    densities: Mapping[str, float], counts: Mapping[str, int], grids: Mapping[str, BlockGrid]
) -> CountReport:
    """Densities that ``counts`` realise, beside the targets ``densities``."""
    _check(densities, grids)
    stored = {name: grids[name].blocks * grids[name].block[0] * grids[name].block[1] for name in densities}
    real = {name: counts[name] / grids[name].blocks for name in densities}
    whole = sum(stored.values())
    return CountReport(
        density=real,
        target=dict(densities),
        total_density=math.fsum(real[name] * n for name, n in stored.items()) / whole,
        total_target=math.fsum(densities[name] * n for name, n in stored.items()) / whole,
        lifted=tuple(name for name in densities if counts[name] == 1 and densities[name] * grids[name].blocks < 0.5),
    )


def _check(densities: Mapping[str, float], grids: Mapping[str, BlockGrid]) -> None:
    if missing := [name for name in densities if name not in grids]:
        raise ValueError(f"grids: no block grid for {missing}; give one for each layer")
    if bad := {name: d for name, d in densities.items() if not 0.0 <= d <= 1.0}:
        raise ValueError(f"densities: expected numbers within [0, 1], got {bad}")
    if not densities:
        raise ValueError("densities: expected at least one layer, got none")


def _lifted(wanted: Mapping[str, float], cost: Mapping[str, int], budget: float) -> dict[str, float]:
    """``max(1, s * wanted)`` with s such that the total cost is ``budget``; all ones where that is too little."""
    lifted: set[str] = set()
    scale = 1.0
    while True:
        low = {name for name in wanted if name not in lifted and scale * wanted[name] < 1.0}
        if not low:
            return {name: 1.0 if name in lifted else scale * wanted[name] for name in wanted}
        lifted |= low
        rest = budget - sum(cost[name] for name in lifted)
        spread = math.fsum(wanted[name] * cost[name] for name in wanted if name not in lifted)
        scale = max(rest, 0.0) / spread if spread > 0.0 else 0.0
