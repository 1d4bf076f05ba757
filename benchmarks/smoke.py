"""The first thing to run on a GPU: every pass at every block on small and ragged shapes, against float64.

``python -m benchmarks.smoke --out smoke.json``. Goes on after a wrong result, so that one run tells which kernels work.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import files, machine
from benchmarks.device import one_line
from benchmarks.problems import Problem, conv_problem, linear_problem
from benchmarks.shapes import BLOCKS_GPU, PASSES, ConvShape, LinearShape
from sparsekern.backends import OpDesc, forced, get

SHAPES = (LinearShape(512, 512, 768), LinearShape(200, 328, 456))  # whole tiles; ragged tokens and features
TINY = (LinearShape(40, 50, 70),)
CONVS = (ConvShape(8, 128, 192, 14), ConvShape(8, 96, 160, 15, stride=2), ConvShape(8, 128, 256, 14, r=1, stride=2))
TINY_CONVS = (ConvShape(1, 20, 24, 5, stride=2),)


def check(problem: Problem, pass_: str) -> dict[str, Any]:
    """Error and seconds of the first call, compilation included."""
    start = time.perf_counter()
    row: dict[str, Any] = {"pass": pass_, "shape": problem.shape.name, "block": problem.block}
    row["op"] = problem.op
    try:
        error = problem.error(pass_)
        row.update(backend=problem.backend, error=error, bound=problem.error_bound, ok=error <= problem.error_bound)
    except Exception as error:
        row.update(ok=False, failed=one_line(error))
    return {**row, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    want = parser.parse_args()
    tiny, rows, problems = want.device == "cpu", [], []
    for block in BLOCKS_GPU:
        for linear in TINY if tiny else SHAPES:
            problems.append(lambda s=linear, b=block: linear_problem(s, b, 50, want.device, torch.bfloat16))
    refused = get("triton").unsupported(OpDesc("conv2d", want.device, torch.bfloat16, (32, 32)))
    if refused and forced() == "triton":
        print(f"no convolutions: {refused}")
    for block in () if refused and forced() == "triton" else BLOCKS_GPU:
        for conv in TINY_CONVS if tiny else CONVS:
            problems.append(lambda s=conv, b=block: conv_problem(s, "nhwc", b, 50, want.device, torch.bfloat16))
    for problem_of in problems:
        problem = problem_of()
        for pass_ in PASSES:
            rows.append(check(problem, pass_))
            print(rows[-1], flush=True)
    content = {"kind": "smoke", "device": want.device, "mode": forced(), "machine_info": machine.machine_info()}
    files.write_json(want.out, {**content, "rows": rows})
    wrong = [row for row in rows if not row["ok"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} checks right")
    if wrong:
        raise SystemExit(f"smoke: {len(wrong)} of {len(rows)} checks failed, the first: {wrong[0]}")


if __name__ == "__main__":
    main()
