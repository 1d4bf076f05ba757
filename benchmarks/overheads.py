"""What dispatch and topology updates cost: ``python -m benchmarks.overheads --out overheads.json``.

Dispatch: the wall time of a module's call against launching the same kernels with the same tiles directly, for layers
of a millisecond and more (smaller ones are shown, and not held to the target). Topology update: the layout rewritten in
place from another mask of as many blocks, values and one momentum moved along, against 100 training steps of the layer.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import adapters, machine
from benchmarks.device import one_line, synchronize
from benchmarks.problems import Problem, conv_problem, linear_problem
from benchmarks.row_file import RowFile
from benchmarks.shapes import CONV_GPU, LINEAR_GPU, ConvShape, LinearShape
from benchmarks.timing import wall_times
from sparsekern.backends import forced
from sparsekern.layout import BlockLayout

STEPS = 100
Case = tuple[LinearShape | ConvShape, int, int]  # block, sparsity
DISPATCHED: tuple[Case, ...] = (
    (LinearShape(8192, 8192, 8192), 64, 80),
    (LinearShape(32768, 4096, 4096), 32, 90),
    (CONV_GPU[0], 32, 80),
    (LinearShape(8192, 1024, 1024), 64, 90),
)
UPDATED: tuple[Case, ...] = ((LINEAR_GPU, 32, 90), (LINEAR_GPU, 64, 90), (CONV_GPU[1], 32, 90), (CONV_GPU[2], 32, 90))
TINY: tuple[Case, ...] = ((LinearShape(48, 64, 64), 16, 50), (ConvShape(2, 32, 32, 6), 16, 50))


def problem_of(case: Case, device: str) -> Problem:
    shape, block, sparsity = case
    if isinstance(shape, LinearShape):
        return linear_problem(shape, block, sparsity, device, torch.bfloat16)
    return conv_problem(shape, "nhwc", block, sparsity, device, torch.bfloat16)


def contenders(problem: Problem, pass_: str) -> dict[str, Callable[[], object]]:
    """The call through the module, and the launches that it comes down to."""
    if pass_ == "step":
        through = problem.step().sparse
    else:
        module, x = problem.modules()[1], problem.operands.x
        through = lambda: module(x)  # noqa: E731
    with adapters.recorded() as launches:
        through()
    if not launches:
        raise LookupError("no kernel launch was seen: neither the Triton nor the dense backend ran")
    calls = [call for _, call in launches]
    return {"through": through, "direct": lambda: [call() for call in calls]}


def dispatch(case: Case, pass_: str, device: str, rounds: int) -> dict[str, Any]:
    """Share of time that a call takes beyond its kernels launched directly; noise can make it negative."""
    problem = problem_of(case, device)
    times = wall_times(contenders(problem, pass_), lambda: synchronize(device), rounds)
    through, direct = (statistics.median(times[name]) for name in ("through", "direct"))
    return row("dispatch", problem, case, pass_, through - direct, direct)


class Update:
    """One layer whose layout goes back and forth between two masks of equally many blocks."""

    def __init__(self, problem: Problem) -> None:
        grid, stored = problem.layout.grid, problem.layout.block_mask()
        order = torch.randperm(grid.blocks, generator=torch.Generator().manual_seed(7)).to(problem.device)
        other = torch.zeros(grid.blocks, dtype=torch.bool, device=problem.device)
        other[order[: problem.layout.nnz]] = True
        self.masks = [other.view(grid.shape), stored]
        self.layout = BlockLayout.from_block_mask(grid, stored)
        self.values, self.momentum = problem.values.clone(), torch.ones_like(problem.values)

    def __call__(self) -> Tensor:
        mask = self.masks[0]
        self.masks.reverse()
        slots = self.layout.update_(mask, check=False)
        kept = (slots >= 0).view(-1, 1, 1)
        for tensor in (self.values, self.momentum):
            tensor.copy_(torch.where(kept, tensor[slots.clamp_min(0)], 0))
        return slots


def topology_update(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """One update over ``STEPS`` steps of the layer."""
    problem = problem_of(case, device)
    calls: dict[str, Callable[[], object]] = {"update": Update(problem), "step": problem.step().sparse}
    times = wall_times(calls, lambda: synchronize(device), rounds)
    update, step = (statistics.median(times[name]) for name in ("update", "step"))
    return row("topology update", problem, case, "step", update, STEPS * step)


def row(what: str, problem: Problem, case: Case, pass_: str, seconds: float, base_s: float) -> dict[str, Any]:
    shape, block, sparsity = case
    return {
        **{"kind": "overhead", "what": what, "op": problem.op, "shape": shape.name, "pass_": pass_, "block": block},
        **{"sparsity": sparsity, "seconds": seconds, "base_s": base_s, "share": seconds / base_s},
        **{"backend": problem.backend, "mode": forced(), "device": problem.device, "gpu_state": machine.gpu_state()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    want = parser.parse_args()
    tiny = want.device == "cpu"
    out = RowFile(want.out, "gpu-toy" if tiny else "gpu-full")
    rounds = 2 if tiny else 60
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for case, pass_ in itertools.product(TINY if tiny else DISPATCHED, ("forward", "step")):
        name = f"dispatch, {case[0].name}, {pass_}, block {case[1]}"
        jobs.append((name, functools.partial(dispatch, case, pass_, want.device, rounds)))
    for case in TINY if tiny else UPDATED:
        name = f"topology update, {case[0].name}, block {case[1]}"
        jobs.append((name, functools.partial(topology_update, case, want.device, rounds)))
    failed = 0
    for name, job in jobs:
        try:
            info = job()
            out.add(name, info, rounds)
            print(f"{info['what']}, {info['shape']}, {info['pass_']}: {100 * info['share']:.2f} %", flush=True)
        except Exception as error:
            failed += 1
            out.miss(name, one_line(error))
            print(f"{name}: {one_line(error)}", flush=True)
    print(f"{len(jobs) - failed} of {len(jobs)} overheads measured")
    if failed == len(jobs):
        raise SystemExit("overheads: all failed")


if __name__ == "__main__":
    main()
