"""metrics.jsonl: one JSON object per line, appended during training and truncated on resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends lines to ``path``.

    Args:
        path: file, created if absent.
        offset: bytes to keep; what a killed run wrote after its last checkpoint is dropped, so no line appears twice.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int = 0) -> None:
        self.path = Path(path)
        self._file = open(self.path, "ab")
        if offset > self._file.tell():
            # Lines are missing (the file was removed by hand); what is left stays valid.
            offset = self._file.tell()
        self._file.truncate(offset)
        self._file.seek(0, os.SEEK_END)

    def write(self, kind: str, **values: Any) -> None:
        """One line ``{"kind": kind, ...}``; non-finite numbers become null, which JSON can hold."""
        line = {"kind": kind, **{key: _finite(value) for key, value in values.items()}}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Force the lines to disk; the byte offset a checkpoint stores."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete lines; a last line cut off by a crash is left out."""
    lines: list[dict[str, Any]] = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
