"""The CUDA toolkit of this machine: its compiler, its sanitizer, and what to compile for."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parent.parent


class Missing(Exception):
    """A tool is not here; the message says which and where it was looked for."""


def _finder() -> ModuleType:
    """cmake/nvcc.py, which setup.py uses too."""
    spec = importlib.util.spec_from_file_location("sparsekern_nvcc", ROOT / "cmake" / "nvcc.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc() -> str:
    """Raises :class:`Missing` where there is none."""
    found, why = _finder().find_nvcc()
    if not found:
        raise Missing(str(why))
    return str(found)


def sanitizer() -> str:
    """compute-sanitizer, beside nvcc or on PATH; raises :class:`Missing`."""
    places = [shutil.which("compute-sanitizer"), shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")]
    try:
        places.append(shutil.which("compute-sanitizer", path=str(Path(nvcc()).parent)))
    except Missing:
        pass
    found = next(filter(None, places), None)
    if found is None:
        raise Missing("compute-sanitizer was not found on PATH, beside nvcc or in /usr/local/cuda/bin")
    return found


def architecture() -> str:
    """Of the current GPU as TORCH_CUDA_ARCH_LIST wants it: "8.0", "9.0a", ..."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")
