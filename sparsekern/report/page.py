"""A report as one HTML page: no external resources, sortable tables, light and dark."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from sparsekern.report import net_tables, tables
from sparsekern.report.results import Results
from sparsekern.report.summary import Change
from sparsekern.report.tables import Table

_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f5f6f8; --ink: #1c2026; --muted: #5f6671; --line: #d9dde3;
  --accent: #1f6fc0; --lose: #b3202c; --lose-back: #fdecec; --warn-back: #fff4d6; --warn-line: #d9a400; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1d2127; --ink: #e6e8eb; --muted: #9aa2ad; --line: #343a43;
    --accent: #6db1f5; --lose: #ff8d92; --lose-back: #3a1e21; --warn-back: #3a3117; --warn-line: #b98f10; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 40px 0 8px; }
p { margin: 6px 0; }
.note { color: var(--muted); max-width: 90ch; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px; margin: 20px 0; }
.figures div { background: var(--card); border-radius: 8px; padding: 12px 14px; }
.figures strong { display: block; font-size: 24px; line-height: 1.2; }
.figures span { display: block; font-size: 13px; }
.figures small { color: var(--muted); }
.warning { background: var(--warn-back); border-left: 4px solid var(--warn-line); padding: 8px 12px; margin: 8px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0; font-size: 14px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 20px 0; overflow-x: auto; }
figure svg { width: 100%; min-width: 640px; height: auto; display: block; }
figure svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow: auto; max-height: 70vh; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 4px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th.word, td.word { text-align: left; }
thead th { position: sticky; top: 0; background: var(--card); padding: 0; }
th button { all: unset; cursor: pointer; padding: 6px 9px; display: block; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
tr.loses td { background: var(--lose-back); color: var(--lose); }
.filters { display: flex; flex-wrap: wrap; gap: 8px 14px; margin: 8px 0; font-size: 13px; align-items: center; }
.filters select { font: inherit; padding: 2px 4px; }
"""

_SCRIPT = """
"use strict";
for (const box of document.querySelectorAll(".table")) {
  const table = box.querySelector("table"), body = table.tBodies[0];
  const rows = Array.from(body.rows), heads = Array.from(table.tHead.rows[0].cells);
  const key = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent;
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
    const known = rows.filter(row => key(row, i) !== ""), unknown = rows.filter(row => key(row, i) === "");
    known.sort((a, b) => {
      const x = key(a, i), y = key(b, i), numeric = x - y;
      return down * (Number.isNaN(numeric) ? x.localeCompare(y) : numeric);
    });
    body.append(...known, ...unknown);
  }));
  const filters = box.querySelector(".filters");
  if (!filters) continue;
  const chosen = new Map(), count = document.createElement("span");
  const apply = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !Array.from(chosen).every(([i, v]) => v === "" || row.cells[i].textContent === v);
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };
  heads.forEach((head, i) => {
    const values = Array.from(new Set(rows.map(row => row.cells[i].textContent)));
    if (!("filter" in head.dataset) || values.length < 2) return;
    const label = document.createElement("label"), select = document.createElement("select");
    select.append(new Option("all", ""), ...values.map(v => new Option(v, v)));
    select.addEventListener("change", () => { chosen.set(i, select.value); apply(); });
    label.append(head.textContent + " ", select);
    filters.append(label);
  });
  filters.append(count);
  apply();
}
"""
_FILTERS = {
    "op",
    "pass",
    "shape",
    "format",
    "block",
    "sparsity %",
    "threads",
    "model",
    "backend",
    "net",
    "mode",
    "contender",
}


def _table(content: Table) -> str:
    escape = html.escape
    words = [any(isinstance(row[i], str) for row in content.rows) for i in range(len(content.columns))]
    head = "".join(
        f'<th scope="col"{_class(word)}{" data-filter" if column.name in _FILTERS else ""}>'
        f'<button type="button">{escape(column.name)}</button></th>'
        for column, word in zip(content.columns, words, strict=True)
    )
    lines = []
    for cells, loses in zip(content.rows, content.losing, strict=True):
        printed = []
        for cell, column, word in zip(cells, content.columns, words, strict=True):
            value = "" if cell is None else cell
            exact = f' data-v="{value}"' if not isinstance(cell, str) else ""
            printed.append(f"<td{_class(word)}{exact}>{escape(tables.text(cell, column))}</td>")
        lines.append(f"<tr{' class=loses' if loses else ''}>{''.join(printed)}</tr>")
    return (
        f'<h2>{escape(content.title)}</h2><p class="note">{escape(content.note)}</p>'
        f'<div class="table"><div class="filters"></div><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></div>"
    )


def _class(word: bool) -> str:
    return ' class="word"' if word else ""


def render(results: Results, changes: dict[tuple[object, ...], Change] | None, svgs: Mapping[str, str]) -> str:
    """The page; ``svgs`` are inlined in order."""
    escape = html.escape
    parts = ["<h1>Speed report</h1>"]
    parts.append('<p class="note">Block-sparse training layers against dense torch, timed in turns in one process.</p>')
    parts += [f'<p class="warning">{escape(warning)}</p>' for warning in results.warnings()]
    boxes = (
        f"<div><span>{escape(what)}</span><strong>{escape(value)}</strong><small>{escape(detail)}</small></div>"
        for what, value, detail in tables.headline(results)
    )
    parts.append(f'<div class="figures">{"".join(boxes)}</div>')
    facts = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in tables.conditions(results))
    parts.append(f"<dl>{''.join(facts)}</dl>")
    parts += [f"<figure>{svg}</figure>" for svg in svgs.values()]
    contents: Sequence[Table] = [
        *net_tables.whole_tables(results),
        *([tables.train_table(results.training)] if results.training else []),
        *([tables.mean_table(results.passes)] if results.passes else []),
        *tables.peer_tables(results.peers),
    ]
    parts += [_table(content) for content in contents]
    if results.missing:
        items = (f"<li>{escape(row.what)}: {escape(row.reason)}</li>" for row in results.missing)
        parts.append(f"<p>Not measured:</p><ul>{''.join(items)}</ul>")
    failed = tables.failed_peers(results.peers)
    if failed:
        items = (f"<li>{escape(peer)}: {escape(reason)} ({count} rows)</li>" for peer, reason, count in failed)
        parts.append(f"<p>Peers that did not run:</p><ul>{''.join(items)}</ul>")
    if results.passes:
        parts.append(_table(tables.pass_table(results.passes, changes)))
    parts.append('<p class="note">Red: sparse is slower than dense.</p>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>sparsekern speed report</title>'
        f"<style>{_CSS}</style></head><body><main>{''.join(parts)}</main><script>{_SCRIPT}</script></body></html>\n"
    )
