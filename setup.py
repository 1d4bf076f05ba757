"""Build of the native core with CMake; everything else about the package is in pyproject.toml.

SPARSEKERN_BUILD=auto|cpu|cuda|none chooses what is built (docs/install.md). PyTorch is not needed here: the core
includes none of its headers. MAX_JOBS caps the parallel jobs, CMAKE_ARGS is passed on to CMake,
TORCH_CUDA_ARCH_LIST names the GPU architectures.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))
from nvcc import find_nvcc  # noqa: E402

MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("SPARSEKERN_BUILD", "") or "auto"
GIB_PER_JOB = 1.0  # memory that a compiler may need; nvcc took 0.4


def say(line: str) -> None:
    print(f"sparsekern: {line}", flush=True)


def cuda_missing() -> str:
    """Why CUDA kernels cannot be built; empty if they can."""
    if not list((ROOT / "csrc" / "cuda").glob("*.cu")):
        return "this version has no CUDA sources (csrc/cuda/*.cu); use SPARSEKERN_BUILD=auto or cpu"
    missing = find_nvcc()[1]
    return f"{missing}; install the CUDA toolkit, or name it: CUDA_HOME" if missing else ""


def available_gib() -> float:
    """Memory that compilers may use: what is free, within the limit of a container."""
    found = [float("inf")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append((limit - used) / 2**30)
    except (OSError, ValueError):
        pass  # another system, or no limit: "max"
    return min(found)


def job_count(cuda: bool) -> tuple[int, int]:
    """Jobs of ninja, and architectures that one nvcc compiles at a time: together what cores and memory bear."""
    if jobs := os.environ.get("MAX_JOBS"):
        total = max(1, int(jobs))
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        total = max(1, int(min(cores, available_gib() / GIB_PER_JOB)))
    sources = len(list((ROOT / "csrc" / "cuda").glob("*.cu"))) if cuda else total
    jobs = min(total, sources)
    return jobs, total // jobs


def section_bytes(path: Path, name: str) -> int:
    """Size of one section of a 64-bit ELF file, 0 where there is none."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return 0
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    start = headers[names][4]
    for header in headers:
        at = start + header[0]
        if data[at : data.index(b"\0", at)].decode() == name:
            return int(header[5])
    return 0


def find_tool(name: str, folder: str) -> str | None:
    """The ``cmake`` or ``ninja`` that pip installed for this build, else one on PATH.

    The wheel of that name knows where its programs are (``folder``): an environment's scripts need not be on PATH.
    """
    try:
        place = getattr(importlib.import_module(name), folder)
    except (ImportError, AttributeError):
        place = Path(sys.executable).parent
    return shutil.which(name, path=str(place)) or shutil.which(name)


def run_cmake(prefix: Path, cuda: bool) -> dict[str, Any]:
    """Configure, build and install ``_C`` into ``prefix``; returns the facts CMake wrote about the build."""
    build = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{platform.machine()}"
    cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
    if cmake is None:
        raise RuntimeError("cmake was not found; run: pip install cmake ninja pybind11")
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    jobs, threads = job_count(cuda)
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DSK_CUDA={'ON' if cuda else 'OFF'}"]
    if cuda:
        nvcc = find_nvcc()[0]
        configure += [f"-DSK_NVCC={nvcc}", f"-DSK_NVCC_THREADS={threads}"]
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"={nvcc}\n" not in cache.read_text():
            configure.append("--fresh")  # CMake does not change a compiler
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("pybind11 was not found; run: pip install cmake ninja pybind11") from None
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
    say(
        f"building the native core ({'CPU and CUDA' if cuda else 'CPU'}) with {jobs} jobs"
        + (f", {threads} architectures at a time each" if threads > 1 else "")
    )
    for command in (
        configure,
        [cmake, "--build", str(build), "--target", "_C", "--parallel", str(jobs)],
        [cmake, "--install", str(build), "--prefix", str(prefix), "--strip"],
    ):
        say(shlex.join(command))
        if subprocess.run(command).returncode:
            raise RuntimeError(f"this step failed, its output is above: {shlex.join(command)}")
    facts: dict[str, Any] = json.loads((build / "facts.json").read_text())
    return facts


def attempts() -> list[str]:
    """What to try in turn, the first that succeeds is kept: "cuda", "cpu" or "none"."""
    missing = cuda_missing()
    if MODE == "cuda":
        if missing:
            raise SystemExit(f"sparsekern: SPARSEKERN_BUILD=cuda: {missing}")
        return ["cuda"]
    if MODE == "auto":
        if missing:
            say(f"no CUDA kernels: {missing.split(';')[0]}")
        return ["cpu", "none"] if missing else ["cuda", "cpu", "none"]
    return [MODE]


def build_native(folder: Path) -> None:
    """Put ``_C`` and ``_build.json``, the record of what was built, into ``folder``."""
    version: dict[str, str] = {}
    exec((ROOT / "sparsekern" / "_version.py").read_text(), version)
    record: dict[str, Any] = {"version": version["__version__"], "mode": MODE, "native": "none", "error": ""}
    record["python"] = platform.python_version()
    for target in attempts():
        if target == "none":
            break
        try:
            record |= run_cmake(folder, cuda=target == "cuda") | {"native": target}
            break
        except (RuntimeError, OSError) as error:
            if MODE != "auto":
                raise SystemExit(f"sparsekern: SPARSEKERN_BUILD={MODE}: {error}") from None
            record["error"] = str(error)
            say(f"WARNING: no {target} kernels, going on without (an error with SPARSEKERN_BUILD={target}): {error}")
    module = folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if record["native"] != "none":
        record |= {"bytes": module.stat().st_size, "cuda_bytes": section_bytes(module, ".nv_fatbin")}
    (folder / "_build.json").write_text(json.dumps(record, indent=2) + "\n")
    say(f"built: {summary(record)}")


def summary(record: dict[str, Any]) -> str:
    names = {"none": "pure Python, no native core", "cpu": "CPU kernels", "cuda": "CPU and CUDA kernels"}
    details = [
        f"{key} {record[key]}" for key in ("compiler", "openmp", "cuda_compiler", "cuda_archs") if record.get(key)
    ]
    if isas := record.get("isas"):
        details.append("instruction sets " + ", ".join(isas))
    if size := record.get("bytes"):
        cuda = record["cuda_bytes"]
        details.append(f"_C {size / 1e6:.1f} MB" + (f", of which CUDA {cuda / 1e6:.1f} MB" if cuda else ""))
    return names[record["native"]] + (f" ({'; '.join(details)})" if details else "")


class BuildPy(build_py):
    def run(self) -> None:
        target = Path(self.build_lib) / "sparsekern"
        if not self.editable_mode:
            # setuptools never removes a module that the source no longer has.
            shutil.rmtree(target, ignore_errors=True)
        super().run()
        if MODE == "none":
            build_native(ROOT / "sparsekern" if self.editable_mode else target)


class BuildExt(build_ext):
    def run(self) -> None:
        target = Path(self.get_ext_fullpath("sparsekern._C")).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build_native(target.parent)
        if not target.exists():
            self.extensions = []  # the fall-back to pure Python: nothing to install


if MODE not in MODES:
    raise SystemExit(f"sparsekern: SPARSEKERN_BUILD: expected {', '.join(MODES)}, got {MODE}")
setup(
    ext_modules=[] if MODE == "none" else [Extension("sparsekern._C", sources=[])],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
)
