"""Loss and accuracy curves as a PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from sparsekern.training.metrics import read_metrics

# Colour-blind safe (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")


def plot_curves(runs: Mapping[str, str | os.PathLike[str]], path: str | os.PathLike[str]) -> bool:
    """Draw training loss and accuracy of ``runs`` {label: run folder} into ``path``.

    Where blocks moved, a third panel shows R_s, the fraction of weights that were stored at some time.

    Returns False, drawing nothing, where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    read = {label: read_metrics(Path(folder) / "metrics.jsonl") for label, folder in runs.items()}
    explored = {label: _explored(lines) for label, lines in read.items()}
    panels = 3 if any(explored.values()) else 2
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels))
    loss, accuracy = axes[:2]
    for (label, lines), colour in zip(read.items(), _COLOURS, strict=False):
        intervals = [line for line in lines if line["kind"] == "interval"]
        epochs = [line for line in lines if line["kind"] == "epoch"]
        loss.plot(
            [i["step"] for i in intervals],
            [nan if i["loss"] is None else i["loss"] for i in intervals],
            color=colour,
            label=label,
        )
        tested = [e for e in epochs if e.get("test_acc") is not None]
        accuracy.plot(
            [e["step"] for e in tested], [100 * e["test_acc"] for e in tested], color=colour, marker=".", label=label
        )
        trained = [100 * e["train_acc"] for e in epochs]
        accuracy.plot([e["step"] for e in epochs], trained, color=colour, linestyle=":", linewidth=1)
        if explored[label]:
            axes[2].step(*zip(*explored[label], strict=True), color=colour, where="post", label=label)
    if panels == 3:
        axes[2].set(xlabel="step", ylabel="$R_s$: weights stored at some time", ylim=(0, 1))
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    accuracy.set(xlabel="step", ylabel="accuracy [%] (solid: test, dotted: train)")
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)
    return True


def _explored(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """``(step, R_s)`` of a run in which it changed."""
    intervals = [line for line in lines if line["kind"] == "interval"]
    points = [(i["step"], i["exploration_rate"]) for i in intervals if i.get("exploration_rate") is not None]
    return points if len({rate for _, rate in points}) > 1 else []
