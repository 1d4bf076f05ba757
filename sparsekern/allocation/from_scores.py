"""Layer densities from weight scores: one global threshold over all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
    sizes = torch.tensor([scores[name].numel() for name in names], dtype=torch.float64)
    cost = sizes if costs is None else torch.tensor([float(costs[name]) for name in names], dtype=torch.float64)
    budget = (1.0 - sparsity) * math.fsum(cost.tolist())
    if costs is None:
        budget = float(max(round(budget), 1))
    floors = [min_elements if isinstance(min_elements, int) else min_elements[name] for name in names]
    floor = (torch.tensor(floors, dtype=torch.float64) / sizes).clamp(max=1.0)

    value, layer = _sorted(scores)
    density = torch.zeros_like(sizes)
    lifted = torch.zeros(len(names), dtype=torch.bool)
    while not bool(lifted.all()):
        rest = budget - float((floor * cost)[lifted].sum())
        free = torch.where(lifted, 0.0, cost)
        density = torch.where(lifted, floor, _above_threshold(value, layer, free / sizes, sizes, rest))
        # The slack keeps a layer that sits on its minimum up to rounding from being taken out.
        low = ~lifted & (density < floor * (1.0 - 1e-12))
        if not bool(low.any()):
            break
        lifted |= low
    else:
        density = floor
    return dict(zip(names, density.clamp(max=1.0).tolist(), strict=True))


def _sorted(scores: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All scores in descending order, and the layer of each, on the CPU."""
    flat = [score.detach().flatten().cpu() for score in scores.values()]
    dtype = torch.float64 if any(f.dtype == torch.float64 for f in flat) else torch.float32
    value, order = torch.cat([f.to(dtype) for f in flat]).sort(descending=True, stable=True)
    lengths = torch.tensor([f.numel() for f in flat])
    layer = torch.repeat_interleave(torch.arange(len(flat)), lengths)
    return value, layer[order]


def _above_threshold(value: Tensor, layer: Tensor, unit: Tensor, sizes: Tensor, budget: float) -> Tensor:
    """Density per layer when weights of cost ``unit[layer]`` are taken in order until ``budget`` is spent."""
    if budget <= 0.0:
        return torch.zeros_like(sizes)
    spent = unit[layer].cumsum(0)
    # A hair below the budget: the sum of many units may fall short of it by rounding alone.
    last = min(int(torch.searchsorted(spent, budget * (1.0 - 1e-12))), value.numel() - 1)
    threshold = value[last]

    def per_layer(keep: Tensor) -> Tensor:
        return torch.bincount(layer[keep], minlength=sizes.numel()).to(torch.float64)

    above, ties = per_layer(value > threshold), per_layer(value == threshold)
    tied = float((ties * unit).sum())
    share = (budget - float((above * unit).sum())) / tied if tied else 0.0
    return (above + min(max(share, 0.0), 1.0) * ties) / sizes
