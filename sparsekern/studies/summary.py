"""What the finished cells of a study say: one row per method, sparsity and block, over the seeds."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsekern.studies.dst import BASELINES, Cell, DstStudy
from sparsekern.studies.folder import StudyFolder
from sparsekern.training.metrics import read_metrics

# Of result.json, by cell.
_TAKEN = (
    "test_acc", "test_loss", "train_acc", "params", "macs", "layers", "exploration_rate", "reliably_explored",
    "updates", "steps", "seconds", "step_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class CellResult:
    """One cell.

    Attributes:
        state: "done", "failed", "running" or "open".
        error: why it failed.
        values: of its ``result.json``, empty unless done.
        mean_density: share of the sparse layers' blocks that was stored, mean over the steps; None for dense nets.
        explored: ``(step, R_s)`` as it rose; of a static net its constant.
    """

    cell: Cell
    state: str
    error: str
    values: Mapping[str, Any]
    mean_density: float | None
    explored: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Row:
    """The cells that differ in their seed alone. Means over the finished ones; accuracies are fractions.

    Attributes:
        seeds: finished cells.
        planned: cells, finished or not.
        test_acc_std: sample standard deviation over seeds; None below two. The same for ``exploration_std``.
        params, macs: of the net after training.
        reliable: share of the sparse layers' weights whose blocks an update kept; None where blocks do not move.
        mean_density: share of the sparse layers' blocks stored, mean over the training steps.
    """

    method: str
    sparsity: float
    block: str
    seeds: int
    planned: int
    test_acc: float | None
    test_acc_std: float | None
    params: float | None
    macs: float | None
    exploration: float | None
    exploration_std: float | None
    reliable: float | None
    mean_density: float | None

    @property
    def key(self) -> tuple[str, float, str]:
        return self.method, self.sparsity, self.block


@dataclass(frozen=True)
class Summary:
    """Every cell of a study, and the rows they make."""

    study: DstStudy
    cells: list[CellResult]
    rows: list[Row]

    def row(self, method: str, sparsity: float, block: str = "") -> Row | None:
        return next((row for row in self.rows if row.key == (method, sparsity, block)), None)

    def in_state(self, state: str) -> list[CellResult]:
        return [result for result in self.cells if result.state == state]

    def to_dict(self) -> dict[str, Any]:
        cells = []
        for one in self.cells:
            about = {"name": one.cell.name, **asdict(one.cell), "state": one.state, "error": one.error}
            cells.append({**about, "mean_density": one.mean_density, **one.values})
        return {"study": self.study.to_dict(), "rows": [asdict(row) for row in self.rows], "cells": cells}


def summarise(out: str | os.PathLike[str]) -> Summary:
    """Read the study in ``out``; :class:`ConfigError` where there is none."""
    folder = StudyFolder(out)
    study = folder.load()
    cells = [_cell(folder, cell) for cell in study.cells()]
    groups: dict[tuple[str, float, str], list[CellResult]] = {}
    for result in cells:
        groups.setdefault(result.cell.row, []).append(result)
    rows = [_row(group) for group in groups.values()]
    order = {method: place for place, method in enumerate((*BASELINES, *study.methods))}
    # Dense first; then by sparsity the narrower net and the sparse ones, blocks together.
    blocks = {block: place for place, block in enumerate(("", *study.blocks))}
    rows.sort(key=lambda row: (row.sparsity, blocks[row.block], order[row.method]))
    return Summary(study, cells, rows)


def _cell(folder: StudyFolder, cell: Cell) -> CellResult:
    state = folder.state(cell)
    if state != "done":
        failure = folder.failure(cell) if state == "failed" else None
        return CellResult(cell, state, failure["error"] if failure else "", {}, None, [])
    run = folder.run(cell)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    values = {name: result.get(name) for name in _TAKEN}
    if cell.method in BASELINES:
        return CellResult(cell, state, "", values, None, [])
    lines = read_metrics(run / "metrics.jsonl")
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    densities = _densities(plan, lines)
    steps = int(result["steps"])
    ends = [*(step for step, _ in densities[1:]), steps]
    total = sum(density * (end - step) for (step, density), end in zip(densities, ends, strict=True))
    return CellResult(cell, state, "", values, total / steps, _explored(lines, result, densities[0][1]))


def _densities(plan: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """``(step, density from then on)`` by blocks; only of gradual pruning does it change.

    The plan holds the counts at the end; going back through the updates gives those before.
    """
    sparse = [layer for layer in plan["layers"] if layer["state"] != "dense"]
    stored, blocks = sum(layer["nnz"] for layer in sparse), sum(layer["blocks"] for layer in sparse)
    densities = []
    for update in sorted((line for line in lines if line["kind"] == "update"), key=lambda line: -line["step"]):
        densities.append((update["step"], stored / blocks))
        stored += update["dropped"] - update["grown"]
    return [*reversed([*densities, (0, stored / blocks)])]


def _explored(lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any], start: float) -> list[tuple[int, float]]:
    points = [(line["step"], line["exploration_rate"]) for line in lines if line.get("exploration_rate") is not None]
    if points:
        return [(0, min(start, points[0][1])), *points]
    rate = result.get("exploration_rate")
    return [] if rate is None else [(0, rate), (result["steps"], rate)]


def _row(group: Sequence[CellResult]) -> Row:
    done = [result for result in group if result.state == "done"]

    def taken(name: str) -> list[float]:
        return [one.values[name] for one in done if one.values.get(name) is not None]

    accuracies, explored = taken("test_acc"), taken("exploration_rate")
    densities = [one.mean_density for one in done if one.mean_density is not None]
    return Row(
        *group[0].cell.row,
        seeds=len(done),
        planned=len(group),
        test_acc=_mean(accuracies),
        test_acc_std=_std(accuracies),
        params=_mean(taken("params")),
        macs=_mean(taken("macs")),
        exploration=_mean(explored),
        exploration_std=_std(explored),
        reliable=_mean(taken("reliably_explored")),
        mean_density=_mean(densities),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
