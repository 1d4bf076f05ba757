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
from benchmarks.problems import LinearProblem, linear_problem
from benchmarks.shapes import BLOCKS_GPU, PASSES, LinearShape
from sparsekern.backends import forced

SHAPES = (LinearShape(512, 512, 768), LinearShape(200, 328, 456))  # whole tiles; ragged tokens and features
TINY = (LinearShape(40, 50, 70),)


def check(problem: LinearProblem, pass_: str) -> dict[str, Any]:
    """Error and seconds of the first call, compilation included."""
    start = time.perf_counter()
    row: dict[str, Any] = {"pass": pass_, "shape": problem.shape.name, "block": problem.block}
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
    rows = []
    for block in BLOCKS_GPU:
        for shape in SHAPES if want.device == "cuda" else TINY:
            problem = linear_problem(shape, block, 50, want.device, torch.bfloat16)
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
