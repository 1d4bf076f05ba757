"""Whole training steps: dense, sparse, and a narrower dense net of the sparse net's MACs, interleaved."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from benchmarks import machine
from benchmarks.shapes import TrainCase
from benchmarks.timing import CLOCK, Effort, Timer, race, speedup
from sparsekern import models

PARTS = ("forward", "loss", "backward", "optimizer")


class TrainingStep:
    """One SGD step on random images; remembers the seconds of its parts.

    Args:
        model: any classifier of images [B, C, H, W].
        images, labels: the batch, the same at every step.
        timer: gives the marks between the parts.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, timer: Timer) -> None:
        self.model, self.images, self.labels, self.timer = model.train(), images, labels, timer
        # So small a rate leaves the weights alone, but not the work: nothing diverges over many steps.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)
        self.parts: list[dict[str, float]] = []
        self.first_loss = math.nan

    def __call__(self) -> float:
        mark = self.timer.mark
        marks = [mark()]
        logits = self.model(self.images)
        marks.append(mark())
        loss = F.cross_entropy(logits, self.labels)
        marks.append(mark())
        loss.backward()
        marks.append(mark())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(mark())
        pairs = zip(PARTS, marks[:-1], marks[1:], strict=True)
        self.parts.append({part: self.timer.seconds(start, end) for part, start, end in pairs})
        if math.isnan(self.first_loss):
            self.first_loss = float(loss.detach())
        return float(loss.detach())

    def summary(self, samples: list[float]) -> dict[str, Any]:
        """Median seconds of the step and of its parts over the timed rounds, and what the step keeps in memory."""
        timed = self.parts[-len(samples) :]
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        parameters = list(self.model.parameters())
        return {
            "median_s": statistics.median(samples),
            "parts_s": {part: statistics.median(step[part] for step in timed) for part in PARTS},
            "params": models.count_params(self.model),
            "macs": sum(models.count_macs(self.model, self.images[:1]).values()),
            "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "optimizer_bytes": sum(t.numel() * t.element_size() for t in state),
        }


@pytest.mark.benchmark(timer=CLOCK)
def test_train_step(
    train_case: TrainCase,
    benchmark: Any,
    timer: Timer,
    effort: Effort,
    with_threads: Callable[[int], None],
    device: str,
) -> None:
    case = train_case
    with_threads(case.threads)
    torch.manual_seed(0)
    images = torch.randn(case.batch, *case.in_shape).to(device)
    labels = torch.randint(0, 10, (case.batch,)).to(device)
    dense = models.build(case.model, in_shape=case.in_shape).to(device)
    sparse = models.build(case.model, in_shape=case.in_shape).to(device)
    toy = case.batch < 32  # nothing pays at toy sizes, and a plan that leaves all dense would test nothing
    config = sk.SparsityConfig(
        sparsity=case.sparsity / 100, block=case.block or "auto", below_break_even="sparse" if toy else "dense"
    )
    plan = sk.sparsify_(sparse, config, example_input=images)
    target = sum(models.count_macs(sparse, images[:1]).values())
    width, narrow = models.match_macs(case.model, target, in_shape=case.in_shape)

    steps = {
        name: TrainingStep(model, images, labels, timer)
        for name, model in {"dense": dense, "narrow": narrow.to(device), "sparse": sparse}.items()
    }
    benchmark.group = "train step"
    neighbours = machine.Neighbours()
    times = race(benchmark, timer, steps, hero="sparse", effort=effort, repeat_short=False)
    layers: dict[str, int] = {}
    for layer in plan.layers:
        layers[layer.state] = layers.get(layer.state, 0) + 1
    benchmark.extra_info.update(
        kind="train",
        op="train step",
        pass_="train",
        model=case.model,
        shape=f"{case.model} batch {case.batch}",
        memory_format="nchw",
        block=case.block or "auto",
        sparsity=case.sparsity,
        dtype="float32",
        device=device,
        threads=case.threads,
        narrow_width=width,
        layers=layers,
        contenders={name: step.summary(times[name]) for name, step in steps.items()},
        **speedup(times["dense"], times["sparse"]),
        narrow_speedup=speedup(times["dense"], times["narrow"])["speedup"],
        neighbours=neighbours.cores(),
    )
    for name, step in steps.items():
        assert math.isfinite(step.first_loss) and step.first_loss > 0, f"{name}: loss {step.first_loss}"
    assert any(layer.state == "sparse" for layer in plan.layers) or not toy
