"""Step times of several nets, measured so that they can be compared.

Within one process, on the same real batches, the nets take turns in short rounds; each round gives every net its
median and its ratio to the first net. A machine that slows down or speeds up then moves all nets alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsekern.training.config import TrainConfig
from sparsekern.training.optim import make_optimizer
from sparsekern.training.schedules import set_lr
from sparsekern.training.step import PHASES, Step

ROUNDS = 12
ROUND_SECONDS = 0.1


@dataclass
class StepTime:
    """Medians over rounds, in seconds.

    Attributes:
        total, forward, backward, optimizer: of one step; forward includes the loss, optimizer the zeroing.
        topology: always 0: the nets are timed between updates, whose cost is in the result of their run.
        low, high: quartiles of total over rounds.
        speedup: median over rounds of (time of the first net / time of this one).
        rounds, steps: rounds, and timed steps in each.
    """

    total: float
    forward: float
    backward: float
    optimizer: float
    low: float
    high: float
    speedup: float
    rounds: int
    steps: int
    topology: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def time_steps(
    nets: Mapping[str, tuple[nn.Module, TrainConfig]],
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    rounds: int = ROUNDS,
    round_seconds: float = ROUND_SECONDS,
) -> dict[str, StepTime]:
    """Time training steps of ``nets``; the first one is the reference of ``speedup``.

    The learning rate is 0: a step does the work of any other and leaves the weights as they were.

    Args:
        nets: ``{name: (model, config)}``.
        batches: real batches, used in turn, the same for every net.
        rounds: at least 3; each net's turn starts with one untimed step.
        round_seconds: aim for one turn of the fastest net.
    """
    if rounds < 3:
        raise ValueError(f"rounds: expected 3 or more, got {rounds}")
    steps: dict[str, Step] = {}
    for name, (model, config) in nets.items():
        optimizer = make_optimizer(model, config)
        set_lr(optimizer, 0.0)
        steps[name] = Step(model.train(), optimizer, config, synchronize=True)
    ready = [next(iter(steps.values())).to_device(x, y) for x, y in batches]
    fastest = min(_fastest(step, ready) for step in steps.values())
    count = max(1, min(50, round(round_seconds / fastest)))
    names = list(steps)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for index in range(rounds):
        # Rotated, so that no net always follows the same one.
        for name in names[index % len(names) :] + names[: index % len(names)]:
            turns[name].append(_turn(steps[name], ready, index * count, count))
    return {name: _summary(turns[name], turns[names[0]], count) for name in names}


def _fastest(step: Step, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    step(*batches[0])
    return max(1e-6, min(sum(step(x, y).seconds) for x, y in (batches[i % len(batches)] for i in range(3))))


def _turn(step: Step, batches: Sequence[tuple[Tensor, Tensor]], start: int, count: int) -> dict[str, float]:
    """Medians of ``count`` steps after an untimed one, which brings this net's weights back into the caches."""
    step(*batches[start % len(batches)])
    rows = [step(*batches[(start + i) % len(batches)]).seconds for i in range(count)]
    medians = {phase: statistics.median(row[i] for row in rows) for i, phase in enumerate(PHASES)}
    return {**medians, "total": statistics.median(sum(row) for row in rows)}


def _summary(turns: list[dict[str, float]], reference: list[dict[str, float]], steps: int) -> StepTime:
    totals = [turn["total"] for turn in turns]
    low, _, high = statistics.quantiles(totals, n=4)
    return StepTime(
        total=statistics.median(totals),
        **{phase: statistics.median(turn[phase] for turn in turns) for phase in PHASES},
        low=low,
        high=high,
        speedup=statistics.median(r["total"] / t["total"] for t, r in zip(turns, reference, strict=True)),
        rounds=len(turns),
        steps=steps,
    )
