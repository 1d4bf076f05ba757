"""The few calls into the Triton backend's own tables; each answers in words where the backend has none."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from benchmarks.device import one_line
from benchmarks.problems import Problem


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


def choices(problem: Problem, pass_: str, fallback: bool) -> dict[str, Any]:
    """The tile that the Triton backend takes for each op of a pass, where it comes from, and the times it expects."""
    tiles, facts, chips = _module("tiles"), _module("problem"), _module("chips")
    if tiles is None or facts is None or chips is None or problem.op != "linear":
        return {}
    out: dict[str, Any] = {}
    for op in ("forward", "dgrad", "wgrad") if pass_ == "step" else (pass_,):
        try:
            shape, capacity = problem.shape, problem.values.shape[0]
            asked = facts.Problem(
                *(f"linear_{op}", facts.precision(problem.dtype), problem.layout.grid.block),
                *(shape.m, shape.o, shape.i, capacity),
            )
            found = tiles.choose(asked, chips.current(problem.device), fallback)
            tile = None if found.tile is None else dataclasses.asdict(found.tile)
            out[op] = {"tile": tile, "source": found.source, "seconds": found.seconds, "dense": found.dense_seconds}
        except Exception as error:
            out[op] = one_line(error)
    return out


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
