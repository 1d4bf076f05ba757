"""Loss and accuracy curves as a PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekern.training.metrics import read_metrics

# Colour-blind safe (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")


def plot_curves(runs: Mapping[str, str | os.PathLike[str]], path: str | os.PathLike[str]) -> bool:
    """Draw training loss and accuracy of ``runs`` {label: run folder} into ``path``.

    Returns False, drawing nothing, where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    for (label, folder), colour in zip(runs.items(), _COLOURS, strict=False):
        lines = read_metrics(Path(folder) / "metrics.jsonl")
        intervals = [line for line in lines if line["kind"] == "interval"]
        epochs = [line for line in lines if line["kind"] == "epoch"]
        loss.plot([i["step"] for i in intervals], [i["loss"] for i in intervals], color=colour, label=label)
        steps = [e["step"] for e in epochs]
        accuracy.plot(steps, [_percent(e.get("test_acc")) for e in epochs], color=colour, marker=".", label=label)
        accuracy.plot(steps, [_percent(e.get("train_acc")) for e in epochs], color=colour, linestyle=":", linewidth=1)
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    accuracy.set(xlabel="step", ylabel="accuracy [%] (solid: test, dotted: train)")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _percent(value: Any) -> float:
    return float("nan") if value is None else 100.0 * float(value)
