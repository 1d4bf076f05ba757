"""Triton kernels on NVIDIA GPUs of compute capability 8.0 and later; no compiler is needed on the machine.

With ``TRITON_INTERPRET=1`` they run on CPU tensors, for tests. Triton itself is imported at the first call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.backends import OpDesc, dense, forced
from sparsekern.backends.triton import chips, model, tiles
from sparsekern.backends.triton.launch import common
from sparsekern.backends.triton.problem import Problem, Tile, precision
from sparsekern.layout import BlockGrid, capacity_of

WANTS_CHANNELS_LAST = True


def unsupported(desc: OpDesc) -> str | None:
    if (reason := common.missing()) is not None:
        return reason
    if desc.device == "cpu":
        if not common.interpreted():
            return "expected tensors on a GPU; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests"
    elif desc.device != "cuda":
        return f"expected tensors on a GPU, got {desc.device}"
    elif not torch.cuda.is_available():
        return "no usable GPU or driver"
    elif torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"expected compute capability 8.0 or later, got {torch.cuda.get_device_capability()}"
    if desc.op != "linear":
        return f"no kernel for {desc.op}"
    if desc.dtype not in common.DTYPES:
        return f"expected bfloat16, float16 or float32, got {desc.dtype}"
    if desc.block not in tiles.BLOCKS:
        return f"expected block edges among {', '.join(map(str, tiles.EDGES))}, got {desc.block[0]}x{desc.block[1]}"
    return None


def problem_of(op: str, x: Tensor, grid: BlockGrid, capacity: int) -> Problem:
    """``op`` on the rows x [M, features] of one layer."""
    out_features, in_features = grid.weight_shape
    return Problem(op, precision(x.dtype), grid.block, x.shape[0], out_features, in_features, capacity)


def _tile(problem: Problem, x: Tensor, fallback: bool = True) -> Tile | None:
    """The tile that runs, or None where the dense op is faster and this backend is not forced."""
    return tiles.choose(problem, chips.current(x.device), fallback and forced() != "triton").tile


def linear_forward(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid) -> Tensor:
    tile = _tile(problem_of("linear_forward", x, grid, values.shape[0]), x)
    if tile is None:
        return dense.linear_forward(x, values, index, bias, grid)
    from sparsekern.backends.triton.launch import linear

    return linear.forward(x, values, index, bias, grid, tile)


def linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    tile = _tile(problem_of("linear_dgrad", dy, grid, values.shape[0]), dy)
    if tile is None:
        return dense.linear_dgrad(dy, values, index, grid)
    from sparsekern.backends.triton.launch import linear

    return linear.dgrad(dy, values, index, grid, tile)


def linear_wgrad(
    dy: Tensor, x: Tensor, index: Tensor, element_mask: Tensor | None, with_bias: bool, grid: BlockGrid
) -> tuple[Tensor, Tensor]:
    problem = problem_of("linear_wgrad", dy, grid, capacity_of(grid, index))
    tile = _tile(problem, dy)
    if tile is None:
        return dense.linear_wgrad(dy, x, index, element_mask, with_bias, grid)
    from sparsekern.backends.triton.launch import linear_wgrad as sdd

    splits = model.splits(problem, tile, chips.current(dy.device))
    return sdd.wgrad(dy, x, index, element_mask, with_bias, grid, tile, splits)


def block_scores(dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    tile = _tile(problem_of("block_scores", dy, grid, capacity_of(grid, index)), dy, fallback=False)
    assert tile is not None
    from sparsekern.backends.triton.launch import block_scores as norms

    return dense.without_stored(norms.scores(dy, x, grid, tile), index, grid)
