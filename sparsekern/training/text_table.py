"""Tables of short texts, as Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lines that end with a line break; the first ``left`` columns are set to the left, the others to the right."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    lines.insert(1, "|---" * left + "|---:" * (len(head) - left) + "|")
    return "\n".join(lines) + "\n"


def terminal(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Any:
    """The same as a table of rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    for column, title in enumerate(head):
        table.add_column(title, justify="left" if column < left else "right")
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    return table
