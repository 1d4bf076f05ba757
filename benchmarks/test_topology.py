"""What moving blocks costs: a topology update relative to the training steps between two updates.

Copies of one sparse net take turns: one whose blocks stay, and one that updates after every step. Their difference is
an update with all it needs, the gradient norms of RigL's backward included; a run has one per ``UPDATE_EVERY`` steps.
"""

from __future__ import annotations

import copy
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
from benchmarks.shapes import TopologyCase
from benchmarks.timing import CLOCK, Effort, Timer, quartiles, race
from sparsekern import models, topology
from sparsekern.backends import forced, select
from sparsekern.nn import SparseModule

UPDATE_EVERY = 100
LONG = 1_000_000  # steps of a run so long that its schedules stand still


class Step:
    """One SGD step, then the topology's.

    Args:
        model: changed in place.
        images, labels: the batch, the same at every step.
        method: a topology method; None leaves the blocks where they are.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, method: topology.Method | None) -> None:
        self.model, self.images, self.labels = model.train(), images, labels
        # So small a rate leaves the weights alone, but not the work: nothing diverges over many steps.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)
        self.topology = sk.TopologyScheduler(model, self.optimizer, method, LONG) if method is not None else None
        self.calls, self.loss = 0, math.nan

    def __call__(self) -> None:
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        if self.topology is not None:
            self.topology.step()
        self.optimizer.zero_grad()
        self.calls += 1
        self.loss = float(loss.detach())


def make_method(name: str, update_every: int, blocks: dict[str, int]) -> topology.Method:
    """The method of a case; gradual pruning goes so slowly that the density stays where the others have it.

    Args:
        blocks: stored ones by layer.
    """
    if name == "gradual":
        return topology.method("gradual", update_every=update_every, targets={n: -(-k // 2) for n, k in blocks.items()})
    kind, _, variant = name.partition(" ")
    options = {"exact": True} if variant == "exact" else {}
    return topology.method(kind, update_every=update_every, stop_fraction=1.0, **options)


@pytest.mark.benchmark(timer=CLOCK)
def test_topology(
    topology_case: TopologyCase,
    benchmark: Any,
    timer: Timer,
    effort: Effort,
    with_threads: Callable[[int], None],
    device: str,
) -> None:
    case = topology_case
    with_threads(case.threads)
    torch.manual_seed(0)
    images = torch.randn(case.batch, *case.in_shape).to(device)
    labels = torch.randint(0, 10, (case.batch,)).to(device)
    net = models.build(case.model, in_shape=case.in_shape).to(device)
    kind = case.method.partition(" ")[0]
    pattern = "fan_in" if kind == "srigl" else "random"
    config = sk.SparsityConfig(
        sparsity=case.sparsity / 100, block=case.block, below_break_even="sparse", pattern=pattern,
        capacity=1.5 if topology.METHODS[kind].redistributes else 1.0,
    )  # fmt: skip
    sk.sparsify_(net, config, example_input=images)
    blocks = {name: m.layout.nnz for name, m in net.named_modules() if isinstance(m, SparseModule)}

    def step(update_every: int | None) -> Step:
        method = None if update_every is None else make_method(case.method, update_every, blocks)
        return Step(copy.deepcopy(net), images, labels, method)

    momentum = case.method == "snfs momentum"
    # Between updates SNFS pays for its momentum too: that is not part of an update.
    steps = {"plain": step(LONG if case.method == "snfs" else None), "update": step(LONG if momentum else 1)}
    benchmark.group = "topology update"
    neighbours = machine.Neighbours()
    times = race(benchmark, timer, steps, hero="update", effort=effort, repeat_short=False)
    every = 1 if momentum else UPDATE_EVERY
    pairs = list(zip(times["plain"], times["update"], strict=True))
    shares = [(update - plain) / (every * plain) for plain, update in pairs]
    q1, q3 = quartiles(shares)
    plain_s = statistics.median(times["plain"])
    layer = next(m for m in net.modules() if isinstance(m, SparseModule))
    operation = "conv2d" if layer.grid.kernel_size != (1, 1) or len(layer.grid.weight_shape) == 4 else "linear"
    benchmark.extra_info.update(
        kind="overhead",
        what="dense gradient of every step, snfs" if momentum else f"topology update, {case.method}",
        op="net",
        shape=f"{case.model} batch {case.batch}",
        pass_="step",
        block=case.block,
        sparsity=case.sparsity,
        seconds=statistics.median(update - plain for plain, update in pairs),
        base_s=every * plain_s,
        step_s=plain_s,
        share=statistics.median(shares),
        share_q1=q1,
        share_q3=q3,
        update_every=every,
        backend=str(select(operation, layer.values, layer.block).__name__).rpartition(".")[2],
        mode=forced(),
        device=device,
        threads=case.threads,
        stored_blocks=sum(blocks.values()),
        neighbours=neighbours.cores(),
    )
    moved = steps["update"].topology
    assert moved is not None and moved.updates == (0 if momentum else steps["update"].calls)
    for name, one in steps.items():
        assert math.isfinite(one.loss) and one.loss > 0, f"{name}: loss {one.loss}"
    if not momentum and kind not in ("gradual", "dsr"):  # those two move few blocks at first
        assert moved.exploration_rate() > sum(blocks.values()) / sum(m.grid.blocks for m in moved.layers.values())
