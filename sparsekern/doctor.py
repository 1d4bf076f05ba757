"""What is installed, what runs here, and how to fix what doesn't: ``python -m sparsekern``, ``sparsekern doctor``."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsekern._version import __version__
from sparsekern.backends import native

_REINSTALL = "pip install --force-reinstall --no-deps"
_OPENMP_NAMES = ("libgomp", "libiomp", "libomp")


@dataclass
class Report:
    """Facts by section, and what is wrong.

    Attributes:
        facts: {section: {name: value}} in print order.
        problems: pairs of what is wrong and what to do.
        healthy: False where a native core should be there and is not.
    """

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    healthy: bool = True


def collect() -> Report:
    """Look at this process and this machine; loads the native core, starts no CUDA context unless a GPU is there."""
    report = Report()
    report.facts["versions"] = _versions()
    report.facts["processor"] = {
        "name": _cpu_name(),
        "cores": f"{_cores()} usable, torch uses {torch.get_num_threads()} threads",
        "instruction set": str(native.build_info().get("isa", "chosen by the native core, which is missing")),
    }
    report.facts["native core"] = _native(report)
    report.facts["OpenMP"] = _openmp(report, _mapped_files())
    report.facts["CUDA"] = _cuda(report, _devices(), _driver())
    report.facts["backends"] = _backends(report)
    return report


def _versions() -> dict[str, str]:
    found = {"sparsekern": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _native(report: Report) -> dict[str, str]:
    info = native.build_info()
    facts = {"found": str(info["path"]) if native.available() else f"no: {native.why()}"}
    labels = {"mode": "SPARSEKERN_BUILD", "native": "kernels", "compiler": "compiler"}
    facts |= {label: str(info[key]) for key, label in labels.items() if info.get(key)}
    if info.get("isas"):
        facts["instruction sets"] = ", ".join(info["isas"])
    if info.get("bytes"):
        facts["size"] = f"{info['bytes'] / 1e6:.1f} MB"
    if info.get("openmp"):
        facts["OpenMP"] = str(info["openmp"])
    if native.available():
        built = info.get("version", __version__)
        if built != __version__:
            report.problems.append(
                (f"the native core was built for sparsekern {built}, this is {__version__}", f"{_REINSTALL} sparsekern")
            )
        return facts

    wanted = os.environ.get("SPARSEKERN_BACKEND", "")
    if info.get("mode") == "none" and wanted not in ("cpu", "cuda"):
        facts["why"] = f"pure Python on request; for C++ kernels: SPARSEKERN_BUILD=cpu {_REINSTALL} sparsekern"
        return facts
    report.healthy = False
    report.problems.append((f"no native core: {native.why()}", _native_fix(info)))
    return facts


def _native_fix(info: dict[str, Any]) -> str:
    again = f"SPARSEKERN_BUILD=cpu {_REINSTALL} -v sparsekern"
    if not info:
        return "this is a source tree that was never built; run in it: pip install -e . (or pip install .)"
    if info.get("native") == "none":
        return f"install a C++17 compiler (g++ or clang++), then: {again}; in a source tree: . for the last word"
    return f"it was built for Python {info.get('python', 'of another version')}; build it again: {again}"


def _mapped_files() -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and "/" in line]


def openmp_runtimes(mapped: Iterable[str]) -> list[str]:
    """The OpenMP runtime libraries among the files mapped into a process, each once, in order."""
    return list(dict.fromkeys(path for path in mapped if Path(path).name.startswith(_OPENMP_NAMES)))


def _openmp(report: Report, mapped: Iterable[str]) -> dict[str, str]:
    runtimes = openmp_runtimes(mapped)
    if len(runtimes) > 1:
        report.problems.append(
            (
                f"{len(runtimes)} OpenMP runtimes in one process: two thread pools compete for the cores",
                "import torch before other native packages; rebuild sparsekern with g++, which shares torch's libgomp",
            )
        )
    return {f"runtime {i}": path for i, path in enumerate(runtimes, 1)} or {"runtime": "none found"}


def _devices() -> list[tuple[str, tuple[int, int]]]:
    """(name, compute capability) of each GPU that torch can use."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]


def _driver() -> tuple[int, int]:
    """The newest CUDA that the driver serves; (0, 0) where there is none."""
    version = int(getattr(torch._C, "_cuda_getDriverVersion", int)())
    return version // 1000, version % 1000 // 10


