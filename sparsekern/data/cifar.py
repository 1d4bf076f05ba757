"""CIFAR-10 and CIFAR-100: the public binary and Python versions, and npz files."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsekern.data.errors import DataError
from sparsekern.data.files import find_file, listing, read_bytes
from sparsekern.data.split import ArraySplit

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Files:
    """Names of the files of one set.

    Attributes:
        binary, python: per split, the files of the binary and the Python version.
        label_bytes: leading bytes of a binary record; the last is the label.
        label_key: of a Python batch.
        names_text, names_pickle, names_key: where the class names are.
    """

    binary: Mapping[str, tuple[str, ...]]
    python: Mapping[str, tuple[str, ...]]
    label_bytes: int
    label_key: bytes
    names_text: str
    names_pickle: str
    names_key: bytes
    num_classes: int


CIFAR10 = Files(
    binary={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    python={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    label_bytes=1,
    label_key=b"labels",
    names_text="batches.meta.txt",
    names_pickle="batches.meta",
    names_key=b"label_names",
    num_classes=10,
)
CIFAR100 = Files(
    binary={"train": ("train.bin",), "test": ("test.bin",)},
    python={"train": ("train",), "test": ("test",)},
    label_bytes=2,
    label_key=b"fine_labels",
    names_text="fine_label_names.txt",
    names_pickle="meta",
    names_key=b"fine_label_names",
    num_classes=100,
)

Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # uint8 [N, 3, 32, 32], integers [N]


def load_cifar(name: str, files: Files, folders: Sequence[Path], split: str) -> tuple[ArraySplit, tuple[str, ...]]:
    """One split, uint8 [N, 3, 32, 32], and the class names if they are there (else an empty tuple).

    Raises:
        DataError: files missing or broken.
    """
    for folder in folders:
        for names, read in ((files.binary[split], _read_binary), (files.python[split], _read_python)):
            paths = {file: find_file(folder, [file]) for file in names}
            missing = [file for file, path in paths.items() if path is None]
            if len(missing) == len(names):
                continue
            if missing:
                raise DataError(
                    f"{name} {split}: expected {', '.join(names)} (plain, .gz or .xz) in {folder}, "
                    f"found all but {', '.join(missing)}; add them"
                )
            parts = [read(path, files) for path in paths.values() if path is not None]
            images, labels = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
            return _split(images, labels, files, folder), _class_names(folder, files)
        for path in sorted(folder.glob("*.npz")):
            found = _read_npz(path, split)
            if found is not None:
                return _split(found[0], found[1], files, path), found[2]
    where = "; ".join(f"{folder} holds {listing(folder)}" for folder in folders)
    raise DataError(
        f"{name} {split}: expected {files.binary[split][0]}, {files.python[split][0]} (plain, .gz or .xz) or an npz "
        f"with {split}_images, found none: {where}; point data_dir at them or load only the splits that are there"
    )


def _split(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], files: Files, source: Path) -> ArraySplit:
    tensors = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64))
    return ArraySplit(*tensors, files.num_classes, source=str(source))


def _read_binary(path: Path, files: Files) -> Arrays:
    content = read_bytes(path)
    record = files.label_bytes + PIXELS
    if not content or len(content) % record:
        raise DataError(
            f"{path}: expected records of {record} bytes, found {len(content)} bytes "
            f"({len(content) % record} too many); it is truncated or of another set, download it again"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    return rows[:, files.label_bytes :].reshape(-1, 3, 32, 32), rows[:, files.label_bytes - 1]


def _read_python(path: Path, files: Files) -> Arrays:
    batch = _unpickle(path)
    key = files.label_key
    data, labels = (_get(batch, k) for k in (b"data", key))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{path}: expected data as uint8 [N, {PIXELS}], found {found}; download it again")
    if not isinstance(labels, (list, np.ndarray)) or not all(isinstance(v, (int, np.integer)) for v in labels):
        raise DataError(
            f"{path}: expected {key.decode()} as a list of integers, found {type(labels).__name__}; "
            "check that this is the right set"
        )
    return data.reshape(-1, 3, 32, 32), np.asarray(labels, np.int64)


def _unpickle(path: Path) -> Any:
    # Imported here only: everything that touches pickles stays in one place.
    from sparsekern.data.unpickle import safe_unpickle

    try:
        return safe_unpickle(read_bytes(path))
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: expected a pickle of plain values and arrays, found {error}; "
            "nothing in it was run, download it again from its authors"
        ) from None


def _get(batch: Any, key: bytes) -> Any:
    if not isinstance(batch, dict):
        return None
    return batch.get(key, batch.get(key.decode()))


def _read_npz(path: Path, split: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], tuple[str, ...]] | None:
    """Arrays and class names of one split, None if the file has none of it."""
    try:
        # Opened here: np.load leaves the file open when it is no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if f"{split}_images" not in archive.files:
                return None
            images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
            names = tuple(map(str, archive["class_names"])) if "class_names" in archive.files else ()
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: expected an npz with {split}_images and {split}_labels, got {type(error).__name__}: {error}; "
            "download it again"
        ) from None
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: expected uint8 images [N, 32, 32, 3] and integer labels [N], "
            f"found {images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}; convert them"
        )
    return images.transpose(0, 3, 1, 2), labels, names


def _class_names(folder: Path, files: Files) -> tuple[str, ...]:
    names: list[str] = []
    text = find_file(folder, [files.names_text])
    meta = find_file(folder, [files.names_pickle])
    if text is not None:
        names = read_bytes(text).decode("utf-8", "replace").split()
    elif meta is not None:
        stored = _get(_unpickle(meta), files.names_key) or []
        names = [n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in stored]
    return tuple(names) if len(names) == files.num_classes else ()
