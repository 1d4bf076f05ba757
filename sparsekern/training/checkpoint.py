"""Checkpoints: written atomically, the last two kept, read without executing anything.

A file holds tensors and plain containers only and is read with ``torch.load(weights_only=True)``, so a foreign file
cannot run code.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsekern.training.errors import CheckpointError

FORMAT = 1
KEEP = 2
_NAME = re.compile(r"step-(\d{9})\.pt")


def checkpoint_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Checkpoints in ``folder``, newest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def save_checkpoint(folder: str | os.PathLike[str], step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` as ``folder/step-<step>.pt`` and drop all but the newest two.

    The file appears under its name only once it is complete and on disk: a crash leaves the earlier ones untouched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    write_atomic(path, {"format": FORMAT, "step": step, **state})
    for old in checkpoint_files(folder)[KEEP:]:
        old.unlink(missing_ok=True)
    return path


def write_atomic(path: Path, state: dict[str, Any]) -> None:
    """``torch.save`` to a temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one checkpoint onto the CPU; :class:`CheckpointError` says in one line what is wrong with it."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not compare the stored CRCs.
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"checkpoint {path} is damaged: {damaged} fails its CRC")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except zipfile.BadZipFile:
        raise CheckpointError(f"checkpoint {path} is truncated or not a checkpoint") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"checkpoint {path} is refused: it holds objects other than tensors and plain containers"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"checkpoint {path}: expected format {FORMAT}, got {found}")
    return state


def load_newest(folder: str | os.PathLike[str], warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Newest readable checkpoint of ``folder``, or None where there is none.

    A damaged newest file falls back to the one before, after ``warn``; :class:`CheckpointError` if none is readable.
    """
    files = checkpoint_files(folder)
    for position, path in enumerate(files):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            if position + 1 == len(files):
                raise CheckpointError(f"{error}; no other checkpoint is left, start again with --overwrite") from None
            warn(f"{error}; falling back to {files[position + 1].name}")
    return None


def rng_state() -> dict[str, Any]:
    """State of every global generator (python, numpy, torch CPU and, where used, CUDA) as plain containers."""
    version, keys, gauss = random.getstate()
    name, numbers, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(keys), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(numbers).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
