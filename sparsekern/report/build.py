"""Turns result files into a folder with the report."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from sparsekern.report import markdown, net_tables, page, tables
from sparsekern.report.results import Results, check_same_machine, load
from sparsekern.report.summary import changes


def build_report(
    paths: Sequence[Path], out: Path, *, base: Path | None = None, force: bool = False, plots: bool = True
) -> list[Path]:
    """Write ``report.md``, ``report.html``, CSV files and PNG plots.

    Args:
        paths: result files of one machine; a later file replaces equal rows of an earlier one.
        out: folder, made if it is missing; files of the same names are overwritten.
        base: results to compare with, which add base columns to the rows that both hold.
        force: accept results of different machines.
        plots: draw them, where matplotlib is installed.

    Returns:
        The files written.

    Raises:
        ReportError: a file is missing, torn, foreign or of another machine.
    """
    results = load(paths, force=force)
    compared = None
    if base is not None:
        before = load([base])
        if not force:
            check_same_machine(before, results)
        compared = changes(before.passes, results.passes)
    out.mkdir(parents=True, exist_ok=True)
    written = _write_csv(results, out)
    svgs: dict[str, str] = {}
    if plots and importlib.util.find_spec("matplotlib"):
        from sparsekern.report import plots as drawing

        for name, draw in drawing.figures(results).items():
            png = out / f"{name}.png"
            drawing.save_png(draw, png)
            svgs[name] = drawing.to_svg(draw, name)
            written.append(png)
    report = out / "report.md"
    report.write_text(markdown.render(results, compared, [f"{name}.png" for name in svgs]), encoding="utf-8")
    html = out / "report.html"
    html.write_text(page.render(results, compared, svgs), encoding="utf-8")
    return [html, report, *written]


def _write_csv(results: Results, out: Path) -> list[Path]:
    """One file per table, numbers in full, in the unit that the column names."""
    contents = {content.title.lower().replace(", ", "-"): content for content in tables.peer_tables(results.peers)}
    if results.passes:
        contents["passes"] = tables.pass_table(results.passes)
    if results.training:
        contents["training"] = tables.train_table(results.training)
    contents |= {content.title.lower().replace(" ", "-"): content for content in net_tables.whole_tables(results)}
    written = []
    for name, content in contents.items():
        path = out / f"{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*(column.name for column in content.columns), "loses"])
            for cells, loses in zip(content.rows, content.losing, strict=True):
                scaled = (
                    cell * column.unit if isinstance(cell, float) else cell
                    for cell, column in zip(cells, content.columns, strict=True)
                )
                writer.writerow([*("" if cell is None else cell for cell in scaled), int(loses)])
        written.append(path)
    return written
