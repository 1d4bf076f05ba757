"""In-time over-parameterization (Liu et al. 2021): how much of a network was ever trained.

The exploration rate R_s is the share of weights that were stored at any time so far (their equation 1). A block
counts as reliably explored once it has been through an update and was kept: grown blocks that the next update drops
again had no time to grow past the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from sparsekern.topology.layer import Layer


def begin(layer: Layer) -> None:
    """Start counting with the blocks stored now."""
    layer.explored = layer.stored()
    layer.reliable = torch.zeros_like(layer.explored)


def record(layer: Layer, kept: Tensor, now: Tensor) -> None:
    """Count an update: bool [blocks], what it ``kept``, and what is stored ``now``."""
    layer.reliable |= kept
    layer.explored |= now


def weights(layer: Layer, blocks: Tensor) -> int:
    """Weights inside ``blocks`` bool [blocks], padding not counted (host sync)."""
    return int(layer.elements_of_block[blocks.cpu()].sum())


def rate(layers: Iterable[Layer], which: str = "explored") -> float:
    """Share of the layers' weights that are ``explored`` or ``reliable``."""
    layers = list(layers)
    total = sum(int(layer.elements_of_block.sum()) for layer in layers)
    return sum(weights(layer, getattr(layer, which)) for layer in layers) / total


def pack(blocks: Tensor) -> Tensor:
    """bool [blocks] to uint8 bits, for state dicts."""
    return torch.from_numpy(np.packbits(blocks.cpu().numpy()))


def unpack(packed: Tensor, blocks: int, device: torch.device) -> Tensor:
    """Inverse of :func:`pack`."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=blocks).astype(bool)).to(device)
