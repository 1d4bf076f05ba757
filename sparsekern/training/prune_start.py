"""From a trained run to the pruned network that training goes on with, and for how long."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekern import models
from sparsekern.nn import SparseModule
from sparsekern.pruning import Level, prunable, prune_, prune_level_, redense_, rewind_
from sparsekern.training import budgets
from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import ConfigError
from sparsekern.training.folder import write_json
from sparsekern.training.network import build_dense, load_model, resolve_device
from sparsekern.training.optim import make_optimizer
from sparsekern.training.progress import Reporter
from sparsekern.training.prune_settings import FRESH, NEEDS_DATA, RUN_OPTIONS, PruneSettings
from sparsekern.training.step import Step
from sparsekern.training.task import Task, evaluate, load_task
from sparsekern.training.weights import load_net, save_net, snapshot_path

KEEPS_WEIGHTS = ("none", "finetune", "lr-rewind", "redense")


class Source:
    """The run that is pruned: its network, configuration and data.

    Args:
        run: run folder, ``model.pt`` or a snapshot.
        options: values of :data:`RUN_OPTIONS` in place of the run's own.
    """

    def __init__(self, run: Path, options: dict[str, Any]) -> None:
        unknown = [name for name in options if name not in RUN_OPTIONS]
        if unknown:
            raise ConfigError(f"run options: expected {', '.join(RUN_OPTIONS)}, got {unknown[0]}")
        self.saved = load_net(run)
        self.path = self.saved.path
        self.folder = folder_of(self.path)
        channels = None if self.saved.channels is None else str(self.saved.channels)
        self.config = dataclasses.replace(self.saved.config, channels=channels, **options)
        self.device = resolve_device(self.config.device)

    @functools.cached_property
    def task(self) -> Task:
        return load_task(self.config)

    @functools.cached_property
    def macs(self) -> int:
        """Measured multiply-accumulates per sample."""
        return self.count_macs(load_model(self.path, self.device))

    def count_macs(self, model: nn.Module) -> int:
        return sum(models.count_macs(model, self.task.example(self.device)[:1]).values())

    def fresh(self, seed: int) -> dict[str, Any]:
        """Dense state dict of the model built anew from ``seed``, by its own initialisation."""
        config = dataclasses.replace(self.config, seed=seed)
        return build_dense(config, self.saved.in_shape, self.saved.num_classes).state_dict()

    def snapshot(self, step: int) -> dict[str, Any]:
        """Its weights after ``step`` steps; :class:`ConfigError` names the snapshots that there are."""
        path = snapshot_path(self.folder, step)
        if not path.is_file():
            kept = sorted(int(p.stem.rpartition("-")[2]) for p in path.parent.glob("step-*.pt"))
            there = f"it kept steps {', '.join(map(str, kept))}" if kept else "it kept none"
            raise ConfigError(
                f"rewind_step: {self.folder} has no snapshot of step {step} ({there}); train it with --snapshots {step}"
            )
        return load_net(path).state

    def save(self, model: nn.Module, path: Path, plan: dict[str, Any] | None) -> None:
        save_net(
            path,
            model,
            self.config,
            plan=plan,
            in_shape=self.saved.in_shape,
            num_classes=self.saved.num_classes,
        )

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Test loss and accuracy (0..1)."""
        config = dataclasses.replace(self.config, compile=False)
        return evaluate(Step(model, make_optimizer(model, config), config), self.task.test)


def folder_of(run: Path) -> Path:
    """The run folder of a run folder, its ``model.pt`` or one of its snapshots."""
    if run.is_dir():
        return run
    return run.parent.parent if run.parent.name == "snapshots" else run.parent


