"""Triton kernels on NVIDIA GPUs of compute capability 8.0 and later; no compiler is needed on the machine.

With ``TRITON_INTERPRET=1`` they run on CPU tensors, for tests. Triton itself is imported at the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from sparsekern.backends import ConvGeometry, OpDesc, dense, forced, is_channels_last
from sparsekern.backends.triton import chips, model, tiles
from sparsekern.backends.triton.launch import common
from sparsekern.backends.triton.problem import Problem, Tile, layer_problem
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


def _tile(problem: Problem, x: Tensor, fallback: bool = True) -> Tile | None:
    """The tile that runs, or None where the dense op is faster and this backend is not forced."""
    return tiles.choose(problem, chips.current(x.device), fallback and forced() != "triton").tile


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
def linear_forward(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid) -> Tensor:
    tile = _tile(layer_problem("forward", x.dtype, grid, None, x.shape, values.shape[0]), x)
    if tile is None:
        return dense.linear_forward(x, values, index, bias, grid)
    from sparsekern.backends.triton.launch import linear

    return linear.forward(x, values, index, bias, grid, tile)


@_on_device
def linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    tile = _tile(layer_problem("dgrad", dy.dtype, grid, None, dy.shape, values.shape[0]), dy)
    if tile is None:
        return dense.linear_dgrad(dy, values, index, grid)
    from sparsekern.backends.triton.launch import linear

    return linear.dgrad(dy, values, index, grid, tile)


@_on_device
def linear_wgrad(
    dy: Tensor, x: Tensor, index: Tensor, element_mask: Tensor | None, with_bias: bool, grid: BlockGrid
) -> tuple[Tensor, Tensor]:
    problem = layer_problem("wgrad", dy.dtype, grid, None, dy.shape, capacity_of(grid, index))
    tile = _tile(problem, dy)
    if tile is None:
        return dense.linear_wgrad(dy, x, index, element_mask, with_bias, grid)
    from sparsekern.backends.triton.launch import linear_wgrad as sdd

    splits = model.splits(problem, tile, chips.current(dy.device))
    return sdd.wgrad(dy, x, index, element_mask, with_bias, grid, tile, splits)


@_on_device
def block_scores(dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    problem = layer_problem("block_scores", dy.dtype, grid, None, dy.shape, capacity_of(grid, index))
    tile = _tile(problem, dy, fallback=False)
    assert tile is not None
    from sparsekern.backends.triton.launch import block_scores as norms

    return dense.without_stored(norms.scores(dy, x, grid, tile), index, grid)


# -- convolutions: the kernels want channels_last ----------------------------------------------------------------------


def _formatted(image: Tensor, channels_last: bool) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@_on_device
def conv2d_forward(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid, geometry: ConvGeometry
) -> Tensor:
    tile = _tile(layer_problem("forward", x.dtype, grid, geometry, x.shape, values.shape[0]), x)
    if tile is None:
        return dense.conv2d_forward(x, values, index, bias, grid, geometry)
    from sparsekern.backends.triton.launch import conv2d

    return _formatted(conv2d.forward(x, values, index, bias, grid, geometry, tile), is_channels_last(x))


@_on_device
def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_shape: tuple[int, ...],
    channels_last: bool,
    grid: BlockGrid,
    geometry: ConvGeometry,
) -> Tensor:
    tile = _tile(layer_problem("dgrad", dy.dtype, grid, geometry, input_shape, values.shape[0]), dy)
    if tile is None:
        return dense.conv2d_dgrad(dy, values, index, input_shape, channels_last, grid, geometry)
    from sparsekern.backends.triton.launch import conv2d

    return _formatted(conv2d.dgrad(dy, values, index, input_shape, grid, geometry, tile), channels_last)


@_on_device
def conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    element_mask: Tensor | None,
    with_bias: bool,
    grid: BlockGrid,
    geometry: ConvGeometry,
) -> tuple[Tensor, Tensor]:
    problem = layer_problem("wgrad", dy.dtype, grid, geometry, x.shape, capacity_of(grid, index))
    tile = _tile(problem, dy)
    if tile is None:
        return dense.conv2d_wgrad(dy, x, index, element_mask, with_bias, grid, geometry)
    from sparsekern.backends.triton.launch import conv2d_wgrad as sdd

    splits = model.splits(problem, tile, chips.current(dy.device))
    return sdd.wgrad(dy, x, index, element_mask, with_bias, grid, geometry, tile, splits)


@_on_device
def conv2d_block_scores(dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid, geometry: ConvGeometry) -> Tensor:
    tile = _tile(layer_problem("block_scores", dy.dtype, grid, geometry, x.shape, capacity_of(grid, index)), dy)
    if tile is None:  # many pixels and few blocks: too few programs, and cuDNN's panels are small
        return dense.conv2d_block_scores(dy, x, index, grid, geometry)
    from sparsekern.backends.triton.launch import block_scores as norms

    return dense.without_stored(norms.conv2d_scores(dy, x, grid, geometry, tile), index, grid)


# -- what would run ----------------------------------------------------------------------------------------------------


def explain(
    dtype: torch.dtype,
    device: torch.device,
    grid: BlockGrid,
    capacity: int,
    x_shape: tuple[int, ...],
    geometry: ConvGeometry | None,
) -> list[str]:
    """One line per pass of a layer at x [..., I] or [N, C, H, W]: the tile or dense, why, and the times compared."""
    chip, lines = chips.current(device), []
    for step in ("forward", "dgrad", "wgrad"):
        problem = layer_problem(step, dtype, grid, geometry, x_shape, capacity)
        found = tiles.choose(problem, chip, fallback=forced() != "triton")
        if found.tile is None:
            runs = "dense on the materialised weight"
        else:
            t = found.tile
            runs = f"{t.variant} tile {t.bm}x{t.bk or t.panel * grid.block[1]}, {t.warps} warps, {t.stages} stages"
        us = f"{found.seconds * 1e6:.0f} us, dense {found.dense_seconds * 1e6:.0f} us"
        lines.append(f"{step}: {runs} ({found.source} for {chip.name}: kernel {us})")
    return lines
