"""The functions of :class:`sparsekern.backends.Backend` on a GPU: each pass by the kernel that the choice names."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsekern.backends import AUTO, ConvGeometry, OpDesc, dense, families, forced, is_channels_last, precision
from sparsekern.backends.gpu import chips, choose, table
from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.choose import Choice
from sparsekern.backends.gpu.families import Kernel, family_of
from sparsekern.backends.gpu.problem import layer_problem
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid, capacity_of


def chosen(
    step: str,
    dtype: torch.dtype,
    device: torch.device,
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    x_shape: tuple[int, ...],
    capacity: int,
) -> Choice:
    """What runs one pass of a layer; arguments as for ``layer_problem``."""
    number = precision(dtype, "linear" if geometry is None else "conv2d")
    key = (step, dtype, number, device.type, grid, geometry, tuple(x_shape), capacity)
    return _chosen(*key, chips.current(device), forced(), table.generation())


@functools.lru_cache(maxsize=8192)  # by raw facts: building a problem takes longer than finding its choice
def _chosen(
    step: str,
    dtype: torch.dtype,
    number: str,
    device: str,
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    x_shape: tuple[int, ...],
    capacity: int,
    chip: Chip,
    wish: str,
    generation: int,
) -> Choice:
    problem = layer_problem(step, dtype, grid, geometry, x_shape, capacity)
    names = families(OpDesc("linear" if geometry is None else "conv2d", device, dtype, grid.block))
    return choose.choose(problem, chip, names, fallback=wish == AUTO)


def _kernel(
    step: str, tensor: Tensor, grid: BlockGrid, geometry: ConvGeometry | None, x_shape: tuple[int, ...], capacity: int
) -> Kernel | None:
    return chosen(step, tensor.dtype, tensor.device, grid, geometry, x_shape, capacity).kernel


def linear_forward(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid) -> Tensor:
    kernel = _kernel("forward", x, grid, None, x.shape, values.shape[0])
    if kernel is None:
        return dense.linear_forward(x, values, index, bias, grid)
    return family_of(kernel).forward(x, values, index, bias, grid, None, kernel)


def linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    kernel = _kernel("dgrad", dy, grid, None, dy.shape, values.shape[0])
    if kernel is None:
        return dense.linear_dgrad(dy, values, index, grid)
    return family_of(kernel).dgrad(dy, values, index, (dy.shape[0], grid.weight_shape[1]), grid, None, kernel)


def linear_wgrad(
    dy: Tensor, x: Tensor, index: Tensor, element_mask: Tensor | None, with_bias: bool, grid: BlockGrid
) -> tuple[Tensor, Tensor]:
    kernel = _kernel("wgrad", dy, grid, None, dy.shape, capacity_of(grid, index))
    if kernel is None:
        return dense.linear_wgrad(dy, x, index, element_mask, with_bias, grid)
    return family_of(kernel).wgrad(dy, x, index, element_mask, with_bias, grid, None, kernel)


# -- convolutions: the kernels want channels_last ----------------------------------------------------------------------


def _formatted(image: Tensor, channels_last: bool) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def conv2d_forward(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid, geometry: ConvGeometry
) -> Tensor:
    kernel = _kernel("forward", x, grid, geometry, x.shape, values.shape[0])
    if kernel is None:
        return dense.conv2d_forward(x, values, index, bias, grid, geometry)
    y = family_of(kernel).forward(x, values, index, bias, grid, geometry, kernel)
    return _formatted(y, is_channels_last(x))


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_shape: tuple[int, ...],
    channels_last: bool,
    grid: BlockGrid,
    geometry: ConvGeometry,
) -> Tensor:
    kernel = _kernel("dgrad", dy, grid, geometry, input_shape, values.shape[0])
    if kernel is None:
        return dense.conv2d_dgrad(dy, values, index, input_shape, channels_last, grid, geometry)
    dx = family_of(kernel).dgrad(dy, values, index, input_shape, grid, geometry, kernel)
    return _formatted(dx, channels_last)


def conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    element_mask: Tensor | None,
    with_bias: bool,
    grid: BlockGrid,
    geometry: ConvGeometry,
) -> tuple[Tensor, Tensor]:
    kernel = _kernel("wgrad", dy, grid, geometry, x.shape, capacity_of(grid, index))
    if kernel is None:
        return dense.conv2d_wgrad(dy, x, index, element_mask, with_bias, grid, geometry)
    return family_of(kernel).wgrad(dy, x, index, element_mask, with_bias, grid, geometry, kernel)


# -- block scores: kernels of Triton alone -----------------------------------------------------------------------------


def _scores_tile(dy: Tensor, grid: BlockGrid, geometry: ConvGeometry | None, x: Tensor, index: Tensor) -> Tile | None:
    """The tile, or None for the dense op: faster, or the only one there is."""
    desc = OpDesc("linear" if geometry is None else "conv2d", dy.device.type, dy.dtype, grid.block)
    if "triton" not in families(desc, AUTO):
        return None
    shape = dy.shape if geometry is None else x.shape
    problem = layer_problem("block_scores", dy.dtype, grid, geometry, shape, capacity_of(grid, index))
    # A linear layer's dense op holds panels of the dense gradient, which the kernel never needs.
    fallback = geometry is not None and forced() != "triton"
    tile = choose.choose(problem, chips.current(dy.device), ("triton",), fallback).kernel
    assert tile is None or isinstance(tile, Tile)
    return tile


def block_scores(dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    tile = _scores_tile(dy, grid, None, x, index)
    if tile is None:
        return dense.block_scores(dy, x, index, grid)
    from sparsekern.backends import triton

    return dense.without_stored(triton.scores(dy, x, grid, None, tile), index, grid)


def conv2d_block_scores(dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid, geometry: ConvGeometry) -> Tensor:
    tile = _scores_tile(dy, grid, geometry, x, index)
    if tile is None:  # also many pixels and few blocks: too few programs, and cuDNN's panels are small
        return dense.conv2d_block_scores(dy, x, index, grid, geometry)
    from sparsekern.backends import triton

    return dense.without_stored(triton.scores(dy, x, grid, geometry, tile), index, grid)


# -- what would run ----------------------------------------------------------------------------------------------------


def explain(
    dtype: torch.dtype,
    device: torch.device,
    grid: BlockGrid,
    capacity: int,
    x_shape: tuple[int, ...],
    geometry: ConvGeometry | None,
) -> list[str]:
    """One line per pass of a layer at x [..., I] or [N, C, H, W]: the kernel or dense, why, and the times compared."""
    chip, lines = chips.current(device), []
    for step in ("forward", "dgrad", "wgrad"):
        found = chosen(step, dtype, device, grid, geometry, x_shape, capacity)
        runs = "dense on the materialised weight" if found.kernel is None else f"{found.backend} {found.kernel}"
        us = f"{found.seconds * 1e6:.0f} us, dense {found.dense_seconds * 1e6:.0f} us"
        lines.append(f"{step}: {runs} ({found.source} for {chip.name}: kernel {us})")
    return lines
