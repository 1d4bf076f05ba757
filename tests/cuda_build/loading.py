"""Loads a built extension where no driver is, counts shared memory in it, and calls its kernels in vain.

``python -m tests.cuda_build.loading build/cuda-gate/_C.so`` in a process of its own: a crash is a result too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHIPS = ("a100", "h200", "b200", "sm86", "sm89")
SMALL = ("sm86", "sm89")  # 99 KB of shared memory: a few problems have no plan there and go to another backend
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (128, 32))
# What CUDA says without a driver (35), and with one that has no GPU (100).
WITHOUT_GPU = ("(CUDA error 35)", "(CUDA error 100)")


def problems(extension: Path) -> list[str]:
    """What is wrong with the extension; empty if nothing is."""
    command = [sys.executable, "-m", "tests.cuda_build.loading", str(extension)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, end="")
    return [] if done.returncode == 0 else [f"{extension.name}: {done.stderr.strip() or f'exit {done.returncode}'}"]


def load(path: str) -> Any:
    """The extension as sparsekern._C, whatever is installed."""
    spec = importlib.util.spec_from_file_location("sparsekern._C", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["sparsekern._C"] = module
    return module


def layers() -> Iterator[Any]:
    """Problems of linear layers and convolutions, small to large, ragged ones among them."""
    from sparsekern.backends import ConvGeometry
    from sparsekern.backends.cuda.plans import DTYPES, STEPS
    from sparsekern.backends.gpu.problem import Problem, conv_problem
    from sparsekern.layout import BlockGrid

    linear = ((8192, 4096, 4096), (8192, 1024, 4096), (1000, 300, 700), (1, 64, 64))
    one, same, halved = (
        ConvGeometry((1, 1), (0, 0, 0, 0), (1, 1)),
        ConvGeometry((1, 1), (1, 1, 1, 1), (1, 1)),
        ConvGeometry((2, 2), (0, 1, 0, 1), (1, 1)),
    )
    images = (
        ((64, 64, 56, 56), (64, 64, 3, 3), 1, same),
        ((64, 256, 14, 14), (512, 256, 3, 3), 1, halved),
        ((3, 70, 9, 7), (90, 70, 3, 3), 1, same),
        ((32, 512, 7, 7), (512, 128, 3, 3), 4, same),
        ((32, 256, 28, 28), (128, 256, 1, 1), 1, one),
    )
    for dtype, block, step in itertools.product(DTYPES, BLOCKS, STEPS):
        for m, out_features, in_features in linear:
            yield Problem(f"linear_{step}", dtype, block, m, out_features, in_features, 1).at_density(0.1)
        for x_shape, weight_shape, groups, geometry in images:
            grid = BlockGrid(weight_shape, block, groups)
            yield conv_problem(f"conv2d_{step}", dtype, grid, geometry, x_shape, 1).at_density(0.1)


def shared_memory(module: Any) -> tuple[int, list[str]]:
    """Plans looked at, and those whose shared memory C++ and Python count differently or a chip does not have."""
    from sparsekern.backends.cuda.launch import plan_object, problem_object
    from sparsekern.backends.cuda.plans import candidates, shared_bytes
    from sparsekern.backends.gpu import chips

    checked, wrong = 0, []
    for problem, name in itertools.product(layers(), CHIPS):
        chip = chips.get(name)
        plans = candidates(problem, chip)
        if not plans and name not in SMALL:
            wrong.append(f"{name}: no plan for {problem}")
        for plan in plans:
            facts = [problem_object(problem), plan_object(plan)]
            if plan.family != "wgrad":
                facts.insert(1, getattr(module.Step, problem.step))
            counted = getattr(module, f"{plan.family}_shared_bytes")(*facts)
            checked += 1
            if counted != shared_bytes(problem, plan):
                wrong.append(f"{plan}: {counted} bytes in C++, {shared_bytes(problem, plan)} in Python, {problem}")
            if counted > chip.shared_per_block:
                wrong.append(f"{plan}: {counted} bytes, {name} has {chip.shared_per_block}, {problem}")
    return checked, wrong


def calls(module: Any) -> tuple[int, list[str]]:
    """Kernels called, by dtype, step and family, and those that did not say what is missing."""
    from sparsekern.backends.cuda.launch import plan_object, problem_object
    from sparsekern.backends.cuda.plans import candidates
    from sparsekern.backends.gpu import chips

    called, wrong = set(), []
    for problem in layers():
        for plan in candidates(problem, chips.get("h200")):
            case = (problem.dtype, problem.edges, problem.step, plan.family)
            if case in called:
                continue
            called.add(case)
            facts, addresses = [problem_object(problem), plan_object(plan)], [0, 0]
            if plan.family == "wgrad":
                arguments = [*facts, 0, problem.out_features, 0, problem.in_features, 0, 0, 0, 0, 0, *addresses]
            else:
                step = getattr(module.Step, problem.step)
                arguments = [facts[0], step, facts[1], 0, 8192, 0, 0, 0, 0, *addresses]
            try:
                getattr(module, plan.family)(*arguments)
                wrong.append(f"{case}: no error without a GPU")
            except RuntimeError as error:
                if not str(error).endswith(WITHOUT_GPU):
                    wrong.append(f"{case}: {error}")
    return len(called), wrong


def driver_is_there() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def main(path: str) -> int:
    """Exit status; what is wrong on stderr."""
    extension = load(path)
    checked, wrong = shared_memory(extension.cuda)
    said = f"shared memory of {checked} plans for {', '.join(CHIPS)} counted"
    if driver_is_there():
        said += "; kernels not called: a driver is here"
    else:
        called, more = calls(extension.cuda)
        wrong += more
        said += f"; {called} kernels called without a driver"
    print(said)
    print(*wrong[:5], sep="\n", file=sys.stderr)
    if len(wrong) > 5:
        print(f"and {len(wrong) - 5} more", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
