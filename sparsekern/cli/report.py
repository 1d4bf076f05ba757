"""``sparsekern report``: results of the benchmarks to tables, plots and an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekern.report import ReportError, build_report


def report_command(
    results: Annotated[list[Path], typer.Argument(help="JSON files of `pytest benchmarks --benchmark-json`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("report"),
    base: Annotated[Path | None, typer.Option(help="Earlier results: adds base columns to every row.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare results of different machines.")] = False,
    plots: Annotated[bool, typer.Option(help="Draw plots (needs matplotlib).")] = True,
) -> None:
    """Write a speed report: report.html (one self-contained page), report.md, CSV files and PNG plots."""
    try:
        written = build_report(results, output, base=base, force=force, plots=plots)
    except ReportError as error:
        typer.echo(f"sparsekern report: {error}", err=True)
        raise typer.Exit(2) from None
    for path in written:
        typer.echo(path)
