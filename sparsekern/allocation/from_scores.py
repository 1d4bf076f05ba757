"""Layer densities from weight scores: one global threshold over all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .targets import check_sparsity


def densities_from_scores(
    scores: Mapping[str, Tensor],
    sparsity: float,
    costs: Mapping[str, float] | None = None,
    *,
    min_elements: int | Mapping[str, int] = 1,
) -> dict[str, float]:
    """Fraction of every layer above one global threshold; which weights they are is left to the mask pattern.

    Without ``costs`` exactly ``round((1 - sparsity) * N)`` weights are kept in all. Weights tied at the threshold are
    shared over the layers in proportion to how many each has, so the result depends neither on the order of the
    layers nor on the device. A layer left with less than ``min_elements`` is lifted to that many, and the others
    pay by a higher threshold (a guard against layer collapse); where the minima alone exceed the budget, they win.

    Args:
        scores: ``{name: score of each weight}``, any shape, larger is kept.
        sparsity: fraction of weights to remove within [0, 1); with ``costs``, fraction of the cost.
        costs: ``{name: cost of the dense layer}``, such as its MACs; each weight of a layer costs the same. The
            threshold is then set where the cost of the kept weights meets the budget.
        min_elements: weights that every layer keeps at least; the elements of one block (``bo * bi``) where masks are
            made of blocks.

    Returns:
        ``{name: density}``.

    Raises:
        ValueError: no scores, scores that are not finite, or missing costs.
    """
    check_sparsity(sparsity)
    names = list(scores)
    if not names:
        raise ValueError("scores: expected at least one layer, got none")
    if bad := [name for name in names if not bool(torch.isfinite(scores[name]).all())]:
        raise ValueError(f"scores: expected finite numbers, got NaN or infinity in {bad}; score in float64 or rescale")
    if costs is not None and (missing := [name for name in names if not costs.get(name, 0.0) > 0.0]):
        raise ValueError(f"costs: expected a positive cost for {missing}; give one for each layer")
    cost = {name: float(scores[name].numel() if costs is None else costs[name]) for name in names}
    floor = {
        name: min(1.0, (min_elements if isinstance(min_elements, int) else min_elements[name]) / scores[name].numel())
        for name in names
    }
    budget = (1.0 - sparsity) * math.fsum(cost.values())
    if costs is None:
        budget = float(max(round(budget), 1))

    wide = any(score.dtype == torch.float64 for score in scores.values())
    dtype = torch.float64 if wide else torch.float32
    ascending = {name: np.sort(s.detach().flatten().to("cpu", dtype).numpy()) for name, s in scores.items()}
    lifted: dict[str, float] = {}
    while True:
        free = [name for name in names if name not in lifted]
        rest = budget - math.fsum(d * cost[name] for name, d in lifted.items())
        density = _above_threshold({name: ascending[name] for name in free}, cost, rest)
        # The slack keeps a layer that sits on its minimum up to rounding from being taken out.
        low = {name: floor[name] for name in free if density[name] < floor[name] * (1.0 - 1e-12)}
        lifted |= low
        if not low:
            density |= lifted
            return {name: min(1.0, density[name]) for name in names}


def _above_threshold(ascending: Mapping[str, np.ndarray], cost: Mapping[str, float], budget: float) -> dict[str, float]:
    """Densities when weights are taken by falling score until ``budget`` is spent; ties at the end share the rest."""
    if budget <= 0.0 or not ascending:
        return dict.fromkeys(ascending, 0.0)

    def at_least(value: float) -> dict[str, float]:
        # The threshold is rounded to the scores' type: comparing in a wider one would copy the whole array.
        return {name: (s.size - int(np.searchsorted(s, s.dtype.type(value)))) / s.size for name, s in ascending.items()}

    def spent(density: Mapping[str, float]) -> float:
        return math.fsum(d * cost[name] for name, d in density.items())

    # Bisection down to neighbours: `low` ends on a score, the largest that spends the budget, `high` just above it.
    low = min(float(s[0]) for s in ascending.values())
    high = max(float(np.nextafter(s[-1], s.dtype.type(np.inf))) for s in ascending.values())
    enough = budget * (1.0 - 1e-12)
    while low < (middle := low + 0.5 * (high - low)) < high:
        low, high = (middle, high) if spent(at_least(middle)) >= enough else (low, middle)
    above, reached = at_least(high), at_least(low)
    ties = spent(reached) - spent(above)
    share = min(max((budget - spent(above)) / ties, 0.0), 1.0) if ties > 0.0 else 0.0
    return {name: above[name] + share * (reached[name] - above[name]) for name in ascending}