def _cuda(report: Report, devices: list[tuple[str, tuple[int, int]]], driver: tuple[int, int]) -> dict[str, str]:
    if devices:
        facts = {
            f"device {i}": f"{name}, compute capability {major}.{minor}"
            for i, (name, (major, minor)) in enumerate(devices)
        }
        facts["driver"] = f"serves CUDA up to {driver[0]}.{driver[1]}"
    elif torch.version.cuda is None:
        facts = {"devices": "none (this torch is built without CUDA)"}
    else:
        facts = {"devices": f"none (torch has CUDA {torch.version.cuda}, no usable GPU or driver)"}
    return facts | _cuda_kernels(report, devices, driver)


def _cuda_kernels(
    report: Report, devices: list[tuple[str, tuple[int, int]]], driver: tuple[int, int]
) -> dict[str, str]:
    """The CUDA C++ kernels in the native core, and whether the devices at hand can run them."""
    info = native.build_info()
    archs, compiler = str(info.get("cuda_archs", "")), str(info.get("cuda_compiler", ""))
    versions = " ".join(dict.fromkeys(f"{major}.{minor}" for _, (major, minor) in devices))
    again = f"SPARSEKERN_BUILD=cuda {_REINSTALL} -v sparsekern"
    if not native.available() or not archs:
        failed = info.get("error") if info.get("native") == "cpu" else ""
        if failed:
            report.problems.append((f"no CUDA C++ kernels: their build failed: {failed}", f"{again}  shows why"))
        if not devices:
            return {"kernels": "not built"}
        return {"kernels": f"not built, Triton serves the GPU; with the CUDA toolkit: {again}"}

    size = f", {info['cuda_bytes'] / 1e6:.1f} MB" if info.get("cuda_bytes") else ""
    facts = {"kernels": f"for {archs}" + (f", by nvcc {compiler}" if compiler else "") + size}
    images = {i: native.cuda_image(archs, capability) for i, (_, capability) in enumerate(devices)}
    for i, image in images.items():
        compiled = " (PTX that the driver compiles at first use)" if image.startswith("compute") else ""
        facts[f"device {i} runs"] = f"{image or 'none of them'}{compiled}"
    if missing := [i for i, image in images.items() if not image]:
        names = ", ".join(f"{devices[i][0]} ({'.'.join(map(str, devices[i][1]))})" for i in missing)
        if all(devices[i][1] < (8, 0) for i in missing):
            fix = "none: they need compute capability 8.0; the dense backend computes there"
        else:
            fix = f'TORCH_CUDA_ARCH_LIST="{versions}" {again}'
        report.problems.append((f"the CUDA kernels are for {archs}, which {names} cannot run", fix))
    if devices and compiler and int(compiler.split(".")[0]) > driver[0]:
        report.problems.append(
            (
                f"the CUDA kernels were built by nvcc {compiler}, the driver serves CUDA up to {driver[0]}.{driver[1]}",
                f"update the driver, or build them with CUDA {driver[0]}: CUDA_HOME=/path/to/it {again}",
            )
        )
    return facts


def _backends(report: Report) -> dict[str, str]:
    module = importlib.import_module("sparsekern.backends")
    found: dict[str, str] = module.backends()
    forced = os.environ.get("SPARSEKERN_BACKEND", "") or "auto"
    if forced != "auto" and found.get(forced) != "available":
        reason = found.get(forced, f"expected one of auto, {', '.join(found)}")
        report.problems.append((f"SPARSEKERN_BACKEND={forced}: {reason}", "unset it, or fix what it names"))
    return {**found, "SPARSEKERN_BACKEND": forced}


def show(report: Report, console: Console | None = None) -> None:
    """Print the report."""
    console = console or Console()
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section, facts in report.facts.items():
        for i, (name, value) in enumerate(facts.items()):
            table.add_row("" if i else f"[bold]{section}[/bold]", name, escape(value))
    console.print(table)
    for what, fix in report.problems:
        text = f"[bold red]problem[/bold red]  {escape(what)}\n[bold]fix[/bold]      {escape(fix)}"
        console.print(text, highlight=False, soft_wrap=True)
    if not report.problems:
        console.print("[bold green]all is well[/bold green]")


def main() -> int:
    """Print the report; returns the exit status: 0, or 1 where the native core is missing while it should be there."""
    report = collect()
    show(report)
    return 0 if report.healthy else 1
