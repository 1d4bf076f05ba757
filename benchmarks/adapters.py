"""The few calls into the Triton backend's own tables; each answers in words where the backend has none."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from benchmarks.device import one_line


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"sparsekern.backends.triton.{name}")
    except ImportError:
        return None


def chip_name() -> str | None:
    """The backend's name of the current GPU, None where it has no table of GPUs."""
    chips = _module("chips")
    return str(chips.current("cuda").name) if chips is not None and hasattr(chips, "current") else None


def remember(figures: dict[str, Any]) -> str:
    """Keep measured limits for the backend's model of this GPU; returns what was done."""
    chips = _module("chips")
    if chips is None or not hasattr(chips, "remember"):
        return "not kept: the backend has no table of GPUs"
    if not figures:
        return "nothing to keep"
    try:
        chips.remember(chip_name(), **figures)
    except Exception as error:
        return f"not kept: {one_line(error)}"
    return f"kept for {chip_name()}: {', '.join(figures)}"


def export_tiles(path: Path) -> str:
    """Write the table of tuned tiles, the user's measurements merged in; returns what was done."""
    table, name = _module("table"), chip_name()
    if table is None or not hasattr(table, "export") or name is None:
        return "not exported: the backend has no table of tiles"
    try:
        table.export(path, (name,))
    except Exception as error:
        return f"not exported: {one_line(error)}"
    return f"exported to {path.name}"
