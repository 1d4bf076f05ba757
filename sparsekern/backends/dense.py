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


# -- the whole weight's gradient, for methods that ask for it ----------------------------------------------------------


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which :func:`linear_weight_gradient` and its twin give the gradient of operands of ``dtype``."""
    return torch.float32 if dtype is torch.float16 else dtype


def linear_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dw [O, I] of every weight, stored or not, from dy [M, O] and x [M, I]."""
    return _summable(dy).t() @ _summable(x)


def conv2d_weight_gradient(dy: Tensor, x: Tensor, grid: BlockGrid, geometry: ConvGeometry) -> Tensor:
    """dw [O, C/g, R, S] of every weight, stored or not, from dy [N, O, P, Q] and x [N, C, H, W]."""
    weight = _summable(dy.new_empty(1)).expand(grid.weight_shape)
    return _conv2d_backward(_summable(dy), _summable(x), weight, grid, geometry, [False, True, False])[1]


# -- block scores: a panel of the dense gradient at a time, never all of it --------------------------------------------

_PANEL_ELEMENTS = 1 << 22  # elements of the dense gradient that exist at once (whole block rows, at least one)


def without_stored(scores: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    """``scores`` (one per block of the grid) with -inf at the stored blocks. No host sync."""
    flat = torch.cat([scores.flatten(), scores.new_empty(1)])
    return flat.index_fill_(0, BlockLayout(grid, index).slots(), -torch.inf)[:-1].view_as(scores)


def _rows_at_once(grid: BlockGrid) -> int:
    per_row = grid.block[0] * grid.in_per_group * grid.shape[2]
    return max(_PANEL_ELEMENTS // per_row, 1) * grid.block[0]


def _norms(dw: Tensor, block: tuple[int, int]) -> Tensor:
    """Frobenius norms [1, Ob, T, Ib] of the blocks of a (part of a) dense gradient, accumulated in fp32 at least."""
    wide = dw.to(torch.float64 if dw.dtype == torch.float64 else torch.float32)
    wide = wide.reshape(dw.shape[0], dw.shape[1], -1)
    panel = BlockGrid(tuple(dw.shape), block)
    _, ob, t, ib = panel.shape
    if block == (1, 1):
        norms = wide.abs().view(ob, ib, t)
    else:  # sums over whole rows first: three times as fast as norms of blocks cut out
        bo, bi = block
        wide = F.pad(wide.reshape(wide.shape[0], -1), (0, (ib * bi - dw.shape[1]) * t, 0, ob * bo - dw.shape[0]))
        norms = wide.square().view(ob, bo, -1).sum(1).view(ob, ib, bi, t).sum(2).sqrt()
    return norms.float().permute(0, 2, 1).reshape(panel.shape)


def norms_of_blocks(dw: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    """Block scores [G, Ob, T, Ib] of a dense weight gradient that is there anyway, as :func:`block_scores` gives."""
    wide = dw.to(torch.float64 if dw.dtype == torch.float64 else torch.float32)
    return without_stored(grid.to_blocks(wide).flatten(1).norm(dim=1).float().view(grid.shape), index, grid)


def _summable(tensor: Tensor) -> Tensor:
    """fp16 in fp32: a gradient summed over many tokens passes 65504."""
    return tensor.float() if tensor.dtype is torch.float16 else tensor


def block_scores(dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    dy, x = _summable(dy), _summable(x)
    parts = [_norms(part.t() @ x, grid.block) for part in dy.split(_rows_at_once(grid), 1)]
    return without_stored(torch.cat(parts, 1)[0, :, 0], index, grid)


def conv2d_block_scores(dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid, geometry: ConvGeometry) -> Tensor:
    dy, x = _summable(dy), _summable(x)
    groups = []
    for dy_group, x_group in zip(dy.chunk(grid.groups, 1), x.chunk(grid.groups, 1), strict=True):
        parts = []
        for part in dy_group.split(_rows_at_once(grid), 1):
            part_grid = BlockGrid((part.shape[1], *grid.weight_shape[1:]), grid.block)
            weight = dy.new_empty(1).expand(part_grid.weight_shape)
            dw = _conv2d_backward(part, x_group, weight, part_grid, geometry, [False, True, False])[1]
            parts.append(_norms(dw, grid.block))
        groups.append(torch.cat(parts, 1))
    return without_stored(torch.cat(groups), index, grid)
