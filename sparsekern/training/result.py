"""What a run ended with, and how it is read back from its folder."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import CheckpointError

MEASURED = (
    "train_loss",
    "train_acc",
    "val_acc",
    "test_loss",
    "test_acc",
    "best_val_acc",
    "test_acc_at_best_val",
)


@dataclass
class TrainResult:
    """What a run ended with. Accuracies are fractions; times are means in seconds over this process, without its
    first step.

    Attributes:
        test_acc_at_best_val: test accuracy after the epoch of the best validation accuracy, None without validation.
        step_seconds: data, forward, backward, optimizer, topology and total of one step; on CUDA, where waiting for the
            device between them would slow training down, total only.
        layers: layers per state.
        macs: multiply-accumulates per sample.
        exploration_rate: R_s, the fraction of the sparse layers' weights that were stored at some time; None without
            sparse layers.
        exploration: the same per layer.
        reliably_explored: the fraction that was stored long enough to be trained; None where blocks do not move.
        updates: of the topology.
        resumed_from: step of the checkpoint that this process started from, None for a fresh run.
        model: the trained model.
    """

    config: TrainConfig
    steps: int
    epochs: float
    train_loss: float | None
    train_acc: float | None
    val_acc: float | None
    test_loss: float | None
    test_acc: float | None
    best_val_acc: float | None
    test_acc_at_best_val: float | None
    params: int
    macs: int
    layers: dict[str, int]
    seconds: float
    step_seconds: dict[str, float]
    threads: int
    exploration_rate: float | None = None
    exploration: dict[str, float] = field(default_factory=dict)
    reliably_explored: float | None = None
    updates: int = 0
    resumed_from: int | None = None
    folder: Path | None = None
    model: nn.Module | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, in plain containers."""
        skip = {"model", "config", "folder"}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        return {"config": self.config.to_dict(), **values}


def read_result(folder: str | os.PathLike[str], model: nn.Module | None = None) -> TrainResult | None:
    """The result of a finished run, or None if ``folder`` holds none."""
    path = Path(folder) / "result.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    config = TrainConfig.from_dict(values.pop("config"), source=str(path))
    return TrainResult(config=config, folder=Path(folder), model=model, **values)
