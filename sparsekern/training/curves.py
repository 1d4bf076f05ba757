"""Loss and accuracy curves as a PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import nan
from pathlib import Path

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
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    accuracy.set(xlabel="step", ylabel="accuracy [%] (solid: test, dotted: train)")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return True
