"""Measure what the cost model only predicts: sparse against dense, layer by layer, on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import cost
from sparsekern.config import SparsityConfig
from sparsekern.layout import BlockGrid, BlockLayout
from sparsekern.masks import make_block_masks
from sparsekern.nn import HOOKS
from sparsekern.sparsify import Planner, to_sparse

LEAST_ROUNDS, MOST_ROUNDS = 3, 50
SECONDS_PER_LAYER = 2.0


def tune(
    model: nn.Module,
    example_input: Any,
    cfg: SparsityConfig | None = None,
    *,
    seconds_per_layer: float = SECONDS_PER_LAYER,
    save: bool = True,
) -> dict[str, float]:
    """Time forward and backward of every layer that ``cfg`` would make sparse, against its dense twin.

    Rounds of dense and sparse alternate and the median of their ratios counts, so a busy machine shifts both. Results
    are kept in the user's cache and used by every later plan at these shapes, block and density.

    Returns:
        {layer name: speedup}.
    """
    planner = Planner(model, cfg, None, None, example_input, None, None)
    plan = planner.plan()
    modules = {c.name: c.module for c in planner.candidates}
    cases = {c.name: planner.case_of(c) for c in planner.candidates}
    found: dict[str, float] = {}
    timed: dict[tuple[str, str], float] = {}
    for layer in plan.layers:
        if layer.name not in planner.grids:
            continue
        grid, count, case = planner.grids[layer.name], planner.counts[layer.name], cases[layer.name]
        density = count * grid.block[0] * grid.block[1] / layer.params_dense
        same = (case.key(grid.block), f"{density:.2f}")
        if same not in timed:
            timed[same] = measure(modules[layer.name], case, grid, count, seconds_per_layer)
        found[layer.name] = timed[same]
        cost.remember(case, grid.block, density, timed[same])
    if save:
        cost.save_tuned()
    return found


def measure(
    dense: nn.Module, case: cost.Case, grid: BlockGrid, count: int, seconds: float = SECONDS_PER_LAYER
) -> float:
    """Median over interleaved rounds of dense time over sparse time, forward and backward, on random data."""
    dense = _without_hooks(dense)
    block_mask = make_block_masks({"layer": grid}, {"layer": count}, seed=0)["layer"]
    sparse = to_sparse(dense, BlockLayout.from_block_mask(grid, block_mask).mask(), grid.block)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.x_shape, generator=generator).to(device=case.device, dtype=getattr(torch, case.dtype))
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    dy = torch.randn_like(dense(x))
    ratios: list[float] = []
    deadline = time.perf_counter() + seconds
    for module in (dense, sparse):
        _step(module, x, dy)
    while len(ratios) < LEAST_ROUNDS or (time.perf_counter() < deadline and len(ratios) < MOST_ROUNDS):
        ratios.append(_timed(lambda: _step(dense, x, dy)) / _timed(lambda: _step(sparse, x, dy)))
    return statistics.median(ratios)


def _without_hooks(module: nn.Module) -> nn.Module:
    bare = copy.copy(module)
    for name in HOOKS:
        bare.__dict__[name] = OrderedDict()
    return bare


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    parameters = [p for p in module.parameters() if p.requires_grad]
    torch.autograd.grad(module(x), [x, *parameters], dy)


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
