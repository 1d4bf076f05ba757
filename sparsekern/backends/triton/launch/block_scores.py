"""Launch of the block scores: Frobenius norms of the blocks of the dense weight gradient."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsekern.backends.triton.kernels import block_scores as kernels
from sparsekern.backends.triton.launch import common
from sparsekern.backends.triton.problem import Tile
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
