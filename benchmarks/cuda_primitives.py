"""The first thing to run on a GPU: each primitive of the CUDA kernels alone, against the emulation that tests them.

``python -m benchmarks.cuda_primitives --out primitives.json`` compiles tests/emulation/primitives_gpu.cu with nvcc,
runs it and compares what it prints with tests/emulation/primitives.json. Where they differ, the emulation is wrong
about this GPU, and with it every test of the kernels without one. On a CPU it rehearses with the emulation itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import files, machine, toolkit
from benchmarks.toolkit import ROOT

FOLDER = ROOT / "tests" / "emulation"
SOURCE = FOLDER / "primitives_gpu.cu"
INCLUDES = (f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{FOLDER}")


def compile_command(device: str, program: Path) -> list[str]:
    """nvcc for this GPU; for a rehearsal the host compiler with the emulation."""
    if device == "cpu":
        found = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
        if found is None:
            raise toolkit.Missing("a C++ compiler (g++, c++ or clang++) was not found on PATH")
        return [found, "-std=c++17", "-O1", "-DSK_EMULATE", *INCLUDES, "-x", "c++", str(SOURCE), "-o", str(program)]
    arch = "sm_" + toolkit.architecture().replace(".", "")
    return [toolkit.nvcc(), "-std=c++17", "-O2", f"-arch={arch}", *INCLUDES, str(SOURCE), "-o", str(program)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    want = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "primitives"
        try:
            command = compile_command(want.device, program)
        except toolkit.Missing as error:
            raise SystemExit(f"cuda-primitives: {error}") from None
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode:
            raise SystemExit("cuda-primitives: the compiler failed, its output is above")
        compiled = time.perf_counter() - start
        done = subprocess.run([str(program)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"cuda-primitives: the program failed with exit status {done.returncode}")
        found = Path(folder) / "found.json"
        found.write_text(done.stdout)
        compared = subprocess.run(
            [sys.executable, str(FOLDER / "compare_primitives.py"), str(found)], capture_output=True, text=True
        )
    lines = compared.stdout.splitlines() + compared.stderr.splitlines()
    content = {"kind": "cuda-primitives", "device": want.device, "machine_info": machine.machine_info()}
    content |= {"compile_s": compiled, "agree": compared.returncode == 0, "differences": lines[1:]}
    files.write_json(want.out, {**content, "found": json.loads(done.stdout)})
    print("\n".join(lines))
    if compared.returncode:
        raise SystemExit(f"cuda-primitives: {len(lines) - 1} lists differ from the emulation")


if __name__ == "__main__":
    main()
