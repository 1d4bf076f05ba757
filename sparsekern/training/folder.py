"""The run folder: what may be in it, and how one begins."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from sparsekern.training.checkpoint import checkpoint_files
from sparsekern.training.config import TrainConfig, load_yaml, save_yaml
from sparsekern.training.errors import ConfigError
from sparsekern.training.weights import CHANNELS


def check_folder(folder: Path, config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """:class:`ConfigError` says what is in the way of a run in ``folder`` and what to do; nothing is written."""
    saved = folder / "config.yaml"
    if resume:
        if not saved.is_file():
            raise ConfigError(f"resume: {folder} holds no run (config.yaml is missing); check --out")
        check_same(TrainConfig.from_dict(load_yaml(saved), source=str(saved)), config, folder)
    elif saved.exists() and not overwrite:
        raise ConfigError(f"{folder} already holds a run; continue it with --resume, replace it with --overwrite")
    elif folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: expected a folder, {folder} is a file")


def start_folder(folder: Path, config: TrainConfig) -> None:
    """Create ``folder`` with its ``config.yaml``, without what an earlier run left."""
    if (folder / "config.yaml").exists():
        # Only what a run writes: the folder may hold anything else.
        for name in ("checkpoints", "snapshots", "dense", "small", "sparse"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in _WRITTEN:
            (folder / name).unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_yaml(config, folder / "config.yaml")
    except OSError as error:
        raise ConfigError(f"out: cannot write to {folder}: {error.strerror}") from None


_WRITTEN = (
    "metrics.jsonl",
    "result.json",
    "model.pt",
    "plan.json",
    "curves.png",
    "compare.json",
    "table.md",
    CHANNELS,
)


def check_same(saved: TrainConfig, config: TrainConfig, folder: Path) -> None:
    """:class:`ConfigError` naming every key in which a resumed run differs from the saved one."""
    names = saved.differences(config)
    if names:
        changes = ", ".join(f"{name} (saved {getattr(saved, name)}, now {getattr(config, name)})" for name in names)
        raise ConfigError(f"resume: {folder} was started with another configuration: {changes}; drop these options")


def has_checkpoint(folder: str | os.PathLike[str]) -> bool:
    return bool(checkpoint_files(Path(folder) / "checkpoints"))


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
