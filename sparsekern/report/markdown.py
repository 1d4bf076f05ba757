"""A report in Markdown."""

from __future__ import annotations

from sparsekern.report import net_tables, tables
from sparsekern.report.results import Results
from sparsekern.report.summary import Change, grouped
from sparsekern.report.tables import Table


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(content: Table) -> str:
    """A pipe table; rows in which sparse is slower than dense begin with a triangle."""
    out = [
        "| | " + " | ".join(_escape(column.name) for column in content.columns) + " |",
        "|---|" + "---|" * len(content.columns),
    ]
    for cells, loses in zip(content.rows, content.losing, strict=True):
        printed = (_escape(tables.text(cell, column)) for cell, column in zip(cells, content.columns, strict=True))
        out.append(f"| {'▼' if loses else ''} | " + " | ".join(printed) + " |")
    return "\n".join(out)


def render(results: Results, changes: dict[tuple[object, ...], Change] | None, plots: list[str]) -> str:
    """The whole report; ``plots`` are file names beside it."""
    out = ["# Speed report", "", "| | |", "|---|---|"]
    out += [f"| {_escape(name)} | {_escape(value)} |" for name, value in tables.conditions(results)]
    out += ["", *(f"> **Warning.** {_escape(warning)}\n" for warning in results.warnings())]
    out += ["| figure | geometric mean | over |", "|---|---|---|"]
    out += [f"| {_escape(what)} | {value} | {_escape(detail)} |" for what, value, detail in tables.headline(results)]
    out += ["", "▼ marks rows in which sparse is slower than dense.", ""]
    out += [f"![{name.removesuffix('.png')}]({name})\n" for name in plots]
    for content in net_tables.whole_tables(results):
        out += [f"## {content.title}", "", content.note, "", table(content), ""]
    if results.missing:
        out += ["Not measured:", "", *(f"- {_escape(row.what)}: {_escape(row.reason)}" for row in results.missing), ""]
    if results.training:
        content = tables.train_table(results.training)
        out += [f"## {content.title}", "", content.note, "", table(content), ""]
    if results.passes:
        content = tables.mean_table(results.passes)
        out += [f"## {content.title}", "", content.note, "", table(content), ""]
    for content in tables.peer_tables(results.peers):
        out += [f"## {content.title}", "", content.note, "", table(content), ""]
    if results.peers:
        failed = tables.failed_peers(results.peers)
        out += [f"- {_escape(peer)}: {_escape(reason)} ({count} rows)" for peer, reason, count in failed] + [""]
    for (op, pass_), rows in grouped(results.passes, lambda row: (row.op, row.pass_)).items():
        out += [f"## {op}, {pass_}", "", table(tables.pass_table(rows, changes)), ""]
    return "\n".join(out)
