"""Interleaved timing under pytest-benchmark.

All contenders of a case run in one process, once per round, in alternating order, so that a slow phase of the
machine meets all of them. pytest-benchmark times one of them through a *virtual clock*, which only that one
advances. With such a clock only ``pedantic`` may be used: the calibrated mode asks it for its precision and
waits for it to move.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

MIN_ROUNDS = 3
_LARGE_L2 = 128 << 20  # where the device does not say
MIN_SAMPLE_S = 2e-3  # shorter calls are repeated within a sample: below it, call-to-call noise passed 5 %


class VirtualClock:
    """A timer for pytest-benchmark that moves by what :func:`race` adds to it."""

    __name__ = "virtual clock"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = VirtualClock()


class Timer(Protocol):
    """Points in time on a device and the seconds between them."""

    repeats_short: bool  # whether short calls may be averaged over several in a row, operands warm in cache

    def prepare(self) -> None:
        """Called before each sample, outside the timed section."""

    def mark(self) -> Any:
        """A point in time, in the order of the work handed to the device."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks; waits for the later one."""


class CpuTimer:
    """Wall time. Caches stay as the contender before left them: large operands do not fit, small ones are warm."""

    repeats_short = True

    def prepare(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaTimer:
    """Device time between two events on the current stream, every sample with a cold L2.

    ``prepare`` queues two things and waits for neither: a write over a buffer larger than L2, and a spin that keeps the
    device busy while the host queues the timed calls. The events then hold device time, not launch gaps, as long as
    queueing takes less than the spin.

    Args:
        cuda: ``torch.cuda`` or a stand-in.
        l2_bytes: size of the L2 cache; None asks the device.
        spin_cycles: length of the spin in clock cycles, half a millisecond at 2 GHz.
    """

    repeats_short = False

    def __init__(self, cuda: Any = torch.cuda, *, l2_bytes: int | None = None, spin_cycles: int = 1_000_000) -> None:
        self.cuda, self.spin_cycles = cuda, spin_cycles
        if l2_bytes is None:
            l2_bytes = int(getattr(cuda.get_device_properties(0), "L2_cache_size", 0)) or _LARGE_L2
        device = "cuda" if cuda is torch.cuda else "cpu"
        self.scratch = torch.zeros(4 * l2_bytes, dtype=torch.uint8, device=device)

    def prepare(self) -> None:
        self.scratch.zero_()
        self.cuda._sleep(self.spin_cycles)

    def mark(self) -> Any:
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class Plain:
    """Stands for the fixture of pytest-benchmark outside pytest: rounds without statistics of its own."""

    def pedantic(self, target: Callable[[], object], rounds: int) -> None:
        for _ in range(rounds):
            target()


@dataclass(frozen=True)
class Effort:
    """How long a case may take: at most ``rounds`` rounds, fewer (not below 3) when ``budget_s`` seconds would pass."""

    rounds: int
    budget_s: float
    disabled: bool = False


def sample(timer: Timer, contender: Callable[[], object], loops: int) -> float:
    """Seconds of one call, averaged over ``loops`` calls in a row."""
    timer.prepare()
    start = timer.mark()
    for _ in range(loops):
        contender()
    return timer.seconds(start, timer.mark()) / loops


def race(
    benchmark: Any,
    timer: Timer,
    contenders: Mapping[str, Callable[[], object]],
    *,
    hero: str,
    effort: Effort,
    repeat_short: bool = True,
) -> dict[str, list[float]]:
    """Time all contenders in interleaved rounds; pytest-benchmark's own statistics hold the ``hero``.

    Args:
        benchmark: the fixture of pytest-benchmark, whose marker must carry ``timer=CLOCK``.
        timer: timer of the device.
        contenders: name to a call without arguments.
        hero: the contender that pytest-benchmark records.
        effort: limits of the case; ``disabled`` runs everything exactly once, untimed.
        repeat_short: average calls under 2 ms over several in a row where the timer allows it (off for training steps,
            which keep state).

    Returns:
        Seconds per call of each contender, one number per round; index ``k`` is the same round for all.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    if effort.disabled:
        for name, contender in contenders.items():
            times[name].append(sample(timer, contender, 1))
        benchmark.pedantic(lambda: None, rounds=1)
        return times

    first = {name: sample(timer, contender, 1) for name, contender in contenders.items()}  # warm-up
    loops = dict.fromkeys(contenders, 1)
    if not timer.repeats_short:  # a first call on a GPU loads libraries: it says nothing about the rounds to come
        first = {name: sample(timer, contender, 1) for name, contender in contenders.items()}
    elif repeat_short:
        for name, contender in contenders.items():
            warm = sample(timer, contender, 1) if first[name] < MIN_SAMPLE_S else first[name]
            loops[name] = max(1, math.ceil(MIN_SAMPLE_S / max(warm, 1e-7)))
    per_round = sum(max(seconds, MIN_SAMPLE_S) for seconds in first.values())
    rounds = max(MIN_ROUNDS, min(effort.rounds, int(effort.budget_s / per_round)))
    order = list(contenders)

    def one_round() -> None:
        order.reverse()
        for name in order:
            times[name].append(sample(timer, contenders[name], loops[name]))
        CLOCK.now += times[hero][-1]

    benchmark.pedantic(one_round, rounds=rounds)
    return times


def wall_times(
    calls: Mapping[str, Callable[[], object]], synchronize: Callable[[], None], rounds: int
) -> dict[str, list[float]]:
    """Seconds from each call to the end of its work, host included, in interleaved rounds after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in reversed(calls) if turn % 2 else calls:
            synchronize()
            start = time.perf_counter()
            calls[name]()
            synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def quartiles(samples: list[float]) -> tuple[float, float]:
    """First and third quartile (inclusive method); the value itself twice for a single sample."""
    if len(samples) < 2:
        return samples[0], samples[0]
    q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return q1, q3


def speedup(baseline: list[float], contender: list[float]) -> dict[str, float]:
    """Median of the per-round ratios ``baseline / contender`` with its quartiles.

    The median of ratios is not the ratio of medians: within a round both met the same machine.
    """
    ratios = [b / c for b, c in zip(baseline, contender, strict=True)]
    q1, q3 = quartiles(ratios)
    return {"speedup": statistics.median(ratios), "speedup_q1": q1, "speedup_q3": q3}
