"""Saved nets: ``model.pt`` and the files of ``snapshots/``, which hold weights, layout and what rebuilds the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsekern.training.checkpoint import FORMAT, load_checkpoint, write_atomic
from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import CheckpointError, ConfigError

CHANNELS = "channels.json"


@dataclass
class SavedNet:
    """What :func:`load_net` read.

    Attributes:
        path: the file.
        state: state dict of the model.
        sparse: whether ``state`` holds sparse layers.
        plan: ``Plan.to_dict()`` of a planned net, None otherwise.
        in_shape, num_classes: of the data it was trained on.
        channels: ``channels.json`` of a slimmed net, None otherwise.
    """

    path: Path
    config: TrainConfig
    state: dict[str, Tensor]
    sparse: bool
    plan: dict[str, Any] | None
    in_shape: tuple[int, int, int]
    num_classes: int
    channels: Path | None


def snapshot_path(folder: str | os.PathLike[str], step: int) -> Path:
    """Where the run in ``folder`` keeps its weights after ``step`` steps."""
    return Path(folder) / "snapshots" / f"step-{step:09d}.pt"


def save_net(
    path: str | os.PathLike[str],
    model: nn.Module,
    config: TrainConfig,
    *,
    plan: dict[str, Any] | None,
    in_shape: Sequence[int],
    num_classes: int,
) -> None:
    """Write ``model`` atomically. Layers that are sparse are saved with their layout, whether planned or not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "config": config.to_dict(),
        "model": model.state_dict(),
        "sparse": is_sparse(model),
        "plan": plan,
        "in_shape": list(in_shape),
        "num_classes": num_classes,
    }
    write_atomic(path, content)


def load_net(path: str | os.PathLike[str]) -> SavedNet:
    """Read a run folder (its ``model.pt``), a ``model.pt`` or a snapshot.

    Raises:
        CheckpointError: no such file, a damaged one, or a run folder whose run has not finished.
        ConfigError: a file that holds no net.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "model.pt").is_file():
            raise CheckpointError(
                f"{path} holds no trained net (model.pt does not exist): finish the run, or name a snapshot"
            )
        path = path / "model.pt"
    content = load_checkpoint(path)
    missing = [key for key in ("config", "model", "in_shape", "num_classes") if key not in content]
    if missing:
        raise ConfigError(f"{path} is no saved net ({missing[0]} is missing); expected a model.pt or a snapshot")
    config = TrainConfig.from_dict(content["config"], source=str(path))
    c, h, w = content["in_shape"]
    return SavedNet(
        path=path,
        config=config,
        state=content["model"],
        sparse=bool(content.get("sparse")),
        plan=content.get("plan"),
        in_shape=(c, h, w),
        num_classes=content["num_classes"],
        channels=channels_of(path, config),
    )


def channels_of(path: Path, config: TrainConfig) -> Path | None:
    """``channels.json`` of a net saved in ``path``: the copy in its run folder, so that the folder can be moved."""
    if config.channels is None:
        return None
    for folder in (path.parent, path.parent.parent):
        if (folder / CHANNELS).is_file():
            return folder / CHANNELS
    return Path(config.channels)


def is_sparse(model: nn.Module) -> bool:
    from sparsekern.nn import SparseModule

    return any(isinstance(module, SparseModule) for module in model.modules())
