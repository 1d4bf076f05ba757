"""Triton kernels on NVIDIA GPUs of compute capability 8.0 and later; no compiler is needed on the machine.

With ``TRITON_INTERPRET=1`` they run on CPU tensors, for tests. Triton itself is imported at the first call. The
functions are those of :class:`sparsekern.backends.gpu.families.Family`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from sparsekern.backends import ConvGeometry, OpDesc
from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.problem import Problem, layer_problem
from sparsekern.backends.triton import model, tiles
from sparsekern.backends.triton.launch import common
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid, capacity_of

WANTS_CHANNELS_LAST = True

P = ParamSpec("P")
R = TypeVar("R")


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
    if desc.op not in ("linear", "conv2d"):
        return f"no kernel for {desc.op}"
    if desc.dtype not in common.DTYPES:
        return f"expected bfloat16, float16 or float32, got {desc.dtype}"
    if desc.block not in tiles.BLOCKS:
        return f"expected block edges among {', '.join(map(str, tiles.EDGES))}, got {desc.block[0]}x{desc.block[1]}"
    return None


def candidates(problem: Problem, chip: Chip) -> tuple[Tile, ...]:
    return tiles.candidates(problem, chip.arch)


def why_not(problem: Problem, kernel: Tile, chip: Chip) -> str | None:
    return tiles.why_not(problem, kernel, chip.arch)


def seconds(problem: Problem, kernel: Tile, chip: Chip) -> float:
    return model.seconds(problem, kernel, chip)


def _on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Launches go to the device of the first tensor; Triton itself takes the current one."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device  # type: ignore[attr-defined]
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return wrapper


@_on_device
def forward(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    kernel: Tile,
) -> Tensor:
    if geometry is None:
        from sparsekern.backends.triton.launch import linear

        return linear.forward(x, values, index, bias, grid, kernel)
    from sparsekern.backends.triton.launch import conv2d

    return conv2d.forward(x, values, index, bias, grid, geometry, kernel)


@_on_device
def dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_shape: tuple[int, ...],
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    kernel: Tile,
) -> Tensor:
    if geometry is None:
        from sparsekern.backends.triton.launch import linear

        return linear.dgrad(dy, values, index, grid, kernel)
    from sparsekern.backends.triton.launch import conv2d

    return conv2d.dgrad(dy, values, index, input_shape, grid, geometry, kernel)


@_on_device
def wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    element_mask: Tensor | None,
    with_bias: bool,
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    kernel: Tile,
) -> tuple[Tensor, Tensor]:
    """Over as many token chunks as the model finds best."""
    problem = layer_problem("wgrad", dy.dtype, grid, geometry, x.shape, capacity_of(grid, index))
    splits = model.splits(problem, kernel, chips.current(dy.device))
    if geometry is None:
        from sparsekern.backends.triton.launch import linear_wgrad

        return linear_wgrad.wgrad(dy, x, index, element_mask, with_bias, grid, kernel, splits)
    from sparsekern.backends.triton.launch import conv2d_wgrad

    return conv2d_wgrad.wgrad(dy, x, index, element_mask, with_bias, grid, geometry, kernel, splits)


@_on_device
def scores(dy: Tensor, x: Tensor, grid: BlockGrid, geometry: ConvGeometry | None, kernel: Tile) -> Tensor:
    """Norms of all blocks of the weight gradient, stored or not."""
    from sparsekern.backends.triton.launch import block_scores

    if geometry is None:
        return block_scores.scores(dy, x, grid, kernel)
    return block_scores.conv2d_scores(dy, x, grid, geometry, kernel)
