"""Layer-wise sparsity allocation: from one global sparsity to a density, then a block count, per layer.

``allocate`` and ``block_counts`` need no torch; the score-based schemes load it on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .blocks import CountReport, block_counts, count_report
from .schemes import SCHEMES
from .targets import SCORE_SCHEMES, allocate

if TYPE_CHECKING:
    from .from_scores import densities_from_scores
    from .scores import compute_scores

__all__ = [
    "SCHEMES",
    "SCORE_SCHEMES",
    "CountReport",
    "allocate",
    "block_counts",
    "compute_scores",
    "count_report",
    "densities_from_scores",
]


def __getattr__(name: str) -> Any:
    if name == "compute_scores":
        from .scores import compute_scores

        return compute_scores
    if name == "densities_from_scores":
        from .from_scores import densities_from_scores

        return densities_from_scores
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
