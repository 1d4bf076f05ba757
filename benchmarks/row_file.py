"""Writes rows as pytest-benchmark's files hold them, for benchmarks that are no tests."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from benchmarks import files, machine


class RowFile:
    """Result file of one chunk, whole after every row.

    Args:
        path: the file.
        suite: name in the report.
    """

    def __init__(self, path: Path, suite: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "machine_info": machine.machine_info(),
            "sparsekern_run": {
                "format": 1,
                "suite": suite,
                "load_average_start": machine.load_average(),
                "neighbours": None,
            },
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "benchmarks": [],
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """``extra_info`` of the rows so far."""
        return [bench["extra_info"] for bench in self.content["benchmarks"]]

    def add(self, name: str, info: dict[str, Any], rounds: int = 1) -> None:
        self.content["benchmarks"].append({"name": name, "extra_info": info, "stats": {"rounds": rounds}})
        files.write_json(self.path, self.content)

    def miss(self, what: str, reason: str) -> None:
        """Note a row that could not be measured."""
        self.add(what, {"kind": "missing", "what": what, "reason": reason})
