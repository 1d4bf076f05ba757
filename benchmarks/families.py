"""Triton's kernels, the CUDA kernels, dense and other libraries on the same layers: ``python -m benchmarks.families``.

For each pass of each layer the candidates of both families are timed in turns with the dense op, with a cold L2, as
``sparsekern.tune`` does; the fastest of each stands beside its prediction, and the results of the two are compared.
Nothing is remembered for later calls.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import adapters, files, machine, peers
from benchmarks.device import one_line
from benchmarks.problems import linear_problem
from benchmarks.shapes import BLOCKS_GPU, CONV_GPU, LINEAR_GPU, ConvShape, LinearShape
from sparsekern import cost, tuning
from sparsekern.backends import GPU, ConvGeometry, OpDesc, families, get
from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.families import Kernel, family_of, name_of
from sparsekern.backends.gpu.problem import Problem
from sparsekern.layout import BlockGrid

Shape = LinearShape | ConvShape
Case = tuple[Shape, int, int, str]  # block, sparsity, dtype
LINEARS = (LINEAR_GPU, LinearShape(8192, 1024, 1024), LinearShape(8192, 768, 3072))
TINY: dict[str, tuple[Case, ...]] = {
    "linear": ((LinearShape(40, 64, 48), 16, 50, "float32"),),
    "conv2d": ((ConvShape(2, 16, 32, 6), 16, 50, "float32"),),
}


def cases(kind: str, sparsities: Sequence[int]) -> Iterator[Case]:
    """The gates first: 90 % in bfloat16 at every block; then other sparsities, then TF32."""
    shapes: tuple[Shape, ...] = LINEARS if kind == "linear" else CONV_GPU
    for dtype, sparsity in itertools.product(("bfloat16", "float32"), sparsities):
        if dtype == "bfloat16" or sparsity == sparsities[0]:
            yield from ((shape, block, sparsity, dtype) for shape in shapes for block in BLOCKS_GPU)


def as_case(shape: Shape, dtype: str, device: str) -> cost.Case:
    """The layer as the cost model names it."""
    if isinstance(shape, LinearShape):
        return cost.Case("linear", (shape.o, shape.i), 1, (shape.m, shape.i), shape.m, dtype=dtype, device=device)
    geometry = ConvGeometry((shape.stride,) * 2, (shape.padding,) * 4, (1, 1))
    weight, x_shape = (shape.o, shape.c, shape.r, shape.r), (shape.n, shape.c, shape.h, shape.h)
    positions = shape.n * shape.p**2
    return cost.Case("conv2d", weight, 1, x_shape, positions, dtype=dtype, device=device, conv=geometry)


def layer_of(shape: Shape) -> nn.Module:
    """A dense layer that says whether there is a bias; its weights are not used."""
    if isinstance(shape, LinearShape):
        return nn.Linear(shape.i, shape.o, shape.bias, device="meta")
    return nn.Conv2d(shape.c, shape.o, shape.r, shape.stride, shape.padding, bias=shape.bias, device="meta")


def measure(case: Case, device: str, seconds: float, most: int | None = None) -> Iterator[dict[str, Any]]:
    """A row for each pass of a layer."""
    shape, block, sparsity, dtype = case
    facts = as_case(shape, dtype, device)
    grid = BlockGrid(facts.weight_shape, (block, block))
    count = max(round((1 - sparsity / 100) * grid.blocks), 1)
    chip, clock = chips.current(device), tuning.clock_of(device)
    names = families(OpDesc(facts.kind, device, getattr(torch, dtype), grid.block))
    launch = tuning.LAUNCHES[facts.kind](layer_of(shape), facts, grid, count)
    for problem in cost.GPU_KINDS[facts.kind](facts, grid.block, count):
        row: dict[str, Any] = {"op": facts.kind, "pass": problem.step, "shape": shape.name, "dtype": problem.dtype}
        row |= {"block": block, "sparsity": sparsity, "families": {}}
        run, dense = launch(problem)
        listed = [kernel for name in names for kernel in get(name).candidates(problem, chip)[:most]]
        times = tuning.measure_kernels(listed, run, dense, clock, seconds)
        row["dense_s"], best = times.dense_seconds, {}
        for name in GPU:
            own = {kernel: time for kernel, time in times.seconds.items() if name_of(kernel) == name}
            skipped = {str(kernel): why for kernel, why in times.skipped.items() if name_of(kernel) == name}
            found: dict[str, Any] = {"measured": len(own), "skipped": skipped}
            if own:
                best[name] = min(own, key=own.__getitem__)
                found |= of_best(problem, best[name], own[best[name]], chip)
            row["families"][name] = found
        if len(best) == len(GPU):
            row["difference"] = difference(*(run(kernel) for kernel in best.values()))
        yield row


def of_best(problem: Problem, kernel: Kernel, seconds: float, chip: chips.Chip) -> dict[str, Any]:
    """The fastest kernel of a family beside its prediction."""
    predicted = family_of(kernel).seconds(problem, kernel, chip)
    return {"kernel": str(kernel), "seconds": seconds, "predicted_s": predicted}


def difference(one: Any, other: Any) -> float:
    """Largest difference of two results (or tuples of them) over the largest entry."""
    if isinstance(one, Tensor):
        scale = float(other.float().abs().max()) or 1.0
        return float((one.float() - other.float()).abs().max()) / scale
    return max(difference(a, b) for a, b in zip(one, other) if a.numel())


def beside(row: dict[str, Any], shape: LinearShape, clock: tuning.Clock, device: str, seconds: float) -> dict[str, Any]:
    """Other libraries at the same shape, block and sparsity; their layouts are drawn alike, not the same."""
    problem = linear_problem(shape, row["block"], row["sparsity"], device, torch.bfloat16)
    calls, reasons = peers.ready(problem, row["pass"], peers.of_device(device, rehearse_gpu=True))
    rounds = tuning._race(list(calls.values()), clock, seconds) if calls else []
    medians = [sorted(times)[len(times) // 2] for times in zip(*rounds)]
    return {"peers": dict(zip(calls, medians)), "failed_peers": reasons}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("linear", "conv2d"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=240.0)
    want = parser.parse_args()
    tiny = want.device == "cpu"
    if not tiny:
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # type: ignore[attr-defined]
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    listed = TINY[want.kind] if tiny else tuple(cases(want.kind, (90, 80, 95, 50)))
    deadline, rows, failed = time.perf_counter() + want.budget_s, list[dict[str, Any]](), list[dict[str, str]]()
    seconds, most = (0.0, 2) if tiny else (0.4, None)
    content = {"kind": "families", "device": want.device, "machine_info": machine.machine_info()}
    content["chip"] = adapters.chip_name() if not tiny else "a rehearsal"
    clock = functools.lru_cache(maxsize=1)(lambda: tuning.clock_of(want.device))
    for case in listed:
        if time.perf_counter() > deadline:
            break
        try:
            for row in measure(case, want.device, seconds, most):
                if isinstance(case[0], LinearShape) and case[1:] in ((64, 90, "bfloat16"), (32, 90, "bfloat16")):
                    row |= beside(row, case[0], clock(), want.device, seconds)
                rows.append(row)
                print(row, flush=True)
        except Exception as error:
            failed.append({"case": f"{case[0].name}, block {case[1]}, {case[2]} %, {case[3]}", "why": one_line(error)})
            print(failed[-1], flush=True)
        files.write_json(want.out, {**content, "rows": rows, "failed": failed, "cases": len(listed)})
    print(f"{len(rows)} passes measured, {len(failed)} layers failed")
    if not rows:
        raise SystemExit(f"families: all failed: {failed[:1]}")


if __name__ == "__main__":
    main()
