"""From scores to masks: how many blocks every layer keeps, and which."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import allocation, matching
from sparsekern.allocation.scores import LossFn, lamp, uniform_scores
from sparsekern.allocation.targets import check_sparsity
from sparsekern.config import Selector
from sparsekern.layout import BlockGrid, as_block
from sparsekern.masks import layer_generator
from sparsekern.matching import Candidate
from sparsekern.nn import SparseModule

from .criteria import CRITERIA, compute
from .layers import INCLUDE, alive, oriented, prunable

SCOPES = ("global", "layer")


def prune_masks(
    model: nn.Module,
    sparsity: float | None,
    criterion: str | Mapping[str, Tensor] = "magnitude",
    *,
    scope: str = "global",
    block: int | Sequence[int] | None = None,
    per_layer: str | Mapping[str, float] | None = None,
    min_blocks: int = 1,
    names: Sequence[str] | None = None,
    include: Sequence[Selector] = INCLUDE,
    exclude: Sequence[Selector] = (),
    batches: Iterable[tuple[Any, Any]] | None = None,
    loss_fn: LossFn | None = None,
    example_input: Any = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Which weights to keep, of a dense model or of one that is sparse already; the model is not changed.

    Of N weights in the layers that are pruned, ``round((1 - sparsity) * N)`` are kept, exactly so for 1x1 blocks;
    larger blocks are taken by falling score up to the count of weights that comes nearest. Weights pruned earlier
    count as removed and never return. Of equal scores at the limit, random ones are kept.

    The score of a block is the sum of its elements' scores, over the number of its elements that lie inside the
    weight: for whole blocks the order of the sums, while a narrow edge block, or a layer narrower than a block, is
    judged by its weights and not by its padding. For magnitude that is the L1 norm. For lamp, the sums of squares take
    the place of the squared weights. For random, every block gets one uniform number.

    Args:
        model: dense, or sparse in part or whole.
        sparsity: fraction of the layers' dense weights that is gone afterwards, within [0, 1); None where
            ``per_layer`` says it for each layer.
        criterion: one of :data:`CRITERIA`, or scores ``{layer name: tensor like module.weight}``.
        scope: "global" compares all layers, "layer" gives each its own count.
        block: edge or (bo, bi) of the blocks that are kept or dropped whole; by default the block of layers that are
            sparse already and 1x1 for dense ones.
        per_layer: for scope "layer", a scheme of :func:`sparsekern.allocate` (default "uniform") or
            ``{layer name: sparsity}``; layers that are not named are then left alone. Where a scheme gives a layer
            more than it still has, the others get the rest.
        min_blocks: blocks that every layer keeps at least, as far as it has them; the others pay. A guard against
            layer collapse.
        names, include, exclude: which layers, see :func:`prunable`.
        batches, loss_fn, example_input: what the criterion needs, see :func:`compute`.
        seed: of random scores, of ties and of :func:`compute`.

    Returns:
        ``{layer name: bool like module.weight}`` on the weight's device, as :func:`sparsekern.sparsify_` takes them.

    Raises:
        ValueError: a bad or missing argument, scores that are not finite, or a sparsity below the model's own.
    """
    _check(sparsity, criterion, scope, per_layer, min_blocks)
    if names is None and isinstance(criterion, Mapping):
        names = list(criterion)
    if names is None and isinstance(per_layer, Mapping):
        names = list(per_layer)
    chosen = prunable(model, names, include, exclude)
    living = {c.name: alive(c) for c in chosen}
    total = sum(mask.numel() for mask in living.values())
    left = sum(int(mask.count_nonzero()) for mask in living.values())
    grids = {c.name: BlockGrid(c.weight_shape, block_of(c, block), c.groups) for c in chosen}

    if sparsity is not None:
        _check_room(round((1.0 - sparsity) * total) - left, grids, "sparsity", sparsity, left / total)
    quotas: dict[str, int] | None = None
    if scope == "layer":
        quotas = _quotas(model, chosen, living, grids, sparsity, per_layer or "uniform")
        sparsity = 1.0 - sum(quotas.values()) / total
    assert sparsity is not None
    keep = max(round((1.0 - sparsity) * total), 1)
    scores = _scores(model, chosen, living, criterion, grids, batches, loss_fn, example_input, sparsity, seed)
    cost = {name: grid.to_blocks(living[name].to(torch.int32)).sum((1, 2)) for name, grid in grids.items()}
    if quotas is None:
        kept = _globally(scores, cost, keep, min_blocks, seed)
    else:
        kept = _layer_by_layer(scores, cost, quotas, min_blocks, seed)
    return {c.name: _mask(c, grids[c.name], kept[c.name], living[c.name]) for c in chosen}


