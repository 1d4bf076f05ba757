"""Errors a user can act on: one line, expected X, got Y, do Z. The command line prints them without a traceback."""

from __future__ import annotations

from pathlib import Path


class TrainingError(Exception):
    """Base of every error of this package that a user can put right."""


class ConfigError(TrainingError, ValueError):
    """A configuration value, key or file that does not fit."""


class CheckpointError(TrainingError, RuntimeError):
    """A checkpoint that is missing, damaged or belongs to another configuration."""


class DivergedError(TrainingError, RuntimeError):
    """The loss is not a finite number."""


class Interrupted(Exception):
    """Training stopped by a signal, after writing a checkpoint if it has a run folder.

    Attributes:
        where: at which step.
        folder: the run folder to resume, None if nothing was saved.
        signal_number: the signal received (2 for Ctrl-C).
    """

    def __init__(self, where: str, folder: Path | None, signal_number: int, hint: str | None = None) -> None:
        if hint is None:
            hint = "nothing was saved" if folder is None else f"continue with: sparsekern train --out {folder} --resume"
        super().__init__(f"{where}; {hint}")
        self.where = where
        self.folder = folder
        self.signal_number = signal_number
