"""Plots of a study: accuracy by block, and how much of the network was explored."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from sparsekern.studies.dst import DENSE, SMALL
from sparsekern.studies.summary import Row, Summary

# Colour-blind safe (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw_accuracy(summary: Summary, path: Path) -> bool:
    """Test accuracy over the block size, a panel per sparsity, bars of one standard deviation over seeds.

    Returns False, drawing nothing, where matplotlib is not installed or no cell has finished.
    """
    figure = _figure(summary) if any(row.test_acc is not None for row in summary.rows) else None
    if figure is None:
        return False
    study, axes = summary.study, figure.axes
    places = list(range(len(study.blocks)))
    for axis, sparsity in zip(axes, study.sparsities, strict=True):
        for index, method in enumerate(study.methods):
            rows = [summary.row(method, sparsity, block) for block in study.blocks]
            drawn = [(x, row) for x, row in zip(places, rows, strict=True) if row and row.test_acc is not None]
            if drawn:
                axis.errorbar(
                    [x + 0.06 * (index - (len(study.methods) - 1) / 2) for x, _ in drawn],
                    [100 * (row.test_acc or 0.0) for _, row in drawn],
                    yerr=[100 * (row.test_acc_std or 0.0) for _, row in drawn],
                    color=_COLOURS[index % len(_COLOURS)], marker=_MARKERS[index % len(_MARKERS)], capsize=3,
                    linewidth=1, label=method,
                )  # fmt: skip
        _level(axis, summary.row(DENSE, 0.0), "dense", "0.2", "-")
        _level(axis, summary.row(SMALL, sparsity), "dense, narrower", "0.5", "--")
        axis.set_xticks(places, study.blocks)
        axis.set(title=f"sparsity {sparsity:g}", xlabel="block", ylabel="test accuracy [%]")
    _finish(figure, len(study.methods) + 2)
    figure.savefig(path, dpi=120)
    return True


def _level(axis: Any, row: Row | None, label: str, colour: str, line: str) -> None:
    if row is None or row.test_acc is None:
        return
    mean, std = 100 * row.test_acc, 100 * (row.test_acc_std or 0.0)
    axis.axhline(mean, color=colour, linestyle=line, linewidth=1, label=label)
    axis.axhspan(mean - std, mean + std, color=colour, alpha=0.1, linewidth=0)


def draw_exploration(summary: Summary, path: Path) -> bool:
    """R_s over the steps, mean over the finished seeds: a panel per sparsity, a colour per method, a line per block.

    Returns False, drawing nothing, where matplotlib is not installed or no sparse cell has finished.
    """
    curves = exploration_curves(summary)
    figure = _figure(summary) if curves else None
    if figure is None:
        return False
    study = summary.study
    for axis, sparsity in zip(figure.axes, study.sparsities, strict=True):
        for (method, of, block), points in curves.items():
            if of == sparsity:
                axis.step(
                    *zip(*points, strict=True), where="post", linewidth=1.2, label=f"{method}, block {block}",
                    color=_COLOURS[study.methods.index(method) % len(_COLOURS)],
                    linestyle=_LINES[study.blocks.index(block) % len(_LINES)],
                )  # fmt: skip
        axis.set(title=f"sparsity {sparsity:g}", xlabel="step", ylabel="$R_s$: weights stored at some time")
        axis.set_ylim(0, 1.02)
    _finish(figure, len(study.blocks))
    figure.savefig(path, dpi=120)
    return True


def exploration_curves(summary: Summary) -> dict[tuple[str, float, str], list[tuple[int, float]]]:
    """``(step, R_s)`` by method, sparsity and block: the mean of the seeds, at steps that all of them report."""
    groups: dict[tuple[str, float, str], list[dict[int, float]]] = {}
    for result in summary.cells:
        if result.explored:
            groups.setdefault(result.cell.row, []).append(dict(result.explored))
    curves = {}
    for key, runs in groups.items():
        steps = sorted(set(runs[0]).intersection(*runs[1:]))
        curves[key] = [(step, statistics.fmean(run[step] for run in runs)) for step in steps]
    return curves


def _figure(summary: Summary) -> Any:
    """A figure with an axis per sparsity, None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    panels = len(summary.study.sparsities)
    figure = Figure(figsize=(1 + 4.5 * panels, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(1, panels, sharey=True)
    return figure


def _finish(figure: Any, columns: int) -> None:
    """Grids, and one legend below all panels, where it hides no line."""
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    entries = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, fontsize=7)
