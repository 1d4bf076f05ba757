"""Writes what a study found: ``table.md``, ``table.csv``, ``results.json``, ``accuracy.png``, ``exploration.png``."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, fields
from pathlib import Path

from sparsekern.studies.dst import BASE, DENSE, SMALL
from sparsekern.studies.folder import write_text
from sparsekern.studies.plots import draw_accuracy, draw_exploration
from sparsekern.studies.summary import Row, Summary, summarise
from sparsekern.training import text_table

_TITLES = {DENSE: "dense", SMALL: "dense, narrower"}


def write_outputs(out: str | os.PathLike[str]) -> list[Path]:
    """Tables and plots of what is finished in ``out``, the study's folder, to which they are written.

    Returns:
        The files written; no plots where matplotlib is missing or no cell has finished.
    """
    folder, summary = Path(out), summarise(out)
    texts = {
        "table.md": markdown(summary),
        "table.csv": table_csv(summary),
        "results.json": json.dumps(summary.to_dict(), indent=1) + "\n",
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    written = [folder / name for name in texts]
    for name, draw in (("accuracy.png", draw_accuracy), ("exploration.png", draw_exploration)):
        if draw(summary, folder / name):
            written.append(folder / name)
    return written


def title(row: Row, widths: dict[float, float]) -> str:
    """``set``, ``dense`` or ``dense, narrower (width 0.31)``."""
    name = _TITLES.get(row.method, row.method)
    return f"{name} (width {widths[row.sparsity]:.3g})" if row.method == SMALL and row.sparsity in widths else name


def markdown(summary: Summary) -> str:
    """The table, how the numbers were made, and the cells that are not in it."""
    head = [
        "net",
        "sparsity",
        "block",
        "test accuracy [%]",
        "parameters",
        "MACs",
        "R_s",
        "reliably",
        "mean density",
        "seeds",
    ]
    lines = []
    widths = dict(summary.study.widths)
    for row in summary.rows:
        line = [
            title(row, widths),
            f"{row.sparsity:g}" if row.sparsity else "-",
            row.block or "-",
            _spread(row.test_acc, row.test_acc_std, 100.0, 2),
            "-" if row.params is None else f"{row.params:,.0f}",
            "-" if row.macs is None else f"{row.macs:,.0f}",
            _spread(row.exploration, row.exploration_std, 1.0, 3),
            "-" if row.reliable is None else f"{row.reliable:.3f}",
            "-" if row.mean_density is None else f"{row.mean_density:.3f}",
            str(row.seeds) if row.seeds == row.planned else f"{row.seeds} of {row.planned}",
        ]
        lines.append(line)
    table = text_table.markdown(head, lines, left=2)
    return table + "\n" + "\n".join([*conditions(summary), *_unfinished(summary)]) + "\n"


def conditions(summary: Summary) -> list[str]:
    study = summary.study
    config = study.config(study.cells()[0])
    length = f"{config.steps} steps" if config.steps else f"{config.epochs} epochs"
    given = {**BASE, **study.base}
    options = ", ".join(f"{name} {value}" for name, value in sorted(given.items()) if not _operational(name))
    return [
        f"- {config.model} on {config.data}, {length}, batch {config.batch_size}; the same epochs for every net. "
        f"Options: {options}.",
        "- Accuracy of the last epoch, mean and sample standard deviation over seeds (weights, masks and data order).",
        "- Parameters and MACs per sample after training; layers that may not be sparse (classifier, stem) are dense "
        "in all nets. The narrower net has the MACs of the sparse ones.",
        "- R_s: fraction of the sparse layers' weights that were stored at some time; reliably: those whose blocks an "
        "update kept. Mean density: share of their blocks stored, mean over the steps; where it is above the final "
        "one, training cost more.",
    ]


def _operational(name: str) -> bool:
    from sparsekern.training.config import TrainConfig

    return any(f.name == name and f.metadata["option"].operational for f in fields(TrainConfig))


def _unfinished(summary: Summary) -> list[str]:
    lines = []
    failed = summary.in_state("failed")
    if failed:
        lines += ["", f"Failed: {len(failed)}", ""]
        lines += [f"- {one.cell.name}: {' '.join(one.error.split())}" for one in failed]
    for state, word in (("running", "Running"), ("open", "Not run yet")):
        names = [one.cell.name for one in summary.in_state(state)]
        if names:
            lines += ["", f"{word}: {len(names)} of {len(summary.cells)} ({', '.join(names[:4])}"]
            lines[-1] += ", ...)" if len(names) > 4 else ")"
    return lines


def _spread(mean: float | None, std: float | None, unit: float, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{unit * mean:.{digits}f}" + ("" if std is None else f" ± {unit * std:.{digits}f}")


def table_csv(summary: Summary) -> str:
    """The rows in full precision, accuracies as fractions."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for row in summary.rows:
        writer.writerow(["" if value is None else value for value in asdict(row).values()])
    return file.getvalue()
