"""Whole nets: dense against sparse against narrower dense, ``python -m benchmarks.nets --net wrn-28-10 --mode eager``.

Each contender is timed in turns with the dense net, forward alone and as a training step, under bfloat16 autocast in
channels_last memory. Beside the times: where they go by kind of kernel, peak memory, the optimizer alone, and the bound
that Amdahl's law sets. Rows are written one by one: a run that is cut keeps what it has.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import sparsekern as sk
from benchmarks import machine
from benchmarks.device import one_line, peak_bytes, synchronize
from benchmarks.kernel_parts import amdahl, parts_of
from benchmarks.net_steps import MODES, OPTIMIZERS, NetSteps, sgd
from benchmarks.row_file import RowFile
from benchmarks.timing import CpuTimer, CudaTimer, Effort, Plain, Timer, race, speedup, wall_times
from sparsekern import models
from sparsekern.models.match import macs_at

PASSES = ("step", "forward")
SPARSITY = 90


@dataclass(frozen=True)
class Net:
    """``model`` is a name of :func:`sparsekern.models.names`; widths of layers are multiples of ``channels``."""

    model: str
    in_shape: tuple[int, int, int]
    classes: int
    batch: int
    channels: int
    width: float = 1.0

    def build(self, width: float) -> nn.Module:
        return models.build(self.model, num_classes=self.classes, in_shape=self.in_shape, width=width)


NETS = {
    "wrn-28-10": Net("wrn-28-10", (3, 32, 32), 10, 128, 160),
    "resnet50": Net("resnet50", (3, 224, 224), 1000, 256, 64),
    "vgg16-wide": Net("vgg16", (3, 32, 32), 10, 128, 64, width=2.0),
    "toy": Net("wrn-10-2", (3, 8, 8), 10, 4, 32),
}


@dataclass(frozen=True)
class Contender:
    """``kind``: dense, sparse, narrow, or "narrow, multiples of 8"."""

    kind: str
    block: int = 0
    allocation: str = ""


NARROW, ALIGNED = "narrow", "narrow, multiples of 8"


def contenders(net: str, mode: str) -> list[Contender]:
    """Beside the dense net, the telling ones first; compiling costs a minute each, so it leaves some out."""
    if net == "toy":
        return [Contender("sparse", 16, "erk"), Contender(NARROW)]
    main = [Contender("sparse", 32, "erk"), Contender("sparse", 64, "erk"), Contender(NARROW)]
    if mode == "compile":
        return main
    return [*main, Contender("sparse", 32, "uniform"), Contender("sparse", 64, "uniform"), Contender(ALIGNED)]


def aligned_width(net: Net, macs: float) -> float:
    """The width nearest in multiply-accumulates whose layers have multiples of 8 channels."""
    steps = net.channels // 8
    widths = [k / steps for k in range(1, round(net.width * steps) + 1)]

    def miss(width: float) -> float:
        found = macs_at(net.model, width, num_classes=net.classes, in_shape=net.in_shape)
        return abs(math.log(found / macs))

    return min(widths, key=miss)


class Prepared(NamedTuple):
    """A contender ready to be timed, its multiply-accumulates per sample and its layers by state."""

    steps: NetSteps
    macs: int
    layers: dict[str, int]


class Bench:
    """One net in one mode on one device."""

    def __init__(self, name: str, mode: str, device: str, out: RowFile, effort: Effort) -> None:
        self.name, self.net, self.mode, self.device, self.out, self.effort = name, NETS[name], mode, device, out, effort
        torch.manual_seed(0)
        images = torch.randn(self.net.batch, *self.net.in_shape, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, self.net.classes, (self.net.batch,), device=device)
        self.timer: Timer = CudaTimer() if device == "cuda" else CpuTimer()
        self.sparse_macs = 0
        self.dense_macs = macs_at(
            self.net.model, self.net.width, num_classes=self.net.classes, in_shape=self.net.in_shape
        )
        self.dense = self.prepare(Contender("dense")).steps
        self.parts: dict[str, dict[str, float]] = {}

    def prepare(self, contender: Contender) -> Prepared:
        """The net with its optimizer after a first step."""
        torch.manual_seed(0)
        net, width, macs = self.net, self.net.width, self.dense_macs
        if contender.kind in (NARROW, ALIGNED):
            target = self.sparse_macs or self.dense_macs * (100 - SPARSITY) / 100
            if contender.kind == ALIGNED:
                width = aligned_width(net, target)
            else:
                width, _ = models.match_macs(net.model, target, num_classes=net.classes, in_shape=net.in_shape)
            macs = macs_at(net.model, width, num_classes=net.classes, in_shape=net.in_shape)
        model = self.net.build(width).to(self.device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        layers: dict[str, int] = {}
        if contender.kind == "sparse":
            config = sk.SparsityConfig(
                sparsity=SPARSITY / 100,
                block=contender.block,
                allocation=contender.allocation,
                below_break_even="sparse" if self.name == "toy" else "dense",  # nothing pays at toy sizes
            )
            with torch.autocast(self.device, torch.bfloat16):
                plan = sk.sparsify_(model, config, example_input=self.images)
            for layer in plan.layers:
                layers[layer.state] = layers.get(layer.state, 0) + 1
            macs = int(plan.to_dict()["totals"]["macs"])  # a forward pass to count them would compile float32 kernels
            self.sparse_macs = self.sparse_macs or macs
        steps = NetSteps(model, self.images, self.labels, self.mode)
        loss = steps.first_loss()
        if not (math.isfinite(loss) and loss > 0):
            raise ArithmeticError(f"expected a finite positive loss, got {loss}")
        return Prepared(steps, macs, layers)

    def measure(self, contender: Contender) -> None:
        """Rows of one contender, and those of the dense net beside the first."""
        steps, macs, layers = self.prepare(contender)
        for pass_ in PASSES:
            calls = {"dense": self.dense.call(pass_), "other": steps.call(pass_)}
            times = race(Plain(), self.timer, calls, hero="other", effort=self.effort, repeat_short=False)
            walls = wall_times(calls, lambda: synchronize(self.device), 5)
            if pass_ not in self.parts:
                self.parts[pass_] = parts_of(calls["dense"], self.device)
                more = self.facts(self.dense, pass_, calls["dense"], self.dense_macs, {})
                row = self.row(Contender("dense"), pass_, times["dense"], times["dense"], walls["dense"])
                self.add({**row, **more, "parts_s": self.parts[pass_], "ideal": None})
            row = self.row(contender, pass_, times["other"], times["dense"], walls["other"])
            more = self.facts(steps, pass_, calls["other"], macs, layers)
            ideal = amdahl(self.parts[pass_], macs / self.dense_macs) if contender.kind == "sparse" else None
            self.add({**row, **more, "parts_s": parts_of(calls["other"], self.device), "ideal": ideal})

    def row(
        self, contender: Contender, pass_: str, times: list[float], dense: list[float], walls: list[float]
    ) -> dict[str, Any]:
        return {
            **{"kind": "net", "net": self.name, "batch": self.net.batch, "contender": contender.kind},
            **{"mode": self.mode, "pass_": pass_, "block": contender.block, "allocation": contender.allocation},
            **{"sparsity": SPARSITY if contender.kind == "sparse" else 0, "device": self.device, "dtype": "bfloat16"},
            **{"median_s": statistics.median(times), "dense_median_s": statistics.median(dense)},
            **{"wall_s": statistics.median(walls), "rounds": len(times), **speedup(dense, times)},
        }

    def facts(
        self, steps: NetSteps, pass_: str, call: Callable[[], object], macs: int, layers: dict[str, int]
    ) -> dict[str, Any]:
        """Size, memory, and what the optimizer takes alone; the last where eager steps are timed."""
        peak = None
        if self.device == "cuda" and self.mode != "graph":  # a graph's memory is taken when it is captured
            peak = peak_bytes(call) + steps.state_bytes()
        alone = self.optimizers(steps) if pass_ == "step" and self.mode == "eager" else {}
        facts = {"params": models.count_params(steps.model), "macs": macs, "peak_bytes": peak}
        return {**facts, "optimizers_s": alone, "layers": layers, "gpu_state": machine.gpu_state()}

    def optimizers(self, steps: NetSteps) -> dict[str, float]:
        """Median seconds of ``optimizer.step()`` by implementation."""
        steps.with_grads()
        calls: dict[str, Callable[[], object]] = {name: sgd(steps.model, name).step for name in OPTIMIZERS}
        times = race(Plain(), self.timer, calls, hero="fused", effort=self.effort, repeat_short=False)
        steps.optimizer.zero_grad(set_to_none=True)
        return {name: statistics.median(samples) for name, samples in times.items()}

    def add(self, info: dict[str, Any]) -> None:
        name = f"{info['net']} {info['mode']} {info['pass_']} {info['contender']} {info['block']} {info['allocation']}"
        self.out.add(name, info, info["rounds"])
        parts = ", ".join(f"{kind} {1e3 * s:.2f}" for kind, s in info["parts_s"].items())
        print(f"{name}: {1e3 * info['median_s']:.2f} ms, {info['speedup']:.2f}x; {parts}", flush=True)


def measured(bench: Bench, deadline: float) -> Iterator[str]:
    """Measure every contender in turn; yields one line for each that failed or found no time."""
    for contender in contenders(bench.name, bench.mode):
        what = " ".join(str(part) for part in (contender.kind, contender.block or "", contender.allocation)).strip()
        if time.perf_counter() > deadline:
            bench.out.miss(f"{bench.name} {bench.mode}, {what}", "no time was left")
            continue
        try:
            bench.measure(contender)
        except Exception as error:  # one that fails costs only itself
            bench.out.miss(f"{bench.name} {bench.mode}, {what}", one_line(error))
            yield f"{what}: {one_line(error)}"
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--net", choices=tuple(NETS), required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--budget-s", type=float, default=180.0, help="no contender is begun after so many seconds")
    want = parser.parse_args()
    torch.backends.cudnn.benchmark = want.device == "cuda"
    if want.device == "cpu":
        torch.set_num_threads(1)
    effort = Effort(3, 0.1) if want.net == "toy" else Effort(25, 2.5)
    out = RowFile(want.out, "gpu-toy" if want.net == "toy" else "gpu-full")
    deadline = time.perf_counter() + want.budget_s
    failed = list(measured(Bench(want.net, want.mode, want.device, out, effort), deadline))
    print(f"{len(out.rows)} rows of {want.net}, {want.mode}")
    if failed:
        raise SystemExit(f"nets: {len(failed)} failed, the first: {failed[0]}")


if __name__ == "__main__":
    main()
