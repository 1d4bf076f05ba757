"""Finding the folder of a set, reading its files plain, gzip- or xz-compressed."""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, cast

from sparsekern.data.errors import DataError

DATA_DIR_VARIABLE = "SPARSEKERN_DATA"
SUFFIXES = ("", ".gz", ".xz")
MAX_BYTES = 4 << 30  # decompressed; the largest set here has 180 MB, so more than this is no data set


def root_folder(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    """``data_dir``, else the folder that SPARSEKERN_DATA names.

    Raises:
        DataError: neither is given, or it is no folder.
    """
    given = data_dir if data_dir is not None else os.environ.get(DATA_DIR_VARIABLE)
    if not given:
        raise DataError(
            f"{name}: expected a data folder, got none; pass data_dir (--data-dir) or set {DATA_DIR_VARIABLE}"
        )
    root = Path(given).expanduser()
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(f"{name}: expected a folder at {root}, found {found}; check data_dir or {DATA_DIR_VARIABLE}")
    return root


def candidate_folders(root: Path, own: Sequence[str], foreign: Iterable[str]) -> list[Path]:
    """Folders that may hold the set: ``root/<one of own>`` where it exists, then ``root`` itself.

    ``root`` is left out if its name belongs to another set, whose files may have the same names
    (MNIST and Fashion-MNIST).
    """
    folders = [root / name for name in own if (root / name).is_dir()]
    other = {name.split("/")[0].lower() for name in foreign} - {name.split("/")[0].lower() for name in own}
    lineage = {root.name.lower(), *([root.parent.name.lower()] if root.name.lower() == "raw" else [])}
    return folders if lineage & other else [*folders, root]


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of ``names`` in ``folder``, as it is or with .gz or .xz behind it."""
    for name in names:
        for suffix in SUFFIXES:
            path = folder / (name + suffix)
            if path.is_file():
                return path
    return None


def read_bytes(path: Path) -> bytes:
    """The decompressed content of a plain, .gz or .xz file.

    Raises:
        DataError: unreadable, corrupt or truncated compressed data, or over 4 GiB decompressed.
    """
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with cast("IO[bytes]", opener(path, "rb")) as file:
            content = file.read(MAX_BYTES + 1)
    except EOFError:
        raise DataError(
            f"{path}: expected complete {path.suffix} data, found a truncated file of {path.stat().st_size} bytes; "
            "download it again"
        ) from None
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{path}: expected valid {path.suffix} data, found corrupt data ({error}); download it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got {error.strerror or error}; check it") from None
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: expected at most {MAX_BYTES} bytes, found more; this is no data set file")
    return content


def listing(folder: Path, limit: int = 6) -> str:
    """A few entries of ``folder``, for error messages."""
    entries = sorted(entry.name for entry in folder.iterdir())
    if not entries:
        return "an empty folder"
    return ", ".join(entries[:limit]) + (f" and {len(entries) - limit} more" if len(entries) > limit else "")
