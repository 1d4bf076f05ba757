"""Random numbers of topology updates: a stream per layer, update and purpose, equal in every process.

Nothing is carried over from one update to the next, so a resumed run needs the number of the update only, and the
ranks of a data-parallel run draw the same numbers without talking to each other.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


class Stream:
    """Random numbers for one purpose (``"drop"``, ``"grow"``, ...) in one update of one layer."""

    def __init__(self, seed: int, layer: str, update: int, purpose: str) -> None:
        digest = hashlib.sha256(f"{seed}:{layer}:{update}:{purpose}".encode()).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))

    def integer(self, below: int) -> int:
        """Uniform within 0..below-1."""
        return int(self._generator.integers(below))

    def subset(self, total: int, count: int) -> np.ndarray:
        """int64 [count], ascending: a uniform subset of 0..total-1."""
        picked = self._generator.choice(total, count, replace=False, shuffle=False)
        return np.sort(picked.astype(np.int64))

    def uniform(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """float32 [count] within [0, 1)."""
        return torch.from_numpy(self._generator.random(count, dtype=np.float32)).to(device, non_blocking=True)

    def normal(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """float32 [count], standard normal."""
        return torch.from_numpy(self._generator.standard_normal(count, dtype=np.float32)).to(device, non_blocking=True)
