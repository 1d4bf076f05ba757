"""Files of the user's cache: what was measured on this machine. An unreadable file counts as empty."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any


def folder() -> Path:
    """``SPARSEKERN_CACHE``, else ``sparsekern`` in the XDG cache folder."""
    return _folder(os.environ.get("SPARSEKERN_CACHE"), os.environ.get("XDG_CACHE_HOME"))


@functools.lru_cache(maxsize=16)  # every call of a GPU op asks; building the path takes 7 us
def _folder(root: str | None, xdg: str | None) -> Path:
    return Path(root) if root else Path(xdg or Path.home() / ".cache") / "sparsekern"


def slug(name: str) -> str:
    """``name`` of a processor or GPU as part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in name.strip()).strip("-").lower()


def read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, content: dict[str, Any]) -> Path:
    """Replace the file in one step, so that another process never reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    scratch.replace(path)
    return path