def beside(folder: Path, suffix: str) -> Path:
    """``folder-suffix`` beside ``folder``, which may be ``.`` or end in ``..``."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(f"{named.name}-{suffix}")


def start(
    source: Source, net: Path, settings: PruneSettings, level: int, path: Path, reporter: Reporter
) -> dict[str, Any]:
    """Prune ``net``, give it the weights that the strategy begins with, and write it to ``path``.

    A record is written beside it last (same name, ``.json``); where that is there already, nothing is done again.

    Args:
        net: run folder or file of the network to prune at this level.

    Returns:
        The record: target, realised sparsity of the pruned layers, weights, kept, parameters, MACs per sample, and,
        where the strategy keeps the weights, test loss and accuracy right after pruning.
    """
    record_path = path.with_suffix(".json")
    if record_path.is_file():
        record: dict[str, Any] = json.loads(record_path.read_text(encoding="utf-8"))
        return record
    model = load_model(net, source.device)
    names = _names(model, settings, source.config.exclude)
    plan = _prune(model, source, settings, level, names)
    if level == 1:
        reporter.show(plan)
    _set_weights(model, source, settings, level, reporter)
    kept, weights = _counts(model, names)
    record = {
        "level": level,
        "target": settings.at(level),
        "sparsity": 1.0 - kept / weights,
        "weights": weights,
        "kept": kept,
        "params": models.count_params(model),
        "macs": source.count_macs(model),
    }
    if settings.then in KEEPS_WEIGHTS:
        record["test_loss"], record["test_acc"] = source.test(model)
    source.save(model, path, json.loads(json.dumps(plan.to_dict())))
    write_json(record_path, record)
    return record


def sparsity_of_run(source: Source, settings: PruneSettings) -> float:
    """Of the layers that will be pruned, before."""
    if not source.saved.sparse:
        return 0.0
    model = load_model(source.path)
    kept, weights = _counts(model, _names(model, settings, source.config.exclude))
    return 1.0 - kept / weights


def start_dense(source: Source, net: Path, path: Path) -> None:
    """Write the network of ``net`` to ``path`` with its pruned weights back as zeros, once."""
    if not path.is_file():
        source.save(redense_(load_model(net, source.device)), path, None)


def training_config(source: Source, settings: PruneSettings, init: Path, record: dict[str, Any]) -> TrainConfig:
    """The run that starts from the pruned network in ``init``: budget of the strategy, layout of the file."""
    config = source.config.dense(
        init=str(init),
        snapshots=(),
        sparsity=record["target"],
        block=settings.block or (source.config.block if source.saved.sparse else "1"),
        below_break_even=settings.below_break_even,
    )
    then = settings.then
    if then in ("finetune", "redense"):
        return budgets.finetune(config, settings.epochs, settings.lr)
    if then == "lr-rewind":
        return config if settings.epochs is None else _last_epochs(source, config, settings.epochs)
    if then == "scratch-b":
        config = budgets.scratch_b(config, source.macs, record["macs"], settings.cap)
    else:
        config = budgets.scratch_e(config)
        if settings.epochs is not None:
            config = dataclasses.replace(config, epochs=settings.epochs, steps=0)
    return config if settings.lr is None else dataclasses.replace(config, lr=settings.lr)


def _last_epochs(source: Source, config: TrainConfig, epochs: int) -> TrainConfig:
    return budgets.last_epochs(config, epochs, len(source.task.train))


def _names(model: nn.Module, settings: PruneSettings, exclude: tuple[str, ...]) -> list[str]:
    """Layers to prune: those that globs name, or all that pruning touches by itself."""
    try:
        chosen = prunable(model, exclude=(*exclude, *settings.exclude)) if not settings.layers else None
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None
    if chosen is not None:
        return [c.name for c in chosen]
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, SparseModule))]
    out = [n for n in layers if _any(n, settings.layers) and not _any(n, (*exclude, *settings.exclude))]
    if not out:
        raise ConfigError(f"layers: expected globs of layers, got {', '.join(settings.layers)}; the model has {layers}")
    return out


def _any(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _prune(model: nn.Module, source: Source, settings: PruneSettings, level: int, names: list[str]) -> Any:
    options: dict[str, Any] = {
        "scope": settings.scope,
        "block": settings.block_value,
        "names": names,
        "per_layer": settings.allocation,
        "example_input": source.task.example(source.device),
        "seed": _seed(source, settings, level),
        "below_break_even": settings.below_break_even,
    }
    if settings.criterion in NEEDS_DATA:
        options["batches"] = source.task.scoring_batches(source.device, settings.score_batches)
    try:
        if settings.levels:
            return prune_level_(model, Level(level, settings.fraction), settings.criterion, **options)
        return prune_(model, settings.sparsity, settings.criterion, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None


def _set_weights(model: nn.Module, source: Source, settings: PruneSettings, level: int, reporter: Reporter) -> None:
    if settings.then == "lottery":
        assert settings.rewind_step is not None
        rewind_(model, source.snapshot(settings.rewind_step))
        absent = sum(int((m.mask & (m.weight == 0)).count_nonzero()) for m in _sparse(model))
        if absent and source.saved.sparse:  # a dynamic method stored them later
            kept = sum(int(m.mask.count_nonzero()) for m in _sparse(model))
            reporter.warn(
                f"{absent:,} of {kept:,} weights were not stored at step {settings.rewind_step}; they start at zero"
            )
    elif settings.then in FRESH:
        rewind_(model, source.fresh(_seed(source, settings, level)))
        if settings.rescale:
            for module in _sparse(model):
                module.load_dense_(module.weight.detach(), rescale=True)


def _sparse(model: nn.Module) -> list[SparseModule]:
    return [module for module in model.modules() if isinstance(module, SparseModule)]


def _seed(source: Source, settings: PruneSettings, level: int) -> int:
    # Never the run's own: its first weights are another strategy (lottery, step 0).
    return (source.config.seed if settings.seed is None else settings.seed) + level


def _counts(model: nn.Module, names: list[str]) -> tuple[int, int]:
    """Weights of the named layers that are kept, and that there were."""
    kept = weights = 0
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, SparseModule):
            kept += int(module.mask.count_nonzero())
            weights += int(torch.Size(module.grid.weight_shape).numel())
        else:
            size = int(module.weight.numel())  # type: ignore[union-attr, operator]
            kept, weights = kept + size, weights + size
    return kept, weights
