"""Launch of the convolution's weight gradient: panels x chunks of output pixels, then one pass that sums the chunks."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsekern.backends import ConvGeometry
from sparsekern.backends.gpu.problem import is_linear
from sparsekern.backends.triton.kernels import conv2d_wgrad as kernels
from sparsekern.backends.triton.launch import common, linear_wgrad, panels
from sparsekern.backends.triton.launch.conv2d import alignment, as_rows
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid, capacity_of


def wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    element_mask: Tensor | None,
    with_bias: bool,
    grid: BlockGrid,
    geometry: ConvGeometry,
    tile: Tile,
    splits: int = 1,
) -> tuple[Tensor, Tensor]:
    """dw at the stored blocks and dbias, from dy [N, O, P, Q] and x [N, C, H, W]; otherwise as for linear layers."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    if is_linear(grid, geometry):
        return linear_wgrad.wgrad(as_rows(dy), as_rows(x), index, element_mask, with_bias, grid, tile, splits, "conv2d")
    at, capacity = common.offsets(grid, index), capacity_of(grid, index)
    groups, block_rows, _, block_cols = grid.shape
    (n, c, h, w), (_, o, p, q), (bo, bi) = x.shape, dy.shape, grid.block
    x_group, y_group = c // groups, o // groups
    top, _, left, _ = geometry.padding
    out = panels.outputs(dy, n * p * q, grid.rows, capacity, grid.block, o if with_bias else 0, tile, splits)
    kernels.conv2d_wgrad_kernel[out.grid](
        x, dy, out.partial, out.partial_bias, index, element_mask,
        n, h, w, p, q, x_group, y_group, h * w * c, w * c, c, o,
        block_rows, block_cols, capacity, out.chunk, *geometry.stride, top, left, *geometry.dilation,
        at.row_ptr, at.col,
        ROWS=triton.next_power_of_2(grid.rows + 1), BT=tile.bm, BO=bo, BI=bi, PANEL=tile.panel,
        ALIGN=alignment(c, x_group, most=bi), ALIGN_Y=alignment(o, y_group, most=bo),
        S=grid.kernel_size[1], GROUPS=groups,
        EVEN_O=y_group % bo == 0, EVEN_I=x_group % bi == 0, WITH_BIAS=with_bias,
        MASKED=element_mask is not None and out.last, PRECISION=common.precision(dy, "conv2d"), STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, **common.OPTIONS,
    )  # fmt: skip
    return panels.finish(out, element_mask)
