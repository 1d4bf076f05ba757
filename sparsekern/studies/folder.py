"""The folder of a study: ``study.json``, a run folder per cell, claims, and what failed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from sparsekern.studies.claims import claim, holder
from sparsekern.studies.dst import Cell, DstStudy
from sparsekern.training.errors import ConfigError

FORMAT = 1


class StudyFolder:
    """Paths inside ``path``, and the state of each cell: "done", "failed", "running" or "open"."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.study_file = self.path / "study.json"

    def run(self, cell: Cell) -> Path:
        """The cell's run folder."""
        return self.path / "cells" / cell.name

    def claim_file(self, cell: Cell) -> Path:
        return self.path / "claims" / cell.name

    def failure_file(self, cell: Cell) -> Path:
        return self.path / "failed" / f"{cell.name}.json"

    def done(self, cell: Cell) -> bool:
        return (self.run(cell) / "result.json").is_file()

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """What was recorded of a failed cell: ``error``, ``traceback``."""
        try:
            found: dict[str, Any] = json.loads(self.failure_file(cell).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {"error": f"{self.failure_file(cell)} cannot be read", "traceback": ""}
        return found

    def state(self, cell: Cell) -> str:
        if self.done(cell):
            return "done"
        if holder(self.claim_file(cell)) is not None:
            return "running"
        return "failed" if self.failure_file(cell).is_file() else "open"

    def load(self) -> DstStudy:
        """The study of this folder; :class:`ConfigError` where there is none."""
        try:
            values = json.loads(self.study_file.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ConfigError(f"{self.study_file}: expected format {FORMAT}, got {values['format']!r}")
            return DstStudy.from_dict(values)
        except FileNotFoundError:
            raise ConfigError(f"{self.path} holds no study (study.json is missing); check --out") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{self.study_file} cannot be read: {error}") from None

    def save(self, study: DstStudy) -> None:
        write_text(self.study_file, json.dumps({"format": FORMAT, **study.to_dict()}, indent=1) + "\n")


def open_study(out: str | os.PathLike[str], study: DstStudy) -> DstStudy:
    """``study`` with the widths of its narrower dense nets, saved in ``out``.

    Where ``out`` holds a study already, its cells are kept and those of ``study`` are added.

    Raises:
        ConfigError: the folder's study trains with other options, or no dense net is as small as a sparse one.
        DataError: data missing or damaged.
    """
    folder = StudyFolder(out)
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError(f"out: expected a folder, {folder.path} is a file")
    folder.path.mkdir(parents=True, exist_ok=True)
    with claim(folder.path / "claims" / "study.json", wait=True):
        if folder.study_file.exists():
            saved = folder.load()
            names = saved.differences(study)
            if names:
                raise ConfigError(
                    f"{folder.path} holds a study with other options: {', '.join(names)}; drop them, or choose "
                    "another --out"
                )
            study = saved.united(study)
        study = dataclasses.replace(study, widths=_widths(study))
        folder.save(study)
    return study


def _widths(study: DstStudy) -> dict[float, float]:
    """Widths at which the dense net has the MACs of the sparse ones; those of the first block stand for all."""
    widths = dict(study.widths)
    missing = [sparsity for sparsity in study.sparsities if sparsity not in widths]
    if not missing:
        return widths
    from sparsekern.training.comparison import NoSuchWidth, width_of_equal_macs
    from sparsekern.training.task import load_task

    task = None
    for sparsity in missing:
        config = study.config(Cell("static", sparsity, study.blocks[0], study.seeds[0]))
        task = task or load_task(config)
        try:
            widths[sparsity] = width_of_equal_macs(config, task)
        except NoSuchWidth as error:
            raise ConfigError(
                f"sparsities: no dense {config.model} is as small as the one of sparsity {sparsity:g}: {error}"
            ) from None
    return widths


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` at once: readers, and writers in other processes, never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
