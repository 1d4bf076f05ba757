"""Launch of the linear weight gradient: panels x chunks of tokens, then one pass that sums the chunks."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsekern.backends.triton.kernels import linear_wgrad as kernels
from sparsekern.backends.triton.launch import common
from sparsekern.backends.triton.problem import Tile
from sparsekern.layout import BlockGrid, capacity_of

_SUM_SIZE = 1024


def wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    element_mask: Tensor | None,
    with_bias: bool,
    grid: BlockGrid,
    tile: Tile,
    splits: int = 1,
) -> tuple[Tensor, Tensor]:
    """dw = dy^T x at the stored blocks, dbias = column sums of dy.

    Args:
        dy: [M, O]; x: [M, I], same dtype: bf16, fp16 or fp32.
        index: packed layout.
        element_mask: packed bits uint8 [capacity, ceil(bo*bi/8)] of the elements that learn, or None for all.
        with_bias: whether dbias is wanted.
        grid: of the weight [O, I].
        tile: how a program is cut.
        splits: chunks of the tokens, summed in a fixed order.

    Returns:
        dvalues [capacity, bo, bi], spare slots zero, and dbias [O] ([0] without bias).
    """
    dy, x, at, capacity = common.rows(dy), common.rows(x), common.offsets(grid, index), capacity_of(grid, index)
    (m, o), i, (bo, bi) = dy.shape, x.shape[1], grid.block
    dvalues = torch.empty(capacity, bo, bi, dtype=dy.dtype, device=dy.device)
    dbias = torch.empty(o if with_bias else 0, dtype=dy.dtype, device=dy.device)
    chunk = tile.bm * triton.cdiv(triton.cdiv(max(m, 1), tile.bm), splits)
    splits = triton.cdiv(max(m, 1), chunk)
    partial, partial_bias = dvalues, dbias
    if splits > 1:
        partial = torch.empty(splits, capacity, bo, bi, dtype=torch.float32, device=dy.device)
        partial_bias = torch.empty(splits, dbias.shape[0], dtype=torch.float32, device=dy.device)
    masked = element_mask is not None
    # Rows end where they end: at most one panel per row is not full, one more row holds the spare slots.
    panels = grid.rows + 1 + triton.cdiv(capacity, tile.panel)
    kernels.linear_wgrad_kernel[(panels, splits)](
        x, dy, partial, partial_bias, index, element_mask,
        m, i, o, x.stride(0), dy.stride(0), grid.rows, capacity, chunk, at.row_ptr, at.col,
        ROWS=triton.next_power_of_2(grid.rows + 1), BT=tile.bm, BO=bo, BI=bi, PANEL=tile.panel,
        EVEN_O=o % bo == 0, EVEN_I=i % bi == 0, WITH_BIAS=with_bias, MASKED=masked and splits == 1,
        PRECISION=common.precision(dy), STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, **common.OPTIONS,
    )  # fmt: skip
    if splits > 1:
        value_programs = triton.cdiv(dvalues.numel(), _SUM_SIZE)
        kernels.sum_chunks_kernel[(value_programs + triton.cdiv(dbias.shape[0], _SUM_SIZE),)](
            partial, partial_bias, dvalues, dbias, element_mask, dvalues.numel(), o, splits, value_programs,
            SIZE=_SUM_SIZE, BLOCK=bo * bi, WITH_BIAS=with_bias, MASKED=masked, **common.OPTIONS,
        )  # fmt: skip
    return dvalues, dbias
