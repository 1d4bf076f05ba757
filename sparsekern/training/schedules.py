"""Learning-rate schedules as pure functions of the step, so that resuming needs the step number only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer

Factor = Callable[[int], float]


def linear(step: int, total: int) -> float:
    """``1 - step / total``."""
    return max(0.0, 1.0 - step / total)


def cosine(step: int, total: int) -> float:
    """``(1 + cos(pi * step / total)) / 2`` (SGDR without restarts, arXiv:1608.03983, equation 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * min(step, total) / total))


def schedule(
    name: str,
    total: int,
    *,
    warmup: int = 0,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> Factor:
    """Factor on the base rate for step 0, 1, ..., total - 1.

    Args:
        name: step, cosine, constant or linear.
        total: steps of the run.
        warmup: steps of linear warm-up, factor ``(step + 1) / warmup``; cosine and linear decay span what is left.
        milestones: fractions of the whole run, warm-up included, at which ``step`` multiplies by ``gamma``.

    Raises:
        ValueError: an unknown name.
    """
    drops = [round(fraction * total) for fraction in milestones]
    rest = max(1, total - warmup)
    decays: dict[str, Factor] = {
        "step": lambda step: gamma ** sum(step >= drop for drop in drops),
        "cosine": lambda step: cosine(step - warmup, rest),
        "linear": lambda step: linear(step - warmup, rest),
        "constant": lambda step: 1.0,
    }
    if name not in decays:
        raise ValueError(f"schedule: expected one of {', '.join(decays)}, got {name!r}")
    decay = decays[name]
    return lambda step: (step + 1) / warmup if step < warmup else decay(step)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
