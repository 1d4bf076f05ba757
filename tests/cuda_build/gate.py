"""Compile every CUDA kernel for GPUs that need not be there, and check what came out.

``python -m tests.cuda_build.gate`` prints a table and fails if a check does: no spilled registers, no stack, launch
bounds kept, no static shared memory (``ptxas.problems``); the same kernels for every architecture; and the extension
loads without a driver, where a call says clearly what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.cuda_build import loading, ptxas
from tests.cuda_build.build import ROOT, BuildError, build

sys.path.insert(0, str(ROOT / "cmake"))
from nvcc import find_nvcc

ARCHS = ("8.0", "9.0a", "10.0")


def differences(kernels: Iterable[ptxas.Kernel]) -> list[str]:
    """Kernels that a source has for one architecture and not for another."""
    by_source: dict[str, dict[str, set[str]]] = {}
    for kernel in kernels:
        by_source.setdefault(kernel.source, {}).setdefault(kernel.arch, set()).add(kernel.name)
    found = []
    for source, by_arch in by_source.items():
        everywhere = set.union(*by_arch.values())
        for arch, names in by_arch.items():
            found += [f"sm_{arch} {name}: missing in {source}" for name in sorted(everywhere - names)]
    return found


def version(nvcc: str) -> str:
    """ "13.0.88"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.partition(", V")[2].split()[0]


def as_json(kernels: Sequence[ptxas.Kernel], nvcc_version: str) -> str:
    """One kernel a line, so that two files compare."""

    def entry(kernel: ptxas.Kernel) -> dict[str, Any]:
        content = asdict(kernel) | {"per_sm": kernel.per_sm, "problems": list(ptxas.problems(kernel))}
        del content["symbol"]
        return {name: value for name, value in content.items() if value}

    lines = ",\n".join(json.dumps(entry(kernel), separators=(",", ":")) for kernel in kernels)
    return f'{{"nvcc": {json.dumps(nvcc_version)}, "kernels": [\n{lines}\n]}}\n'


def markdown(kernels: Sequence[ptxas.Kernel], nvcc_version: str) -> str:
    """The table as a document."""
    head = (
        f"nvcc {nvcc_version}: {len(kernels)} kernels compiled without a GPU. Registers per thread, of as many as the "
        "launch bounds allow; per SM: thread blocks of the largest size that registers and threads let one "
        "multiprocessor hold; spilled and stack: bytes."
    )
    return f"{head}\n\n{ptxas.table(kernels)}\n"


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_build.gate", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=ARCHS, help="compute capabilities, as 9.0a")
    parser.add_argument("--sources", default="*", help="a part, as 'wgrad_*'; without the extension")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "cuda-gate", help="where to build")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--quiet", action="store_true", help="print what is wrong, not the table")
    return parser.parse_args(arguments)


def write(path: Path | None, content: str) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a check fails."""
    chosen = options(arguments)
    nvcc, missing = find_nvcc()
    if missing:
        print(missing, file=sys.stderr)
        return 1
    start = time.monotonic()
    try:
        built = build(chosen.folder, nvcc, chosen.arch, chosen.sources, chosen.jobs)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    kernels = built.kernels
    compiler = version(nvcc)
    write(chosen.json, as_json(kernels, compiler))
    write(chosen.markdown, markdown(kernels, compiler))
    if not chosen.quiet:
        print(markdown(kernels, compiler))
        print(*(f"{name}: {took:.0f} s" for name, took in sorted(built.seconds.items())), sep=", ")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"largest compiler process: {peak:.1f} GiB ({platform.machine()})")
    print(*built.warnings, sep="\n", end="\n" if built.warnings else "")
    wrong = [f"sm_{k.arch} {k.name}: {'; '.join(found)}" for k in kernels if (found := ptxas.problems(k))]
    wrong += differences(kernels)
    if built.extension:
        wrong += loading.problems(built.extension)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(
        f"nvcc {compiler}: {len(kernels)} kernels for sm_{', sm_'.join(sorted({k.arch for k in kernels}))}, "
        f"{len(wrong)} problems, {len(built.warnings)} warnings, {time.monotonic() - start:.0f} s"
    )
    return 1 if wrong or not kernels else 0


if __name__ == "__main__":
    raise SystemExit(main())
