"""What every launch needs: where it may run, how precise fp32 is, how many programs, which descriptors."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os

import torch
from torch import Tensor

from sparsekern.backends import precision as number_format
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid, IndexOffsets, capacity_of, index_offsets

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton 3.9 warns where this is left to its default, which is about to change; the accumulations want fused
# multiply-adds on every version.
OPTIONS = {"enable_fp_fusion": True}
_INTERPRETER_SMS = 3  # any small number: persistent loops then take several turns


def interpreted() -> bool:
    """Whether Triton's interpreter is on (``TRITON_INTERPRET=1``): kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.lru_cache(maxsize=1)
def missing() -> str | None:
    """Why Triton can't be used at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def precision(tensor: Tensor, kind: str = "linear") -> str:
    """``input_precision`` of ``tl.dot``; it matters for fp32 alone, where PyTorch's own switch for ``kind`` decides."""
    return "tf32" if number_format(tensor.dtype, kind) == "tf32" else "ieee"


@functools.lru_cache(maxsize=16)
def sms(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def programs(tile: Tile, work: int, device: torch.device) -> tuple[int]:
    """Grid of a kernel with ``work`` items: persistent (``tile.ctas`` programs per SM) or one program per item."""
    return (min(work, tile.ctas * sms(device)) if tile.ctas else work,)


# x of one group of token tiles stays within this much L2 while all block rows pass over it.
_SLAB_BYTES = 24 << 20


def token_group(tile: Tile, features: int, itemsize: int) -> int:
    """Token tiles that pass over all block rows before the next ones start."""
    return max(1, _SLAB_BYTES // (tile.bm * features * itemsize))


def offsets(grid: BlockGrid, index: Tensor) -> IndexOffsets:
    """Where the arrays of the packed layout start."""
    return index_offsets(grid, capacity_of(grid, index))


def rows(x: Tensor) -> Tensor:
    """x [M, K] with contiguous features; a copy only where the strides don't allow it."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def describable(*tensors: Tensor) -> bool:
    """Whether the copy engine can address these matrices: base and row stride in multiples of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.shape[0] > 0 and t.stride(1) == 1
        for t in tensors
    )


def by_pointers(tile: Tile) -> Tile:
    """What runs instead of a "tma" tile where the copy engine can't address: few enough registers for every block."""
    return dataclasses.replace(tile, variant="gather", bm=min(tile.bm, 128), warps=8, stages=min(tile.stages, 3))
