"""Runs that are part of something larger: of a comparison, of a ladder of prunings, of what slimming tries."""

from __future__ import annotations

from pathlib import Path

from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import ConfigError, Interrupted
from sparsekern.training.folder import check_same, has_checkpoint
from sparsekern.training.loop import train
from sparsekern.training.progress import Reporter
from sparsekern.training.result import TrainResult, read_result


def check_whole(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """:class:`ConfigError` where ``folder`` cannot hold the parts; nothing is written."""
    if resume and overwrite:
        raise ConfigError("expected --resume or --overwrite, got both")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: expected a folder, {folder} is a file")
    if (folder / "config.yaml").exists():
        raise ConfigError(f"out: {folder} holds a training run; choose another folder")


def train_part(
    config: TrainConfig, folder: Path, *, resume: bool, reporter: Reporter, hint: str | None = None
) -> TrainResult:
    """Train in ``folder``, a folder inside that of the whole, whose name is the run's label.

    Args:
        resume: of the whole, which may have stopped between any two steps: the part is then finished, begun with a
            checkpoint, begun without, or new.
        hint: how to continue the whole, for :class:`Interrupted`.

    Raises:
        ConfigError: a finished or begun part has another configuration.
        Interrupted: naming the folder of the whole.
        Others: those of :func:`sparsekern.training.train`.
    """
    finished = read_result(folder) if resume else None
    if finished is not None:
        check_same(finished.config, config, folder)
        reporter.line(f"{folder.name}: already finished")
        return finished
    going_on = resume and has_checkpoint(folder)
    try:
        return train(config, folder, resume=going_on, overwrite=not going_on, reporter=reporter, label=folder.name)
    except Interrupted as error:
        raise Interrupted(error.where, folder.parent, error.signal_number, hint) from None
