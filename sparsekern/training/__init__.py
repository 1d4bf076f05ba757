"""Training: one configuration in, a reproducible run out.

    from sparsekern.training import TrainConfig, train
    result = train(TrainConfig(model="mlp", data="digits", sparsity=0.9, block=16), out="runs/digits")

``compare`` trains the dense twin and the narrower dense net of equal MACs beside it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekern.training.callbacks import Callback
    from sparsekern.training.comparison import CompareResult, compare
    from sparsekern.training.config import TrainConfig
    from sparsekern.training.errors import CheckpointError, ConfigError, DivergedError, Interrupted, TrainingError
    from sparsekern.training.loop import train
    from sparsekern.training.network import load_model
    from sparsekern.training.result import TrainResult, read_result
    from sparsekern.training.schedules import schedule
    from sparsekern.training.sparse_lr import sparse_lr_factor
    from sparsekern.training.timing import StepTime, time_steps

# Resolved on first use: `import sparsekern` stays light, and the command line prints its help without data or models.
_HOME = {
    "Callback": "callbacks",
    "compare": "comparison",
    "CompareResult": "comparison",
    "TrainConfig": "config",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DivergedError": "errors",
    "Interrupted": "errors",
    "TrainingError": "errors",
    "TrainResult": "result",
    "read_result": "result",
    "train": "loop",
    "load_model": "network",
    "schedule": "schedules",
    "sparse_lr_factor": "sparse_lr",
    "StepTime": "timing",
    "time_steps": "timing",
}

__all__ = [  # noqa: RUF022 - by topic
    "TrainConfig", "TrainResult", "train", "read_result", "load_model",
    "CompareResult", "compare", "StepTime", "time_steps", "schedule", "sparse_lr_factor", "Callback",
    "TrainingError", "ConfigError", "CheckpointError", "DivergedError", "Interrupted",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsekern.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparsekern.training.{_HOME[name]}"), name)
