"""The specification: dense operators on the materialised masked weight, any device, any dtype.

Also the fallback where no kernel fits, and the oracle of every test.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekern.backends import ConvGeometry, OpDesc, is_channels_last
from sparsekern.element_mask import unpack
from sparsekern.layout import BlockGrid, BlockLayout


def unsupported(desc: OpDesc) -> str | None:
    return None


def _stored(dw: Tensor, index: Tensor, element_mask: Tensor | None, grid: BlockGrid) -> Tensor:
    dvalues = BlockLayout(grid, index).from_dense(dw)
    return dvalues if element_mask is None else dvalues * unpack(element_mask, grid.block)


def linear_forward(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid) -> Tensor:
    return F.linear(x, BlockLayout(grid, index).to_dense(values), bias)


def linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    return dy @ BlockLayout(grid, index).to_dense(values)


def linear_wgrad(
    dy: Tensor, x: Tensor, index: Tensor, element_mask: Tensor | None, with_bias: bool, grid: BlockGrid
) -> tuple[Tensor, Tensor]:
    return _stored(dy.t() @ x, index, element_mask, grid), dy.sum(0) if with_bias else dy.new_empty(0)


def conv2d_forward(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid, geometry: ConvGeometry
) -> Tensor:
    weight = BlockLayout(grid, index).to_dense(values)
    fmt = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    top, bottom, left, right = geometry.padding
    padding: tuple[int, int] = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    y = F.conv2d(x, weight, bias, geometry.stride, padding, geometry.dilation, grid.groups)
    return y.contiguous(memory_format=fmt)


def _conv2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, grid: BlockGrid, geometry: ConvGeometry, want: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    top, bottom, left, right = geometry.padding
    padding = [top, left]
    uneven = (top, left) != (bottom, right)
    if uneven:
        x, padding = F.pad(x, (left, right, top, bottom)), [0, 0]
    dx, dw, dbias = torch.ops.aten.convolution_backward(
        dy, x, weight, [dy.shape[1]], geometry.stride, padding, geometry.dilation, False, [0, 0], grid.groups, want
    )
    if uneven and want[0]:
        dx = dx[:, :, top : dx.shape[2] - bottom, left : dx.shape[3] - right]
    return dx, dw, dbias


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_shape: tuple[int, ...],
    channels_last: bool,
    grid: BlockGrid,
    geometry: ConvGeometry,
) -> Tensor:
    weight = BlockLayout(grid, index).to_dense(values)
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(input_shape, dtype=dy.dtype, device=dy.device, memory_format=fmt)
    dx = _conv2d_backward(dy, x, weight, grid, geometry, [True, False, False])[0]
    return dx.contiguous(memory_format=fmt)


def conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    element_mask: Tensor | None,
    with_bias: bool,
    grid: BlockGrid,
    geometry: ConvGeometry,
) -> tuple[Tensor, Tensor]:
    weight = dy.new_empty(1).expand(grid.weight_shape)
    _, dw, dbias = _conv2d_backward(dy, x, weight, grid, geometry, [False, True, with_bias])
    return _stored(dw, index, element_mask, grid), dbias if with_bias else dy.new_empty(0)
