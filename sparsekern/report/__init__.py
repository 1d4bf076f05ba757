"""Speed reports: results of the benchmarks to Markdown, CSV, plots and one HTML page."""

from sparsekern.report.build import build_report
from sparsekern.report.results import ReportError, Results, load

__all__ = ["ReportError", "Results", "build_report", "load"]
