"""``python benchmarks/report.py results.json -o report/``: the same as ``sparsekern report``."""

import typer

from sparsekern.cli.report import report_command

if __name__ == "__main__":
    typer.run(report_command)
