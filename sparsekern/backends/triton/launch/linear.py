"""Launches of the linear kernels: forward and dgrad, one product over the layout or its transpose."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparsekern.backends.triton.kernels import linear as kernels
from sparsekern.backends.triton.launch import common
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid, union_rows


def forward(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid, tile: Tile) -> Tensor:
    """y = x w^T + bias.

    Args:
        x: [M, I] bf16, fp16 or fp32.
        values: [capacity, bo, bi], x's dtype.
        index: packed layout.
        bias: [O] or None.
        grid: of the weight [O, I].
        tile: how a program is cut.

    Returns:
        y [M, O].
    """
    y = torch.empty(x.shape[0], grid.weight_shape[0], dtype=x.dtype, device=x.device)
    product(x, y, values, index, bias, grid, tile, transposed=False)
    return y


def dgrad(dy: Tensor, values: Tensor, index: Tensor, grid: BlockGrid, tile: Tile) -> Tensor:
    """dx = dy w: dy [M, O] to dx [M, I]; the arguments of :func:`forward`."""
    dx = torch.empty(dy.shape[0], grid.weight_shape[1], dtype=dy.dtype, device=dy.device)
    product(dy, dx, values, index, None, grid, tile, transposed=True)
    return dx


def product(
    x: Tensor,
    y: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    grid: BlockGrid,
    tile: Tile,
    *,
    transposed: bool,
    kind: str = "linear",
) -> None:
    """Writes y [M, N] from x [M, K] and the layout, or its transpose; ``grid``, ``kind``: also of a 1x1 "conv2d"."""
    x, values, at = common.rows(x), values.contiguous(), common.offsets(grid, index)
    m, k = x.shape
    if transposed:
        edge, bn = grid.block
        n, block_rows, panels, order = grid.weight_shape[1], grid.t_rows, grid.t_unions, at.t_order
        o_ptr, o_col, o_slot, o_union, o_entry = at.t_ptr, at.t_row, at.t_perm, at.t_union_ptr, at.t_union
    else:
        bn, edge = grid.block
        n, block_rows, panels, order = grid.weight_shape[0], grid.rows, grid.unions, at.row_order
        o_ptr, o_col, o_slot, o_union, o_entry = at.row_ptr, at.col, at.col, at.union_ptr, at.union
    if m == 0:
        return
    if tile.variant == "tma" and not (values.shape[0] and common.describable(x, y, values.view(-1, values.shape[2]))):
        tile = common.by_pointers(tile)
    m_tiles = triton.cdiv(m, tile.bm)
    group = common.token_group(tile, k, x.element_size())
    options = {"num_warps": tile.warps, "num_stages": tile.stages, **common.OPTIONS}
    if tile.variant == "tma":
        w_box = [tile.bk, bn] if transposed else [bn, tile.bk]
        kernels.linear_tma_kernel[common.programs(tile, m_tiles * block_rows, x.device)](
            TensorDescriptor.from_tensor(x, [tile.bm, tile.bk]),
            TensorDescriptor.from_tensor(values.view(-1, values.shape[2]), w_box),
            TensorDescriptor.from_tensor(y, [tile.bm, bn]),
            bias, index, m, n, block_rows, group, o_ptr, o_col, o_slot, order,
            BM=tile.bm, BK=tile.bk, BN=bn, EDGE=edge,
            TRANSPOSED=transposed, HAS_BIAS=bias is not None, STAGES=tile.stages, **options,
        )  # fmt: skip
    elif tile.variant == "union":
        kernels.linear_union_kernel[common.programs(tile, m_tiles * panels, x.device)](
            x, values, bias, y, index, m, k, n, x.stride(0), y.stride(0), block_rows, panels, group,
            o_ptr, o_slot, o_union, o_entry,
            BM=tile.bm, BK=tile.bk, BN=bn, EDGE=edge, PANEL=union_rows(bn),
            TRANSPOSED=transposed, HAS_BIAS=bias is not None, EVEN_K=k % edge == 0,
            PRECISION=common.precision(x, kind), STAGES=tile.stages, **options,
        )  # fmt: skip
    else:
        kernels.linear_gather_kernel[common.programs(tile, m_tiles * block_rows, x.device)](
            x, values, bias, y, index, m, k, n, x.stride(0), y.stride(0), block_rows, group,
            o_ptr, o_col, o_slot, order,
            BM=tile.bm, BK=tile.bk, BN=bn, EDGE=edge,
            TRANSPOSED=transposed, HAS_BIAS=bias is not None, EVEN_K=k % edge == 0,
            PRECISION=common.precision(x, kind), STAGES=tile.stages, **options,
        )  # fmt: skip
