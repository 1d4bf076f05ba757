"""The CUDA kernels under compute-sanitizer: ``python -m benchmarks.cuda_sanitize memcheck --out memcheck.json``.

memcheck finds accesses out of bounds: every tensor gets memory of its own, so that a neighbour can't hide one.
racecheck finds races in shared memory. Small ragged layers run every family, dtype and pass; results are compared with
the dense op as well.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import files, machine, toolkit
from benchmarks.toolkit import ROOT
from sparsekern.backends import ConvGeometry, cuda, dense
from sparsekern.backends.cuda import plans
from sparsekern.backends.cuda.plan import Plan
from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.problem import layer_problem
from sparsekern.layout import BlockGrid, BlockLayout

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
EXIT = 9  # of the sanitizer where it found something
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ONE, TWO = ConvGeometry((1, 1), (1, 1, 1, 1), (1, 1)), ConvGeometry((2, 2), (1, 0, 0, 1), (1, 1))
LAYERS: tuple[tuple[tuple[int, ...], tuple[int, int], int, tuple[int, ...], ConvGeometry | None], ...] = (
    ((72, 88), (16, 16), 1, (70, 88), None),
    ((130, 200), (64, 32), 1, (70, 200), None),
    ((45, 37), (32, 16), 1, (33, 37), None),
    ((40, 48, 3, 3), (16, 32), 1, (2, 48, 7, 6), ONE),
    ((48, 16, 3, 3), (32, 16), 2, (2, 32, 7, 6), TWO),
)


def one_of_each(problem: Any) -> list[Plan]:
    """The first candidate of each family, and one with splits where the family has them."""
    found: dict[tuple[str, bool], Plan] = {}
    for plan in plans.candidates(problem, chips.current("cuda")):
        found.setdefault((plan.family, plan.splits > 1), plan)
    return list(found.values())


def runs() -> Iterator[tuple[str, float]]:
    """What ran, and its largest difference from the dense op relative to the largest result."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    for weight, block, groups, x_shape, geometry in LAYERS:
        grid = BlockGrid(weight, block, groups)
        layout = BlockLayout.from_block_mask(grid, torch.rand(grid.blocks, generator=generator) < 0.5)
        layout = BlockLayout(grid, layout.index.cuda())
        for dtype in DTYPES:

            def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                drawn = torch.randn(*shape, generator=generator).to("cuda", dtype)
                return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn

            x, bias = draw(*x_shape), draw(weight[0])
            size = () if geometry is None else geometry.output_size(x_shape[2], x_shape[3], grid.kernel_size)
            dy, values, index = draw(x_shape[0], weight[0], *size), layout.from_dense(draw(*weight)), layout.index
            if geometry is None:
                y_want, dx_want = (
                    dense.linear_forward(x, values, index, bias, grid),
                    dense.linear_dgrad(dy, values, index, grid),
                )
                dw_want = dense.linear_wgrad(dy, x, index, None, True, grid)
            else:
                y_want = dense.conv2d_forward(x, values, index, bias, grid, geometry)
                dx_want = dense.conv2d_dgrad(dy, values, index, x_shape, True, grid, geometry)
                dw_want = dense.conv2d_wgrad(dy, x, index, None, True, grid, geometry)
            for step in plans.STEPS:
                problem = layer_problem(step, dtype, grid, geometry, x_shape, layout.capacity)
                for plan in one_of_each(problem):
                    if step == "forward":
                        pairs = [(cuda.forward(x, values, index, bias, grid, geometry, plan), y_want)]
                    elif step == "dgrad":
                        pairs = [(cuda.dgrad(dy, values, index, x_shape, grid, geometry, plan), dx_want)]
                    else:
                        pairs = list(zip(cuda.wgrad(dy, x, index, None, True, grid, geometry, plan), dw_want))
                    torch.cuda.synchronize()
                    yield f"{problem.op} {problem.dtype} {grid.block} {plan}", max(_difference(*pair) for pair in pairs)


def _difference(found: torch.Tensor, want: torch.Tensor) -> float:
    scale = float(want.float().abs().max()) or 1.0
    return float((found.float() - want.float()).abs().max()) / scale


def child() -> None:
    """What the sanitizer watches; a line of JSON for each run."""
    wrong = 0
    for what, difference in runs():
        wrong += not difference < 0.03
        print(json.dumps({"ran": what, "difference": difference}), flush=True)
    raise SystemExit(1 if wrong else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=(*TOOLS, "none"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    want = parser.parse_args()
    if want.out is None:
        return child()
    content = {"kind": "cuda-sanitize", "tool": want.tool, "device": want.device}
    content["machine_info"] = machine.machine_info()
    try:
        command = [] if want.tool == "none" else [toolkit.sanitizer(), "--tool", want.tool, f"--error-exitcode={EXIT}"]
    except toolkit.Missing as error:
        files.write_json(want.out, {**content, "skipped": str(error)})
        return print(f"skipped: {error}")
    if want.device == "cpu":
        files.write_json(want.out, {**content, "skipped": "a rehearsal runs no kernel"})
        return print("skipped: a rehearsal runs no kernel")
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    start = time.perf_counter()
    command += [sys.executable, "-m", "benchmarks.cuda_sanitize", want.tool]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ran = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"ran"')]
    others = [line for line in done.stdout.splitlines() if not line.startswith('{"ran"')]
    summary = [line for line in others if re.search(r"(ERROR|RACECHECK) SUMMARY", line)]
    facts = {"code": done.returncode, "seconds": time.perf_counter() - start, "ran": ran, "output": others[-200:]}
    files.write_json(want.out, {**content, **facts})
    print("\n".join(others[-60:]))
    print(f"{len(ran)} kernels under {want.tool}: {summary[-1].strip('= ') if summary else 'no summary'}")
    if done.returncode or not ran:
        raise SystemExit(f"cuda-{want.tool}: exit status {done.returncode} after {len(ran)} kernels")


if __name__ == "__main__":
    main()
