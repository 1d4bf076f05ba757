"""MNIST and its relatives: idx files."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsekern.data.errors import DataError
from sparsekern.data.files import find_file, listing, read_bytes
from sparsekern.data.split import ArraySplit

IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801
PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: Path, magic: int) -> Tensor:
    """The uint8 array in an idx file: [N, H, W] for 0x803, [N] for 0x801.

    Raises:
        DataError: another magic number, or a size that differs from the header's.
    """
    content = read_bytes(path)
    dims = magic & 0xFF
    header = 4 + 4 * dims
    found = int.from_bytes(content[:4], "big")
    if len(content) < header or found != magic:
        raise DataError(
            f"{path}: expected an idx file with magic number {magic:#010x}, "
            f"found {found:#010x} in {len(content)} bytes; check that it is the right file"
        )
    shape = struct.unpack(f">{dims}I", content[4:header])
    size = int(np.prod(shape, dtype=object))
    if len(content) - header != size:
        raise DataError(
            f"{path}: expected {size} bytes after the header for shape {list(shape)}, found {len(content) - header}; "
            "download it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def load_idx(name: str, folders: Sequence[Path], split: str) -> ArraySplit:
    """One split of an MNIST-like set, uint8 [N, 1, H, W].

    Raises:
        DataError: files missing, broken, or not belonging together.
    """
    stem = PREFIX[split]
    wanted = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]
    for folder in folders:
        images, labels = (find_file(folder, [file, file.replace("-idx", ".idx")]) for file in wanted)
        if images and labels:
            return ArraySplit(
                read_idx(images, IMAGES_MAGIC).unsqueeze(1), read_idx(labels, LABELS_MAGIC), 10, source=str(images)
            )
    where = "; ".join(f"{folder} holds {listing(folder)}" for folder in folders)
    raise DataError(
        f"{name} {split}: expected {wanted[0]} and {wanted[1]} (plain, .gz or .xz), found neither pair: {where}; "
        f"point data_dir at them or load only the splits that are there"
    )
