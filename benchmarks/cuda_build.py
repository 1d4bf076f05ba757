"""Builds the CUDA kernels for this GPU: ``python -m benchmarks.cuda_build --out cuda-build.json``.

An extension that was built elsewhere and has kernels for this GPU is kept where there is no nvcc. A rehearsal builds
nothing and says what it would do.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import files, machine, toolkit
from benchmarks.toolkit import ROOT

_REASON = (
    "import torch; from sparsekern.backends import OpDesc, cuda; "
    "print(cuda.unsupported(OpDesc('linear', 'cuda', torch.bfloat16, (32, 32))) or '')"
)


def missing() -> str:
    """Why the installed extension has no CUDA kernels for this GPU, "" if it has; asked of a fresh process."""
    done = subprocess.run([sys.executable, "-c", _REASON], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return f"the package does not import: {done.stderr.strip().splitlines()[-1]}"
    return done.stdout.strip()


def environment() -> dict[str, str]:
    """For a build: this GPU's architecture alone, unless the user names others."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST") or (toolkit.architecture() if torch.cuda.is_available() else "")
    return {"TORCH_CUDA_ARCH_LIST": named} if named else {}


def install(mode: str, timeout_s: float | None = None, more: dict[str, str] | None = None) -> str:
    """Install the package with its native core, SPARSEKERN_BUILD being ``mode``; why it failed, "" if it did not."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    env = {**os.environ, **(more or {}), **environment(), "SPARSEKERN_BUILD": mode, "PIP_NO_INPUT": "1"}
    try:
        done = subprocess.run([*command, "-e", str(ROOT)], capture_output=True, text=True, timeout=timeout_s, env=env)
    except subprocess.TimeoutExpired:
        return f"took over {timeout_s:.0f} s"
    if done.returncode == 0:
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    print("\n".join(lines[-40:]), flush=True)
    return lines[-1] if lines else "pip failed"


def build(device: str) -> dict[str, Any]:
    """Facts of the build; raises SystemExit where the kernels are not there afterwards."""
    try:
        facts: dict[str, Any] = {"nvcc": toolkit.nvcc(), **environment()}
    except toolkit.Missing as error:
        facts = {"nvcc": None, "why": str(error)}
    if device == "cpu":
        return {**facts, "built": False, "note": "a rehearsal builds nothing"}
    failed = install("cuda") if facts["nvcc"] else facts["why"]
    reason = missing()
    if reason:
        raise SystemExit(f"cuda-build: {failed or reason}")
    if failed and facts["nvcc"]:
        raise SystemExit(f"cuda-build: {failed}")
    return {**facts, "built": bool(facts["nvcc"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    want = parser.parse_args()
    start = time.perf_counter()
    facts = build(want.device)
    sizes = {path.name: path.stat().st_size for path in (ROOT / "sparsekern").glob("_C*.so")}
    facts |= {"seconds": time.perf_counter() - start, "bytes": sizes}
    content = {"kind": "cuda-build", "device": want.device, "machine_info": machine.machine_info()}
    files.write_json(want.out, {**content, **facts})
    print(facts)


if __name__ == "__main__":
    main()
