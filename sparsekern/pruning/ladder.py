"""Iterative pruning: every level of the ladder removes the same fraction of what is left.

The ladder of the lottery-ticket papers (Frankle and Carbin 2019, arXiv 1803.03635) and of sparse double descent (He et
al. 2022, arXiv 2206.08684): 20 % a level, so that level k has sparsity ``1 - 0.8^k``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsekern.plan import Plan

from .layers import INCLUDE, alive, prunable
from .prune import prune_


@dataclass(frozen=True)
class Level:
    """One level of the ladder.

    Attributes:
        number: 0 is the unpruned model.
        fraction: of the remaining weights, what each level removes.
    """

    number: int
    fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"level: expected 0 and more, got {self.number}")
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(f"fraction: expected a number within (0, 1), got {self.fraction}")

    @property
    def sparsity(self) -> float:
        """``1 - (1 - fraction)^number``; :meth:`remaining` has the exact count."""
        return 1.0 - (1.0 - self.fraction) ** self.number

    def remaining(self, weights: int) -> int:
        """Weights left of ``weights``: each level removes ``round(fraction * rest)``, at least one stays."""
        for _ in range(self.number):
            weights = max(weights - round(self.fraction * weights), 1)
        return weights


@dataclass(frozen=True)
class Pruned:
    """What :func:`iterate` did at one level.

    Attributes:
        level: the level.
        weights: of the pruned layers before any pruning.
        kept: of these, how many are left.
        plan: of the pruning; None at level 0.
    """

    level: Level
    weights: int
    kept: int
    plan: Plan | None

    @property
    def sparsity(self) -> float:
        return 1.0 - self.kept / self.weights


def levels(first: int, last: int, fraction: float = 0.2) -> Iterator[Level]:
    """The levels ``first`` to ``last``, both included.

    Raises:
        ValueError: ``first`` below 0 or above ``last``, or a fraction outside (0, 1).
    """
    if not 0 <= first <= last:
        raise ValueError(f"levels: expected 0 <= first <= last, got {first} and {last}")
    Level(first, fraction)
    return (Level(number, fraction) for number in range(first, last + 1))


def remaining(weights: int, level: int, fraction: float = 0.2) -> int:
    """Of ``weights``, how many are left at a level."""
    return Level(level, fraction).remaining(weights)


def prune_level_(
    model: nn.Module, level: Level | int, criterion: str | Mapping[str, Tensor] = "magnitude", **options: Any
) -> Plan:
    """Prune a model in place to a level of the ladder.

    Counted from all weights of the pruned layers, so a level may be resumed or skipped; from the level before, it
    removes exactly ``round(fraction * rest)`` weights (with blocks above 1x1, to the nearest block).

    Args:
        level: a :class:`Level`, or its number at 20 % a level.
        criterion, options: those of :func:`prune_` but ``sparsity``.

    Raises:
        ValueError: as :func:`prune_`; the model has fewer weights already.
    """
    level = Level(level) if isinstance(level, int) else level
    weights, _ = _counts(model, criterion, options)
    return prune_(model, 1.0 - level.remaining(weights) / weights, criterion, **options)


def iterate(
    model: nn.Module,
    levels: Iterable[Level | int],
    criterion: str | Mapping[str, Tensor] = "magnitude",
    train_fn: Callable[[nn.Module, Level], Any] | None = None,
    *,
    after: Callable[[nn.Module, Level], Any] | None = None,
    **options: Any,
) -> list[Pruned]:
    """Down the ladder in place: at each level prune, call ``after``, then train.

    Pruning goes by the weights that the level before has trained. A first level above 0 prunes the model as it comes,
    so train it before, or start at level 0, which only trains.

    Args:
        levels: from :func:`levels`, ascending.
        criterion: of every level. ``batches`` among the options must give its pairs anew at each.
        train_fn: ``train_fn(model, level)`` trains in place. Parameters of pruned layers are new at every level, so
            it builds its optimizer itself.
        after: ``after(model, level)`` runs between pruning and training: rewind, reinitialise, or nothing (fine-tune).
        options: those of :func:`prune_` but ``sparsity``.

    Returns:
        One record per level.

    Raises:
        ValueError: levels that do not ascend, or as :func:`prune_`.
    """
    out: list[Pruned] = []
    for item in levels:
        level = Level(item) if isinstance(item, int) else item
        if out and level.number <= out[-1].level.number:
            raise ValueError(f"levels: expected ascending levels, got {level.number} after {out[-1].level.number}")
        plan = None
        if level.number:
            plan = prune_level_(model, level, criterion, **options)
            if after is not None:
                after(model, level)
        if train_fn is not None:
            train_fn(model, level)
        weights, kept = _counts(model, criterion, options)
        out.append(Pruned(level, weights, kept, plan))
    return out


def _counts(model: nn.Module, criterion: str | Mapping[str, Tensor], options: Mapping[str, Any]) -> tuple[int, int]:
    names = options.get("names") or (list(criterion) if isinstance(criterion, Mapping) else None)
    living = [alive(c) for c in prunable(model, names, options.get("include", INCLUDE), options.get("exclude", ()))]
    return sum(mask.numel() for mask in living), sum(int(mask.count_nonzero()) for mask in living)
