"""Launch of the block scores: Frobenius norms of the blocks of the dense weight gradient."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsekern.backends import ConvGeometry
from sparsekern.backends.triton.kernels import block_scores as kernels
from sparsekern.backends.triton.launch import common
from sparsekern.backends.triton.launch.conv2d import alignment
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid

OUTPUTS = 128  # output features of one program: a whole number of blocks of every edge


def scores(dy: Tensor, x: Tensor, grid: BlockGrid, tile: Tile) -> Tensor:
    """Norms of all blocks, stored or not.

    Args:
        dy: [M, O]; x: [M, I], same dtype: bf16, fp16 or fp32.
        grid: of the weight [O, I].
        tile: ``bm`` tokens per stage, ``panel`` input features per program.

    Returns:
        float32 [Ob, Ib].
    """
    dy, x = common.rows(dy), common.rows(x)
    (m, o), i, (bo, bi), (_, ob, _, ib) = dy.shape, x.shape[1], grid.block, grid.shape
    out = torch.empty(ob, ib, dtype=torch.float32, device=dy.device)
    kernels.block_scores_kernel[(triton.cdiv(o, OUTPUTS), triton.cdiv(i, tile.panel))](
        x, dy, out, m, i, o, x.stride(0), dy.stride(0), ob, ib,
        BT=tile.bm, TO=OUTPUTS, TI=tile.panel, BO=bo, BI=bi, EVEN=o % OUTPUTS == 0 and i % tile.panel == 0,
        PRECISION=common.precision(dy), STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, **common.OPTIONS,
    )  # fmt: skip
    return out


def conv2d_scores(dy: Tensor, x: Tensor, grid: BlockGrid, geometry: ConvGeometry, tile: Tile) -> Tensor:
    """Norms of all blocks of a convolution's weight gradient.

    Args:
        dy: [N, O, P, Q]; x: [N, C, H, W], same dtype; copied if they are not in channels_last memory.
        grid: of the weight [O, C/g, R, S].
        geometry: stride, padding and dilation.
        tile: ``bm`` pixels per stage, ``panel`` input channels per program.

    Returns:
        float32 [G, Ob, T, Ib].
    """
    dy = dy.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    groups, ob, taps, ib = grid.shape
    (n, c, h, w), (_, o, p, q), (bo, bi) = x.shape, dy.shape, grid.block
    x_group, y_group = c // groups, o // groups
    top, _, left, _ = geometry.padding
    out = torch.empty(grid.shape, dtype=torch.float32, device=dy.device)
    programs = (triton.cdiv(y_group, OUTPUTS), triton.cdiv(x_group, tile.panel), taps * groups)
    kernels.conv2d_block_scores_kernel[programs](
        x, dy, out, n, h, w, p, q, x_group, y_group, h * w * c, w * c, c, o, ob, ib,
        *geometry.stride, top, left, *geometry.dilation,
        BT=tile.bm, TO=OUTPUTS, TI=tile.panel, BO=bo, BI=bi,
        ALIGN=alignment(c, x_group, most=tile.panel), ALIGN_Y=alignment(o, y_group, most=OUTPUTS),
        S=grid.kernel_size[1], TAPS=taps, GROUPS=groups,
        EVEN=y_group % OUTPUTS == 0 and x_group % tile.panel == 0,
        PRECISION=common.precision(dy, "conv2d"), STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, **common.OPTIONS,
    )  # fmt: skip
    return out
