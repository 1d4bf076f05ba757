"""What the launches of weight gradients share: chunks of tokens, their partial sums, and the pass that adds them up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sparsekern.backends.triton.kernels import panels as kernels
from sparsekern.backends.triton.launch import common
from sparsekern.backends.triton.tile import Tile

_SUM_SIZE = 1024


@dataclass(frozen=True)
class Outputs:
    """Results and where a kernel writes: the results themselves, or one fp32 part per chunk.

    Attributes:
        dvalues, dbias: [capacity, bo, bi], [O] ([0] without bias).
        partial, partial_bias: the same, or [chunks, ...] in fp32.
        chunk: tokens of one program.
        grid: (panels, chunks); the panels are an upper bound, as row lengths are data.
        last: whether the kernel's own stores are the results.
    """

    dvalues: Tensor
    dbias: Tensor
    partial: Tensor
    partial_bias: Tensor
    chunk: int
    grid: tuple[int, int]

    @property
    def last(self) -> bool:
        return self.grid[1] == 1


def outputs(
    like: Tensor,
    tokens: int,
    rows: int,
    capacity: int,
    block: tuple[int, int],
    bias_size: int,
    tile: Tile,
    splits: int,
) -> Outputs:
    """Outputs of a weight gradient over ``tokens`` in at most ``splits`` chunks, in ``like``'s dtype and device."""
    dvalues = torch.empty(capacity, *block, dtype=like.dtype, device=like.device)
    dbias = torch.empty(bias_size, dtype=like.dtype, device=like.device)
    stages = triton.cdiv(max(tokens, 1), tile.bm)
    chunk = tile.bm * triton.cdiv(stages, splits)
    chunks = triton.cdiv(max(tokens, 1), chunk)
    partial, partial_bias = dvalues, dbias
    if chunks > 1:
        partial = torch.empty(chunks, capacity, *block, dtype=torch.float32, device=like.device)
        partial_bias = torch.empty(chunks, bias_size, dtype=torch.float32, device=like.device)
    # At most one panel of a row is not full; one more row holds the spare slots.
    return Outputs(dvalues, dbias, partial, partial_bias, chunk, (rows + 1 + triton.cdiv(capacity, tile.panel), chunks))


def finish(out: Outputs, element_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``dvalues`` and ``dbias``, the chunks added up in order where there are several."""
    if not out.last and out.dvalues.numel() + out.dbias.numel():
        _, bo, bi = out.dvalues.shape
        value_programs = triton.cdiv(out.dvalues.numel(), _SUM_SIZE)
        kernels.sum_chunks_kernel[(value_programs + triton.cdiv(out.dbias.shape[0], _SUM_SIZE),)](
            out.partial, out.partial_bias, out.dvalues, out.dbias, element_mask,
            out.dvalues.numel(), out.dbias.shape[0], out.grid[1], value_programs,
            SIZE=_SUM_SIZE, BLOCK=bo * bi, WITH_BIAS=out.dbias.shape[0] > 0, MASKED=element_mask is not None,
            **common.OPTIONS,
        )  # fmt: skip
    return out.dvalues, out.dbias
