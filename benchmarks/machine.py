"""Facts about the machine and the software that a time depends on. No host names, no paths."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_ISA = "sse4_2 avx fma avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 amx_tile asimd sve".split()
# SPARSEKERN_BACKEND is a fact of each row, not of the machine.
_ENVIRONMENT = "OMP_NUM_THREADS OMP_PROC_BIND OMP_WAIT_POLICY MKL_NUM_THREADS SPARSEKERN_ISA".split()


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def cpu_name() -> str:
    """Model name of the processor, or what Python knows of it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def isa() -> list[str]:
    """Instruction sets among those that kernels here choose by."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    return [name for name in _ISA if name in flags]


def _version_in(text: str, pattern: str) -> str | None:
    found = re.search(pattern, text)
    return found.group(1) if found else None


def sparsekern_info() -> dict[str, Any]:
    """Version, backends and how the compiled core was built."""
    import sparsekern
    from sparsekern.backends import native

    build = dict(native.load().build_info()) if native.available() else {"missing": native.why().splitlines()[0]}
    return {"version": sparsekern.__version__, "backends": sparsekern.backends(), "build": build}


def machine_info() -> dict[str, Any]:
    """Everything that must agree before two results may be compared, under stable keys."""
    torch_build = torch.__config__.show()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": cores,
        "isa": isa(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "mkl": _version_in(torch_build, r"Math Kernel Library Version (\S+)"),
        "onednn": _version_in(torch_build, r"MKL-DNN v(\S+)"),
        "openmp": _version_in(torch_build, r"OpenMP (\d+)"),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "sparsekern": sparsekern_info(),
    }
    if torch.cuda.is_available():
        info["gpu"] = gpu_info()
    return info


_SMI_STABLE = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
_SMI_NOW = (
    *("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu", "pstate"),
    *("clocks_event_reasons.active", "memory.used"),
)


def gpu_info() -> dict[str, Any]:
    """What of the GPU and its software must agree before two results may be compared."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton_version(),
        **nvidia_smi(_SMI_STABLE),
    }


def gpu_state() -> dict[str, str]:
    """Clocks, temperature, power and what limits them, at this moment."""
    return nvidia_smi(_SMI_NOW)


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def nvidia_smi(fields: Sequence[str]) -> dict[str, str]:
    """What nvidia-smi answers for GPU 0; fields that it does not know or has no answer for are left out."""
    answer = _ask_smi(fields)
    if answer is None:  # one unknown field spoils the whole question
        single = ((name, _ask_smi([name])) for name in fields)
        return {name: found[0] for name, found in single if found and "N/A" not in found[0]}
    return {name: value for name, value in zip(fields, answer, strict=True) if "N/A" not in value}


def _ask_smi(fields: Sequence[str]) -> list[str] | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return values if done.returncode == 0 and len(values) == len(fields) else None


class Neighbours:
    """How many cores other processes kept busy since this object was made (Linux; else unknown)."""

    def __init__(self) -> None:
        self.start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        if not sys.platform.startswith("linux"):
            return None
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()

    def cores(self) -> float | None:
        """Average number of cores busy with others; None where it can't be read or the time was under 0.1 s."""
        now = self._read()
        if now is None or self.start is None or now[0] - self.start[0] < 0.1:
            return None
        wall, busy, own = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, round((busy - own) / wall, 2))


def load_average() -> list[float] | None:
    """Load over 1, 5 and 15 minutes, or None where the system has none."""
    return [round(n, 2) for n in os.getloadavg()] if hasattr(os, "getloadavg") else None
