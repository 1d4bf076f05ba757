"""Launch of the linear weight gradient: panels x chunks of tokens, then one pass that sums the chunks."""

from __future__ import annotations

import triton
from torch import Tensor

from sparsekern.backends.triton.kernels import linear_wgrad as kernels
from sparsekern.backends.triton.launch import common, panels
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid, capacity_of


def wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    element_mask: Tensor | None,
    with_bias: bool,
    grid: BlockGrid,
    tile: Tile,
    splits: int = 1,
    kind: str = "linear",
) -> tuple[Tensor, Tensor]:
    """dw = dy^T x at the stored blocks, dbias = column sums of dy.

    Args:
        dy: [M, O]; x: [M, I], same dtype: bf16, fp16 or fp32.
        index: packed layout.
        element_mask: packed bits uint8 [capacity, ceil(bo*bi/8)] of the elements that learn, or None for all.
        with_bias: whether dbias is wanted.
        grid: of the weight [O, I] (or of a 1x1 convolution).
        tile: how a program is cut.
        splits: chunks of the tokens, summed in a fixed order.
        kind: "conv2d" for the pixels of a 1x1 convolution.

    Returns:
        dvalues [capacity, bo, bi], spare slots zero, and dbias [O] ([0] without bias).
    """
    dy, x, at, capacity = common.rows(dy), common.rows(x), common.offsets(grid, index), capacity_of(grid, index)
    (m, o), i, (bo, bi) = dy.shape, x.shape[1], grid.block
    out = panels.outputs(dy, m, grid.rows, capacity, grid.block, o if with_bias else 0, tile, splits)
    kernels.linear_wgrad_kernel[out.grid](
        x, dy, out.partial, out.partial_bias, index, element_mask,
        m, i, o, x.stride(0), dy.stride(0), grid.rows, capacity, out.chunk, at.row_ptr, at.col,
        ROWS=triton.next_power_of_2(grid.rows + 1), BT=tile.bm, BO=bo, BI=bi, PANEL=tile.panel,
        EVEN_O=o % bo == 0, EVEN_I=i % bi == 0, WITH_BIAS=with_bias, MASKED=element_mask is not None and out.last,
        PRECISION=common.precision(dy, kind), STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, **common.OPTIONS,
    )  # fmt: skip
    return panels.finish(out, element_mask)
