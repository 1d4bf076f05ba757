"""Every topology method, step by step beside the same method on masked dense weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import topology
from sparsekern.nn import SparseModule

from .topology_reference import OPTIMIZERS, Reference, batch, block_masks, network

STEPS = 40


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the nets are tiny


@dataclass
class Case:
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    block: int = 8
    optimizer: str = "sgd"
    micro: int = 1
    dtype: torch.dtype = torch.float64
    capacity: float = 1.0
    density: float = 0.3

    def __str__(self) -> str:
        short = {key: value for key, value in self.options.items() if key not in ("update_every", "targets")}
        options = ",".join(f"{key}={value}" for key, value in short.items())
        extra = "" if self.micro == 1 else f"-micro{self.micro}"
        extra += "" if self.capacity == 1.0 else f"-capacity{self.capacity}"
        extra += "" if self.dtype == torch.float64 else "-float32"
        return f"{self.method}-{options or 'default'}-{self.block}-{self.optimizer}{extra}"


class Pair:
    """The sparse run and its masked-dense twin."""

    def __init__(self, case: Case) -> None:
        self.case = case
        dense = network(case.dtype)
        masks = block_masks(dense, case.block, case.density)
        self.net = copy.deepcopy(dense)
        cfg = sk.SparsityConfig(block=case.block, below_break_even="sparse", capacity=case.capacity)
        sk.sparsify_(self.net, cfg, masks=masks)
        self.optimizer = OPTIMIZERS[case.optimizer](self.net.parameters())
        method = topology.method(case.method, **case.options)
        self.topo = sk.TopologyScheduler(self.net, self.optimizer, method, STEPS, seed=7)
        capacities = {name: layer.capacity for name, layer in self.topo.layers.items()}
        self.ref = Reference(dense, masks, case.block, case.method, case.options, STEPS, 7, capacities)
        self.ref.attach(OPTIMIZERS[case.optimizer](dense.parameters()))

    def step(self, number: int) -> None:
        x, y = batch(number, self.case.dtype)
        for net in (self.net, self.ref.net):
            for part, labels in zip(x.chunk(self.case.micro), y.chunk(self.case.micro)):
                (nn.functional.cross_entropy(net(part), labels) / self.case.micro).backward()
                if net is self.net:
                    self.topo.step()  # no optimizer step yet: does nothing
        for optimizer, topo in ((self.optimizer, self.topo), (self.ref.optimizer, self.ref)):
            optimizer.step()
            topo.step()
            optimizer.zero_grad()

    def check(self, number: int) -> None:
        bound = 1e-10 if self.case.dtype == torch.float64 else 1e-4
        for name, twin in self.ref.layers.items():
            module, weight = self.net.get_submodule(name), twin.module.dense.weight
            assert isinstance(module, SparseModule)
            where = f"step {number}, layer {name}"
            differing = int((module.mask != twin.module.mask).sum())
            assert differing == 0, f"{where}: masks differ in {differing} of {twin.module.mask.numel()} weights"
            state, expected = self.optimizer.state[module.values], self.ref.optimizer.state[weight]
            rows = {"values": (module.values.detach(), weight.detach())}
            rows |= {key: (state[key], expected[key]) for key in expected if expected[key].shape == weight.shape}
            assert len(rows) == (2 if self.case.optimizer == "sgd" else 3)
            for what, (own, other) in rows.items():
                dense = module.layout.to_dense(own)
                error = (dense - other).abs().max()
                assert error <= bound * other.abs().max(), f"{where}: {what} off by {error:.2e} of {other.abs().max()}"
                assert torch.equal(module.layout.from_dense(dense), own), f"{where}: {what}: spare or padding not zero"
            assert self.topo.layers[name].nnz == module.layout.nnz == twin.nnz
        head, other = self.net[-1].weight, self.ref.net[-1].weight
        assert (head - other).abs().max() <= bound * other.abs().max(), f"step {number}: head"

    def check_record(self) -> None:
        """What the scheduler says of itself after a step."""
        record, expected = self.topo.last_update, self.ref.last
        assert (record is None) == (expected is None)
        assert self.topo.updates == self.ref.updates
        if record is not None and expected is not None:
            told = {name: (record.dropped[name], record.grown[name]) for name in record.dropped}
            assert {name: counts for name, counts in told.items() if counts != (0, 0)} == expected
            assert record.step == self.topo.steps == self.ref.steps

    def run(self, updates: int) -> None:
        start = {name: layer.kept.copy() for name, layer in self.ref.layers.items()}
        for number in range(STEPS):
            self.step(number)
            self.check(number)
            self.check_record()
        assert self.topo.updates == updates
        assert self.topo.exploration_rate() == pytest.approx(self.ref.explored())
        assert self.topo.reliably_explored() == pytest.approx(self.ref.explored("reliable"))
        rates = self.topo.exploration_rates()
        assert rates == pytest.approx({name: self.ref.explored(names=[name]) for name in rates})
        moved = any((layer.kept != start[name]).any() for name, layer in self.ref.layers.items())
        assert moved == (updates > 0)
        for module in self.net.modules():
            if isinstance(module, SparseModule):
                module.layout.validate()


EVERY = {"update_every": 4}  # stops at 3/4 of 40 steps: 4, 8, ..., 28
UPDATES = 7
FINAL = {1: {"0": 60, "2": 90, "6": 40}, 4: {"0": 12, "2": 16, "6": 8}, 8: {"0": 4, "2": 5, "6": 3}}
GRADUAL = {"update_every": 4, "targets": FINAL[8]}
ROOM = {"capacity": 1.6}
CASES = [
    Case("static", {}, 8),
    Case("static", {}, 1, "adamw"),
    Case("set", EVERY, 8),
    Case("set", EVERY, 1, "adamw", capacity=1.5),
    Case("set", EVERY, 4, "adamw", dtype=torch.float32),
    Case("set", EVERY | {"growth": "unexplored"}, 8, "adamw"),
    Case("set", EVERY | {"growth": "unexplored"}, 1, density=0.6),
    Case("set", EVERY | {"scope": "global"}, 8, capacity=1.5),
    Case("set", EVERY | {"scope": "global"}, 1, "adamw"),
    Case("set", EVERY | {"scope": "global", "drop_fraction": 0.6}, 4, density=0.8),  # more than has free places
    Case("set", EVERY | {"drop_by": "l2"}, 8, "adamw"),
    Case("set", EVERY | {"drop_by": "linf", "drop_schedule": "linear"}, 8),
    Case("set", EVERY | {"drop_by": "gradient"}, 8),
    Case("set", EVERY | {"drop_by": "gradient"}, 1, "adamw", micro=2),
    Case("set", EVERY | {"drop_by": "random", "drop_schedule": "constant"}, 8, capacity=1.5),
    Case("set", EVERY | {"drop_by": "signed"}, 1),
    Case("set", EVERY | {"drop_by": "signed", "drop_fraction": 0.8}, 1, density=0.7),  # more than has free places
    Case("set", EVERY | {"min_per_row": 2, "min_per_col": 1}, 8),
    Case("set", EVERY | {"min_per_row": 3, "min_per_col": 3}, 1, "adamw"),
    Case("rigl", EVERY, 8),
    Case("rigl", EVERY, 8, "adamw", micro=2),
    Case("rigl", EVERY, 1, capacity=1.5),
    Case("rigl", EVERY, 4, dtype=torch.float32),
    Case("rigl", EVERY | {"exact": True}, 8, micro=2),
    Case("rigl", EVERY | {"exact": True}, 1, "adamw"),
    Case("rigl", EVERY | {"scope": "global", "drop_by": "gradient"}, 8, "adamw"),
    Case("rigl", EVERY | {"min_per_row": 1, "min_per_col": 2}, 8),
    Case("snfs", EVERY, 8, **ROOM),
    Case("snfs", EVERY, 1, "adamw", micro=2, **ROOM),
    Case("snfs", EVERY | {"scope": "global", "momentum": 0.5}, 8, "adamw", **ROOM),
    Case("snfs", EVERY | {"drop_fraction": 0.5}, 4, density=0.83, **ROOM),
    Case("snfs", EVERY | {"drop_fraction": 1.0}, 8, "adamw", **ROOM),  # every layer loses all of its blocks
    Case("snfs", EVERY, 4, dtype=torch.float32, **ROOM),
    Case("dsr", EVERY | {"threshold": 0.03}, 8, **ROOM),
    Case("dsr", EVERY | {"threshold": 0.02}, 1, "adamw", **ROOM),
    Case("dsr", EVERY | {"threshold": 1e3, "drop_by": "l2"}, 8, "adamw", **ROOM),
    Case("dsr", EVERY | {"threshold": 0.03, "drop_fraction": 0.8}, 4, density=0.8, capacity=1.1),  # no room for it all
    Case("dsr", EVERY | {"threshold": 0.03, "min_per_row": 1}, 4, dtype=torch.float32, **ROOM),
    Case("srigl", EVERY, 8),
    Case("srigl", EVERY, 1, "adamw", capacity=1.5),
    Case("srigl", EVERY | {"ablation": 0.9, "drop_fraction": 0.6}, 4, "adamw"),
    Case("srigl", EVERY | {"ablation": 0.0}, 8, micro=2),
    Case("srigl", EVERY | {"exact": True}, 4, dtype=torch.float32),
    Case("gradual", GRADUAL, 8, density=0.9),
    Case("gradual", GRADUAL | {"scope": "global", "compact_at": (0.5, 1.0)}, 8, "adamw", density=0.95),
    Case("gradual", GRADUAL | {"scope": "global", "min_per_row": 2, "min_per_col": 5}, 8, density=0.9),
    Case("gradual", EVERY | {"targets": FINAL[1], "begin": 0.1, "end": 0.66}, 1, "adamw", density=0.8),
    Case("gradual", EVERY | {"targets": FINAL[4], "drop_by": "l2"}, 4, density=0.8, dtype=torch.float32),
]
# Gradual pruning ends with an update at step 30, or at 26 of those from 8 on.
HAS = {"static": 0, "gradual": 8}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_masked_dense(case):
    pair = Pair(case)
    pair.run(6 if "begin" in case.options else HAS.get(case.method, UPDATES))
