"""Packed element masks: which elements inside stored blocks learn, one bit each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def unpack(bits: Tensor, block: tuple[int, int]) -> Tensor:
    """uint8 [capacity, ceil(bo*bi/8)], lowest bit first, to bool [capacity, bo, bi]."""
    bo, bi = block
    spread = bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (spread & 1).flatten(1)[:, : bo * bi].reshape(-1, bo, bi).bool()


def pack(mask: Tensor) -> Tensor:
    """Inverse of :func:`unpack`."""
    flat = mask.flatten(1).to(torch.uint8)
    flat = F.pad(flat, (0, -flat.shape[1] % 8)).reshape(flat.shape[0], -1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1).to(torch.uint8)
