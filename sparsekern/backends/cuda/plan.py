"""How a CUDA kernel is cut: the Python twin of ``ProductPlan`` and ``WgradPlan`` (csrc/cuda/problem.h)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """One way to cut a pass.

    Attributes:
        family: forward and dgrad: "stationary" (activations of a tile stay in shared memory) or "streamed"; "wgrad".
        tile: images x rows x columns of output pixels; tokens x 1 x 1 of a linear layer.
        warps, stages: of one block (CTA); stages of its ring.
        splits: stationary: blocks that share the block rows of one tile; wgrad: parts of the pixels.
        rows, cols: wgrad: block rows and columns of one window, all taps; else 0.
    """

    family: str
    tile: tuple[int, int, int]
    warps: int
    stages: int
    splits: int = 1
    rows: int = 0
    cols: int = 0

    @property
    def bm(self) -> int:
        """Pixels or tokens of one tile."""
        return math.prod(self.tile)

    def __str__(self) -> str:
        pixels = "x".join(map(str, self.tile))
        window = f", windows of {self.rows}x{self.cols} blocks" if self.family == "wgrad" else ""
        return f"{self.family} plan {pixels}{window}, {self.warps} warps, {self.stages} stages, {self.splits} splits"
