"""Numbers over many rows: geometric means, break-even densities, what changed against a base."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sparsekern.report.results import PassRow

Row = TypeVar("Row")


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log)), the mean that ratios need: 2x and 0.5x make 1x. Raises ``ValueError`` without values."""
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("geometric mean: expected at least one value, got none")
    return math.exp(math.fsum(logs) / len(logs))


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by key, keys in order of appearance."""
    out: dict[Any, list[Row]] = {}
    for row in rows:
        out.setdefault(key(row), []).append(row)
    return out


@dataclass(frozen=True)
class Mean:
    """Geometric means over the shapes of one kind of row at one block and sparsity."""

    speedup: float
    of_ideal: float
    rows: int
    losing: int

    @classmethod
    def of(cls, rows: Sequence[PassRow]) -> Mean:
        return cls(
            geometric_mean(row.speedup for row in rows),
            geometric_mean(row.of_ideal for row in rows),
            len(rows),
            sum(row.loses for row in rows),
        )


def break_even(points: Sequence[tuple[float, float]]) -> tuple[float | None, str]:
    """The density at which sparse and dense take equal time.

    Args:
        points: ``(density, speedup)`` of one layer kind; the line between neighbours is straight in log-log.

    Returns:
        ``(density, text)``; the density is None where the measured range holds no crossing, and the text says which
        side of 1 the range is on. With several crossings, the one of least density: below it sparse wins throughout.
    """
    line = sorted(points)
    if not line:
        return None, "not measured"
    if line[0][1] < 1.0:
        return None, f"< {line[0][0]:.3g}"
    for (d0, s0), (d1, s1) in itertools.pairwise(line):
        if s0 >= 1.0 > s1:
            share = math.log(s0) / (math.log(s0) - math.log(s1))
            density = math.exp(math.log(d0) + share * (math.log(d1) - math.log(d0)))
            return density, f"{density:.3g}"
    return None, f"> {line[-1][0]:.3g}"


def main_shape(rows: Sequence[PassRow]) -> str:
    """The shape with the most rows, the one that was swept."""
    return Counter(row.shape for row in rows).most_common(1)[0][0]


@dataclass(frozen=True)
class Change:
    """One row against the same row of a base run."""

    base: PassRow
    head: PassRow

    @property
    def factor(self) -> float:
        """Speed-up over dense now / then; dense was timed beside it in both, so the machine's mood cancels."""
        return self.head.speedup / self.base.speedup


def changes(base: Sequence[PassRow], head: Sequence[PassRow]) -> dict[tuple[object, ...], Change]:
    """Rows that both runs hold, by key."""
    before = {row.key: row for row in base}
    return {row.key: Change(before[row.key], row) for row in head if row.key in before}
