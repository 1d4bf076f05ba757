"""What came of pruning, level by level: rows, table, plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekern.training import text_table
from sparsekern.training.result import TrainResult


@dataclass
class Row:
    """One network. Accuracies are fractions, None where they were not measured.

    Attributes:
        level: 0 is the run that was pruned.
        phase: "" or, for dense-sparse-dense, "dense" for the network with all its weights back.
        target: sparsity asked for, of the pruned layers.
        sparsity: realised, of the pruned layers; 0 in phase "dense".
        pruned_acc: test accuracy right after pruning, before any training.
        train_acc, test_acc: after training (of a network that is pruned only: ``test_acc`` is ``pruned_acc``).
        net: what :func:`sparsekern.training.load_model` takes.
    """

    level: int
    phase: str
    target: float
    sparsity: float
    params: int | None
    macs: int | None
    epochs: float | None = None
    train_loss: float | None = None
    train_acc: float | None = None
    test_loss: float | None = None
    test_acc: float | None = None
    test_acc_at_best_val: float | None = None
    pruned_acc: float | None = None
    seconds: float | None = None
    net: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, result: TrainResult, **values: Any) -> Row:
        return cls(**{name: getattr(result, name) for name in _OF_RUN}, **values)

    def line(self) -> str:
        """One line of progress."""
        parts = [f"sparsity {100 * self.sparsity:.2f} %"]
        for name, value in (("pruned", self.pruned_acc), ("train", self.train_acc), ("test", self.test_acc)):
            if value is not None:
                parts.append(f"{name} accuracy {100 * value:.2f} %")
        if self.params is not None and self.macs is not None:
            parts.append(f"{self.params:,} parameters, {self.macs:,} MACs per sample")
        return f"level {self.level}{f' {self.phase}' if self.phase else ''}: {', '.join(parts)}"


_OF_RUN = (
    "params",
    "macs",
    "epochs",
    "train_loss",
    "train_acc",
    "test_loss",
    "test_acc",
    "test_acc_at_best_val",
    "seconds",
)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Heading and a line per row; columns that no row has are left out."""
    columns: list[tuple[str, Any]] = [
        ("level", lambda r: f"{r.level}{f' {r.phase}' if r.phase else ''}"),
        ("sparsity [%]", lambda r: f"{100 * r.sparsity:.2f}"),
        ("parameters", lambda r: None if r.params is None else f"{r.params:,}"),
        ("MACs per sample", lambda r: None if r.macs is None else f"{r.macs:,}"),
        ("epochs", lambda r: None if r.epochs is None else f"{r.epochs:.4g}"),
        ("pruned acc [%]", lambda r: _percent(r.pruned_acc)),
        ("train acc [%]", lambda r: _percent(r.train_acc)),
        ("test acc [%]", lambda r: _percent(r.test_acc)),
        ("test acc at best val [%]", lambda r: _percent(r.test_acc_at_best_val)),
    ]
    cells = [[title, *(text(row) for row in rows)] for title, text in columns]
    kept = [column for column in cells if any(cell is not None for cell in column[1:])]
    return [["-" if cell is None else cell for cell in line] for line in zip(*kept, strict=True)]


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.2f}"


def markdown(rows: Sequence[Row], conditions: Sequence[str]) -> str:
    head, *lines = table(rows)
    return text_table.markdown(head, lines, left=0) + "\n" + "\n".join(conditions) + "\n"


def rich_table(rows: Sequence[Row]) -> Any:
    """The table for a terminal."""
    head, *lines = table(rows)
    return text_table.terminal(head, lines, left=0)


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Training and test accuracy against sparsity into ``path``; False where there is no matplotlib or one level."""
    measured = [row for row in rows if row.test_acc is not None]
    if len({row.level for row in measured}) < 2:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # Each level removes the same fraction of the rest: evenly spaced over the logarithm of what is left. A network
    # that is dense again stands where it was pruned to.
    place = {row.level: 1 - row.sparsity for row in measured if not row.phase}
    for phase in dict.fromkeys(row.phase for row in measured):
        own = [row for row in measured if row.phase == phase or row.level == 0]
        name = f", {phase} again" if phase else ""
        for what, style in (("test", "o-"), ("train", "s:")):
            points = [(place[row.level], getattr(row, f"{what}_acc")) for row in own]
            points = [(left, accuracy) for left, accuracy in points if accuracy is not None]
            if points:
                axes.plot(*zip(*[(left, 100 * acc) for left, acc in points], strict=True), style,
                          markersize=3, linewidth=1.2, label=f"{what}{name}")  # fmt: skip
    axes.set_xscale("log")
    axes.invert_xaxis()
    left = sorted(set(place.values()), reverse=True)
    shown = left[:: -(-len(left) // 10)]
    axes.set_xticks(shown, [f"{100 * (1 - d):.3g}" for d in shown], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="sparsity of the pruned layers [%]", ylabel="accuracy [%]")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