def _check(
    sparsity: float | None,
    criterion: str | Mapping[str, Tensor],
    scope: str,
    per_layer: str | Mapping[str, float] | None,
    min_blocks: int,
) -> None:
    if isinstance(criterion, str) and criterion not in CRITERIA:
        raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)}, or scores, got {criterion!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if per_layer is not None and scope != "layer":
        raise ValueError(f'per_layer: goes with scope="layer", got scope={scope!r}')
    if isinstance(per_layer, Mapping):
        if sparsity is not None:
            raise ValueError(f"sparsity: expected None beside per_layer={{name: sparsity}}, got {sparsity}")
    elif sparsity is None:
        raise ValueError("sparsity: expected a fraction within [0, 1), got None")
    else:
        check_sparsity(sparsity)
    if min_blocks < 0:
        raise ValueError(f"min_blocks: expected 0 and more, got {min_blocks}")


def _check_room(more: int, grids: Mapping[str, BlockGrid], what: str, sparsity: float, density: float) -> None:
    """Raise where ``more`` weights than there are would be kept; less than a block is rounding."""
    if more >= max(math.prod(grid.block) for grid in grids.values()):
        raise ValueError(
            f"{what}: expected {1.0 - density:.6g} and more, the sparsity already there, got {sparsity:.6g}; pruned "
            "weights do not return (redense_ brings them back as zeros)"
        )


def block_of(c: Candidate, block: int | Sequence[int] | None) -> tuple[int, int]:
    """``block``, or by default that of a sparse layer and 1x1 for a dense one."""
    if block is not None:
        return as_block(block)
    return c.module.block if isinstance(c.module, SparseModule) else (1, 1)


# -- scores --------------------------------------------------------------------------------------------------------


def _scores(
    model: nn.Module,
    chosen: Sequence[Candidate],
    living: Mapping[str, Tensor],
    criterion: str | Mapping[str, Tensor],
    grids: Mapping[str, BlockGrid],
    batches: Iterable[tuple[Any, Any]] | None,
    loss_fn: LossFn | None,
    example_input: Any,
    sparsity: float,
    seed: int,
) -> dict[str, Tensor]:
    """float64 [blocks] on the CPU for every layer."""
    found: Mapping[str, Tensor]
    if isinstance(criterion, Mapping):
        found = criterion
        _check_given(chosen, found)
    else:
        found = compute(
            model,
            "magnitude" if criterion == "lamp" else criterion,
            names=[c.name for c in chosen],
            batches=batches,
            loss_fn=loss_fn,
            example_input=example_input,
            sparsity=sparsity,
            seed=seed,
        )
    out = {}
    for c in chosen:
        grid = grids[c.name]
        if criterion == "random" and math.prod(grid.block) > 1:
            out[c.name] = uniform_scores(seed, c.name, (grid.blocks,))
            continue
        score = oriented(c, found[c.name].detach()).to("cpu", torch.float64)
        score = score.masked_fill(~living[c.name], 0.0)
        if not bool(score.isfinite().all()):
            raise ValueError(f"scores: expected finite numbers, got NaN or infinity in {c.name!r}")
        if criterion == "lamp":
            score = score.square()
        inside = grid.to_blocks(torch.ones(grid.weight_shape)).sum((1, 2))
        mean = grid.to_blocks(score).sum((1, 2)) / inside
        out[c.name] = lamp(mean) if criterion == "lamp" else mean
    return out


def _check_given(chosen: Sequence[Candidate], scores: Mapping[str, Tensor]) -> None:
    for c in chosen:
        if c.name not in scores:
            raise ValueError(f"criterion: expected scores for {c.name!r}, got {list(scores)}; or leave it out of names")
        expected = c.weight_shape[::-1] if matching.is_conv1d(c.module) else c.weight_shape
        if tuple(scores[c.name].shape) != expected:
            got = list(scores[c.name].shape)
            raise ValueError(f"criterion[{c.name!r}]: expected shape {list(expected)}, got {got}")


# -- how many ------------------------------------------------------------------------------------------------------


def _quotas(
    model: nn.Module,
    chosen: Sequence[Candidate],
    living: Mapping[str, Tensor],
    grids: Mapping[str, BlockGrid],
    sparsity: float | None,
    per_layer: str | Mapping[str, float],
) -> dict[str, int]:
    """Weights that each layer keeps."""
    every = matching.find(model, INCLUDE, ())
    stem = next((c.name for c in every if c.kind == "conv2d"), None)
    shapes = {c.name: c.weight_shape for c in chosen}
    densities = allocation.allocate(
        shapes,
        sparsity or 0.0,
        per_layer,
        stem=stem if stem in shapes else None,
        head=every[-1].name if every[-1].name in shapes else None,
    )
    has = {name: int(mask.count_nonzero()) for name, mask in living.items()}
    if isinstance(per_layer, Mapping):
        for name, d in densities.items():
            size = living[name].numel()
            more, own = round(d * size) - has[name], {name: grids[name]}
            _check_room(more, own, f"per_layer[{name!r}]", per_layer[name], has[name] / size)
    wanted = {name: d * living[name].numel() for name, d in densities.items()}
    singles = {c.name: BlockGrid(c.weight_shape, (1, 1), c.groups) for c in chosen}
    budget, fixed = math.fsum(wanted.values()), dict[str, int]()
    while len(fixed) < len(wanted):
        open_ = [name for name in wanted if name not in fixed]
        scale = (budget - sum(fixed.values())) / math.fsum(wanted[name] for name in open_)
        counts = allocation.block_counts(
            {name: min(max(scale * wanted[name] / living[name].numel(), 0.0), 1.0) for name in open_}, singles
        )
        # Above 1 where the layers that are full give to the others.
        full = [name for name in open_ if max(scale * wanted[name] * (1 - 1e-12), counts[name]) > has[name]]
        if not full or isinstance(per_layer, Mapping):
            return {name: fixed.get(name, min(counts.get(name, 0), has[name])) for name in wanted}
        fixed |= {name: has[name] for name in full}
    return fixed


# -- which ---------------------------------------------------------------------------------------------------------


def _best(score: Tensor, cost: Tensor, budget: float, generator: torch.Generator, least: int = 0) -> Tensor:
    """bool [n]: the highest scores whose cost [n] comes nearest to the budget, ``least`` at least."""
    n = len(score)
    if n == 0 or bool((cost == cost[0]).all()):
        # Half a block too much or too little is the same: take less.
        k = math.ceil(budget / int(cost[0]) - 0.5) if n else 0
        return _highest(score, min(max(k, least, 0), n), generator)
    ranked, order = score.sort(descending=True, stable=True)
    k = max(_nearest(cost[order].cumsum(0), budget), least)
    if 0 < k < n and bool(ranked[k - 1] == ranked[k]):
        first, last = int((ranked > ranked[k]).count_nonzero()), int((ranked >= ranked[k]).count_nonzero())
        order[first:last] = order[first:last][torch.randperm(last - first, generator=generator)]
        k = max(_nearest(cost[order].cumsum(0), budget), least)
    kept = torch.zeros(n, dtype=torch.bool)
    kept[order[:k]] = True
    return kept


def _nearest(spent: Tensor, budget: float) -> int:
    """How many of the first to take so that ``spent`` [n], a cumulative sum, comes nearest to the budget."""
    k = int(torch.searchsorted(spent.double(), budget))
    below = float(spent[k - 1]) if k else 0.0
    return k + 1 if k < len(spent) and float(spent[k]) - budget < budget - below else k


def _highest(score: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """bool [n]: the k highest, random ones of those that tie. Selecting takes a tenth of the time of sorting."""
    if k == 0:
        return torch.zeros(len(score), dtype=torch.bool)
    limit = score.kthvalue(len(score) - k + 1).values
    kept = score > limit
    tied = (score == limit).nonzero().flatten()
    missing = k - int(kept.count_nonzero())
    kept[tied if missing == len(tied) else tied[torch.randperm(len(tied), generator=generator)[:missing]]] = True
    return kept


def _globally(
    scores: Mapping[str, Tensor], cost: Mapping[str, Tensor], keep: int, min_blocks: int, seed: int
) -> dict[str, Tensor]:
    places = {name: (cost[name] > 0).nonzero().flatten() for name in scores}
    pooled, guarded = [], 0
    for name, place in places.items():
        score = scores[name][place]
        least = min(min_blocks, len(place))
        first = _highest(score, least, layer_generator(seed, f"ties:{name}"))
        pooled.append(score.masked_fill(first, torch.inf))
        guarded += least
    costs = torch.cat([cost[name][place] for name, place in places.items()])
    kept = _best(torch.cat(pooled), costs, keep, layer_generator(seed, "ties"), guarded)
    parts = kept.split([len(place) for place in places.values()])
    return {name: _scatter(cost[name], place, part) for (name, place), part in zip(places.items(), parts)}


def _layer_by_layer(
    scores: Mapping[str, Tensor], cost: Mapping[str, Tensor], quotas: Mapping[str, int], min_blocks: int, seed: int
) -> dict[str, Tensor]:
    """What whole blocks miss of one layer's quota the next ones make up for, so that the total is within half a block.

    Layers with much room come last: they can always make up for it.
    """
    owed, out = 0, {}
    for name in sorted(scores, key=lambda name: int(cost[name].sum()) - quotas[name]):
        place = (cost[name] > 0).nonzero().flatten()
        here = cost[name][place]
        target = quotas[name] + owed
        least = min(min_blocks, len(place))
        kept = _best(scores[name][place], here, target, layer_generator(seed, f"ties:{name}"), least)
        owed = target - int(here[kept].sum())
        out[name] = _scatter(cost[name], place, kept)
    return out


def _scatter(cost: Tensor, place: Tensor, kept: Tensor) -> Tensor:
    out = torch.zeros(len(cost), dtype=torch.bool)
    out[place] = kept
    return out


def _mask(c: Candidate, grid: BlockGrid, kept: Tensor, living: Tensor) -> Tensor:
    mask = grid.from_blocks(kept.view(-1, 1, 1).expand(-1, *grid.block)) & living
    device = next(p.device for p in c.module.parameters(recurse=False))
    return oriented(c, mask).to(device)
