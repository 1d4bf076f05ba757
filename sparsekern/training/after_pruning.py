"""Prune a trained run and train it on: once, or down a ladder of levels, each a run of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import CheckpointError, ConfigError
from sparsekern.training.folder import write_json
from sparsekern.training.part import check_whole, train_part
from sparsekern.training.progress import Reporter
from sparsekern.training.prune_settings import PruneSettings
from sparsekern.training.prune_start import Source, sparsity_of_run, start, start_dense, training_config
from sparsekern.training.prune_table import Row, markdown, plot
from sparsekern.training.result import TrainResult, read_result

RECORD = "prune.json"
_DENSE = "-dense"


@dataclass
class Pruning:
    """What :func:`after` returns: ``rows`` begin with the run itself where it has a result."""

    settings: PruneSettings
    rows: list[Row]
    folder: Path


def after(
    run: str | os.PathLike[str],
    then: str = "finetune",
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    run_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pruning:
    """Prune the network of a run, then train it on by a strategy.

    ========== ========================================= ======================================================
    strategy   weights it starts from                    training
    ========== ========================================= ======================================================
    none       the trained ones                          none
    finetune   the trained ones                          40 epochs (ImageNet: 20) at a constant 0.001
    lottery    the run's after ``rewind_step`` steps     the run's schedule, from its beginning
    lr-rewind  the trained ones                          the run's schedule, or its last ``epochs``
    reinit     fresh ones                                the run's schedule
    scratch-e  fresh ones                                the run's schedule
    scratch-b  fresh ones                                as many MACs as the run (at most ``cap`` times its epochs)
    redense    the trained ones                          as finetune; then with zeros for the pruned ones, dense
    ========== ========================================= ======================================================

    Level k writes ``level-0k.pt`` (the network that training starts from), ``level-0k.json`` and the run folder
    ``level-0k``; redense also ``level-0k-dense.pt`` and ``level-0k-dense``. In a ladder each level prunes what the
    level before has trained, or with ``one_shot`` the run itself. ``ladder.json``, ``table.md`` and ``ladder.png`` hold
    the results so far. Optimizers start anew in every run, and data order, augmentation and label noise are the run's.

    Args:
        run: run folder, ``model.pt`` or a snapshot; ``lottery`` needs the run folder's ``snapshots/``.
        then: one of :data:`sparsekern.training.prune_settings.STRATEGIES`.
        out: folder to write to.
        resume: continue in ``out``: finished levels are kept, a broken-off one continues from its checkpoint, and
            more ``levels`` make the ladder longer.
        overwrite: replace an earlier pruning in ``out``.
        run_options: ``data_dir``, ``device``, ``threads``, ``checkpoint_every`` or ``checkpoint_minutes`` in place of
            the run's own; a resumed pruning takes those it was started with.
        options: fields of :class:`sparsekern.training.prune_settings.PruneSettings`.

    Raises:
        ConfigError: an option that does not fit, a folder in use, a resume with other options, a missing snapshot.
        Others: those of :func:`sparsekern.training.train`.

    Sources: Han et al. 2017 (arXiv:1607.04381), Frankle et al. 2020 (arXiv:1912.05671), Renda et al. 2020
    (arXiv:2003.02389), Liu et al. 2019 (arXiv:1810.05270), He et al. 2022 (arXiv:2206.08684).
    """
    settings = PruneSettings(then=then, **options)
    return _Ladder(Path(run), Path(out), settings, dict(run_options or {}), reporter or Reporter()).go(
        resume=resume, overwrite=overwrite
    )


class _Ladder:
    def __init__(
        self, run: Path, folder: Path, settings: PruneSettings, options: dict[str, Any], reporter: Reporter
    ) -> None:
        self.run, self.folder, self.settings, self.options, self.reporter = run, folder, settings, options, reporter
        self.resume = False

    def go(self, *, resume: bool, overwrite: bool) -> Pruning:
        self.resume = resume
        self._check_folder(resume=resume, overwrite=overwrite)
        self.source = Source(self.run, self.options)
        if self.settings.rewind_step is not None:
            self.source.snapshot(self.settings.rewind_step)  # that it is there, before anything is written
        if self.source.config.threads:
            torch.set_num_threads(self.source.config.threads)
        if not resume:
            self._clear()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: cannot write to {self.folder}: {error.strerror}") from None
        write_json(self.folder / RECORD, self._record())
        try:
            return self._levels()
        except ConfigError:
            self._forget()
            raise

    def _levels(self) -> Pruning:
        settings = self.settings
        rows = self._level_zero()
        net = self.source.path
        for level in range(1, max(1, settings.levels) + 1):
            done = self._level(level, self.source.path if settings.one_shot else net)
            rows += done
            net = Path(done[0].net)
            self._write(rows)
        return Pruning(settings, rows, self.folder)

    def _level(self, level: int, net: Path) -> list[Row]:
        # Absolute: it is part of the configuration of the runs, and a resumed one must not depend on the spelling.
        path = self.folder.absolute() / f"level-{level:02d}.pt"
        record = start(self.source, net, self.settings, level, path, self.reporter)
        values = {
            "level": level,
            "target": record["target"],
            "sparsity": record["sparsity"],
            "pruned_acc": record.get("test_acc"),
        }
        if self.settings.then == "none":
            tested = {name: record[name] for name in ("test_loss", "test_acc")}
            rows = [Row(phase="", params=record["params"], macs=record["macs"], net=str(path), **tested, **values)]
        else:
            config = training_config(self.source, self.settings, path, record)
            result = self._train(config, path.with_suffix(""))
            rows = [Row.of(result, phase="", net=str(path.with_suffix("")), **values)]
        self.reporter.line(rows[0].line())
        if self.settings.then == "redense":
            rows.append(self._dense_again(level, path, config, values))
            self.reporter.line(rows[1].line())
        return rows

    def _dense_again(self, level: int, path: Path, config: TrainConfig, values: dict[str, Any]) -> Row:
        dense = path.with_name(f"{path.stem}{_DENSE}.pt")
        start_dense(self.source, path.with_suffix(""), dense)
        result = self._train(config.dense(init=str(dense)), dense.with_suffix(""))
        values = {**values, "sparsity": 0.0, "pruned_acc": None}
        return Row.of(result, phase="dense", net=str(dense.with_suffix("")), **values)

    def _train(self, config: TrainConfig, folder: Path) -> TrainResult:
        hint = f"continue with: sparsekern prune {self.run} --out {self.folder} --resume"
        return train_part(config, folder, resume=self.resume, reporter=self.reporter, hint=hint)

    # -- the folder ------------------------------------------------------------------------------------------------

    def _check_folder(self, *, resume: bool, overwrite: bool) -> None:
        folder = self.folder
        check_whole(folder, resume=resume, overwrite=overwrite)
        if resume:
            saved, run, options = read_settings(folder)
            self.options = {**options, **self.options}
            if Path(run).resolve() != self.run.resolve():
                raise ConfigError(f"resume: {folder} prunes {run}, got {self.run}; name that run, or another --out")
            names = saved.differences(self.settings)
            if names:
                changes = ", ".join(
                    f"{name} (saved {getattr(saved, name)}, now {getattr(self.settings, name)})" for name in names
                )
                raise ConfigError(f"resume: {folder} was started with other options: {changes}; drop these")
        elif (folder / RECORD).exists() and not overwrite:
            raise ConfigError(
                f"{folder} already holds a pruning; continue it with --resume, replace it with --overwrite"
            )

    def _clear(self) -> None:
        """Remove what an earlier pruning wrote, and nothing else."""
        if not (self.folder / RECORD).exists():
            return
        for path in self.folder.glob("level-[0-9]*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix in (".pt", ".json"):
                path.unlink()
        for name in ("ladder.json", "ladder.png", "table.md"):
            (self.folder / name).unlink(missing_ok=True)

    def _forget(self) -> None:
        """A mistake that shows before the first training leaves nothing behind."""
        if not self.resume and not any(path.is_dir() for path in self.folder.glob("level-[0-9]*")):
            self._clear()
            (self.folder / RECORD).unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _record(self) -> dict[str, Any]:
        return {"run": str(self.run.absolute()), "settings": self.settings.to_dict(), "run_options": self.options}

    # -- results ---------------------------------------------------------------------------------------------------

    def _level_zero(self) -> list[Row]:
        result = read_result(self.source.folder) if self.source.path.name == "model.pt" else None
        if result is None:
            return []
        sparsity = sparsity_of_run(self.source, self.settings)
        return [Row.of(result, level=0, phase="", target=sparsity, sparsity=sparsity, net=str(self.run))]

    def _write(self, rows: list[Row]) -> None:
        write_json(self.folder / "ladder.json", {**self._record(), "levels": [row.to_dict() for row in rows]})
        (self.folder / "table.md").write_text(markdown(rows, self._conditions()), encoding="utf-8")
        plot(rows, self.folder / "ladder.png")

    def _conditions(self) -> list[str]:
        s, config = self.settings, self.source.config
        how = f"{s.criterion}, scope {s.scope}{f' by {s.allocation}' if s.allocation else ''}, block {s.block or 1}"
        ladder = ""
        if s.levels:
            source = "the run itself" if s.one_shot else "the level before"
            ladder = f", each level removes {100 * s.fraction:g} % of what is left, pruned from {source}"
        noise = f", {100 * config.label_noise:g} % {config.noise_kind} label noise" if config.label_noise else ""
        return [
            f"- {config.model} on {config.data}{noise}: {how}{ladder}; then {s.then}, seed {config.seed}.",
            "- Sparsity is that of the pruned layers. Accuracies are those after the last epoch; training accuracy is "
            "the mean over it, on the labels trained with. Level 0 is the run before pruning.",
        ]


def read_settings(folder: str | os.PathLike[str]) -> tuple[PruneSettings, str, dict[str, Any]]:
    """Settings, run and run options of the pruning in ``folder``.

    Raises:
        ConfigError: there is none.
        CheckpointError: its record is damaged.
    """
    path = Path(folder) / RECORD
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        settings = PruneSettings.from_dict(saved["settings"], source=str(path))
        return settings, str(saved["run"]), dict(saved["run_options"])
    except FileNotFoundError:
        raise ConfigError(f"resume: {folder} holds no pruning ({RECORD} is missing); check --out") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"{path} cannot be read ({error}); start again with --overwrite") from None
