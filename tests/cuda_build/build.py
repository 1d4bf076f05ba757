"""Compiles csrc/cuda with CMake, apart from the installation, and keeps what ptxas printed for each source."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_build import ptxas

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = Path("CMakeFiles/sk_cuda.dir/csrc/cuda")
_EDGE = re.compile(r"^\[\d+/\d+\] (.*)$")
_SOURCE = re.compile(r"^Building CUDA object \S*/csrc/cuda/(\S+\.cu)\.o$")


class BuildError(RuntimeError):
    """CMake or a compiler failed; the message ends with its output."""


@dataclass(frozen=True)
class Built:
    """Kernels of one build, distinct warnings, the extension if all sources were built, and seconds per source as ninja
    noted them."""

    kernels: tuple[ptxas.Kernel, ...]
    warnings: tuple[str, ...]
    extension: Path | None
    seconds: dict[str, float]


def tool(name: str) -> str:
    """A program beside this Python, else on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        raise BuildError(f"{name} was not found; run: pip install cmake ninja pybind11")
    return found


def sources(pattern: str) -> list[str]:
    """Names of the CUDA sources that match."""
    names = (path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    return sorted(name for name in names if fnmatch.fnmatch(name, pattern))


def build(folder: Path, nvcc: str, archs: Sequence[str], pattern: str = "*", jobs: int = 1) -> Built:
    """Compile the CUDA sources that match ``pattern``; with all of them, also the extension ``_C``.

    What a source's kernels need is read from the output of its compiler, so a source is compiled again where that was
    not kept.
    """
    wanted = sources(pattern)
    if not wanted:
        raise BuildError(f"no source matches {pattern} in {ROOT / 'csrc' / 'cuda'}")
    logs = folder / "ptxas"
    logs.mkdir(parents=True, exist_ok=True)
    # The PTX says the launch bounds, once; uncompressed, so that it can be read from the object.
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": " ".join(archs) + "+PTX", "CUDAFLAGS": "--no-compress"}
    configure = [tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DSK_NVCC={nvcc}", "-DSK_CUDA=ON", "-DSK_PTXAS_VERBOSE=ON", "-DSK_NVCC_THREADS=1"]
    done = subprocess.run(configure, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"CMake failed:\n{done.stdout}{done.stderr}")

    for name in wanted:
        made, kept = folder / OBJECTS / f"{name}.o", logs / f"{name}.log"
        if made.exists() and not (kept.exists() and kept.stat().st_mtime >= made.stat().st_mtime):
            made.unlink()
    whole = pattern == "*"
    targets = ["_C"] if whole else [str(OBJECTS / f"{name}.o") for name in wanted]
    command = [tool("cmake"), "--build", str(folder), "--parallel", str(jobs), "--target", *targets]
    run_build(command, logs, environment)

    kernels, warnings = [], dict[str, None]()
    for name in wanted:
        log = (logs / f"{name}.log").read_text()
        warnings |= dict.fromkeys(line.replace(f"{ROOT}/", "") for line in log.splitlines() if " warning " in line)
        found = ptxas.parse(name, log)
        bounds = ptxas.launch_bounds((folder / OBJECTS / f"{name}.o").read_bytes())
        names = ptxas.demangle([kernel.symbol for kernel in found])
        kernels += [ptxas.complete(kernel, names, bounds) for kernel in found]
    extension = next(iter(folder.glob("_C.*.so")), None) if whole else None
    return Built(tuple(kernels), tuple(warnings), extension, seconds(folder, wanted))


def run_build(command: Sequence[str], logs: Path, environment: dict[str, str]) -> None:
    """Run ninja; what a source's compiler prints follows the line that announces it, and goes to a file of its own."""
    start, output = time.monotonic(), []
    source, lines = "", list[str]()

    def finish() -> None:
        if source:
            (logs / f"{source}.log").write_text("".join(lines))

    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if edge := _EDGE.match(line):
                finish()
                found = _SOURCE.match(edge[1])
                source, lines = (found[1] if found else ""), []
                if source:
                    print(f"{time.monotonic() - start:5.0f} s  {source}", file=sys.stderr, flush=True)
            else:
                lines.append(line)
        finish()
    if process.returncode:
        raise BuildError(f"the build failed:\n{''.join(output)}")


def seconds(folder: Path, wanted: Sequence[str]) -> dict[str, float]:
    """{source: how long its last compilation took}."""
    found = {}
    for line in (folder / ".ninja_log").read_text().splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        name = Path(output).name.removesuffix(".o")
        if name in wanted:
            found[name] = (int(end) - int(start)) / 1000
    return found
