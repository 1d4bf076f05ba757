"""How many channels of each group stay."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping

from sparsekern.pruning.structured.graph import Group

Ratios = float | Mapping[str, float]
ROUNDING = 1e-6  # 10 * (1 - 0.9) is below 1


def kept_count(channels: int, ratio: float) -> int:
    """``floor(channels * (1 - ratio))``, at least 1, as the published targets round."""
    return max(1, math.floor(channels * (1 - ratio) + ROUNDING))


def kept_count_soft(channels: int, ratio: float) -> int:
    """``channels - floor(channels * ratio)``: soft filter pruning rounds the number that goes (He et al. 2018)."""
    return channels - min(channels - 1, math.floor(channels * ratio + ROUNDING))


def check_ratio(ratio: float, what: str = "ratios") -> float:
    """``ratio`` as a float; ``ValueError`` unless it is within [0, 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError(f"{what}: expected the fraction of channels removed, from 0 to below 1, got {ratio!r}")
    return float(ratio)


def layer_ratios(ratios: Ratios, groups: Mapping[str, Group]) -> dict[str, float]:
    """Fraction removed of each group; groups that no glob matches keep all.

    Args:
        ratios: one fraction for all, or ``{glob of layer names: fraction}``, of which the last match counts. A glob
            matches a group by any of the layers that write its channels.
        groups: the groups to choose from.

    Raises:
        ValueError: a fraction out of range, or a glob that matches nothing.
    """
    if not isinstance(ratios, Mapping):
        return dict.fromkeys(groups, check_ratio(ratios))
    chosen = dict.fromkeys(groups, 0.0)
    for glob, ratio in ratios.items():
        check_ratio(ratio, f"ratios[{glob!r}]")
        matches = [name for name, g in groups.items() if any(fnmatch.fnmatchcase(p, glob) for p in g.producers)]
        if not matches:
            raise ValueError(f"ratios: expected globs of {_some(groups)}, got {glob!r}, which matches none of them")
        chosen.update(dict.fromkeys(matches, float(ratio)))
    return chosen


def _some(groups: Mapping[str, Group]) -> str:
    names = list(groups)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "prunable layers (there are none)"
