"""Loads the compiled core ``sparsekern._C``: lazily, once, with the reason kept where it fails."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  loads the OpenMP runtime that the core then shares

from sparsekern.backends import allocator

_logger = logging.getLogger("sparsekern")
_FOLDER = Path(__file__).resolve().parent.parent
_memory: list[str] = []
_FIX = "run `python -m sparsekern` for what was looked for and how to fix it"


class NativeError(RuntimeError):
    """The compiled core was asked for and is not there."""


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and why; the failure is logged once."""
    try:
        module = importlib.import_module("sparsekern._C")
        _memory.append(allocator.keep_memory())
        return module, ""
    except ModuleNotFoundError:
        reason = "the package was installed without its native core"
        if recorded := build_record().get("error"):
            reason = f"{reason} ({recorded})"
    except ImportError as error:
        reason = f"the native core does not load: {error}"
    _logger.info("%s; %s", reason, _FIX)
    return None, reason


def load() -> ModuleType:
    """The module ``sparsekern._C``.

    Raises:
        NativeError: it is missing or does not load.
    """
    module, reason = _load()
    if module is None:
        raise NativeError(f"{reason}; {_FIX}")
    return module


def available() -> bool:
    """Whether the core loads."""
    return _load()[0] is not None


def why() -> str:
    """Why the core is not available; empty if it is."""
    return _load()[1]


def build_record() -> dict[str, Any]:
    """What the installation recorded (``_build.json``); empty in a source tree that was never built."""
    try:
        record = json.loads((_FOLDER / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def build_info() -> dict[str, Any]:
    """How the core was built: the installation's record, and what the loaded module says of itself.

    Keys as far as known: ``mode`` (SPARSEKERN_BUILD), ``native`` ("none", "cpu", "cuda"), ``version``, ``compiler``,
    ``isas`` built, ``isa`` chosen on this processor, ``openmp``, ``cuda_archs`` and ``cuda_compiler`` (empty without
    CUDA kernels), ``bytes`` and ``cuda_bytes`` of the file, ``path``, ``malloc``.
    """
    info = build_record()
    module = _load()[0]
    if module is not None:
        info |= {key: value for key, value in module.build_info().items() if value or key not in info}
        info["path"] = module.__file__
        info["malloc"] = _memory[0]
    return info


def cuda_image(archs: str, capability: tuple[int, int]) -> str:
    """Which code for ``archs`` ("8.0 9.0a 10.0+PTX") a device of this compute capability runs.

    "sm_90a": machine code, for the same major version and no later minor one ("a": for that version alone).
    "compute_100": PTX of an earlier version, which the driver compiles at first use. Empty: none.
    """
    code, ptx = [], []
    for major, minor, exact, with_ptx in re.findall(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", archs):
        version = (int(major), int(minor))
        if version == capability or (not exact and version[0] == capability[0] and version < capability):
            code.append((version, f"sm_{major}{minor}{exact}"))
        if with_ptx and (version == capability or (not exact and version < capability)):
            ptx.append((version, f"compute_{major}{minor}{exact}"))
    found = code or ptx
    return max(found)[1] if found else ""
