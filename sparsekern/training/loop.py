"""The training loop: reproducible, resumable to the bit on the CPU, stoppable at any step."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekern.training.callbacks import Callback
from sparsekern.training.channel_training import channel_training
from sparsekern.training.checkpoint import (
    load_newest,
    rng_state,
    save_checkpoint,
    seed_all,
    set_rng_state,
)
from sparsekern.training.config import TrainConfig
from sparsekern.training.curves import plot_curves
from sparsekern.training.dynamic import build_topology, densities, exploration, will_update
from sparsekern.training.errors import CheckpointError, ConfigError, DivergedError, Interrupted
from sparsekern.training.folder import check_folder, check_same, has_checkpoint, start_folder, write_json
from sparsekern.training.metrics import MetricsLog
from sparsekern.training.network import Network, build_network, measure, plan_of, resolve_device, restore_network
from sparsekern.training.optim import make_optimizer
from sparsekern.training.progress import Reporter
from sparsekern.training.result import MEASURED, TrainResult, read_result
from sparsekern.training.schedules import schedule, set_lr
from sparsekern.training.sparse_lr import realised_sparsity, sparse_lr_factor
from sparsekern.training.step import PHASES, Step
from sparsekern.training.task import Task, evaluate, load_task
from sparsekern.training.weights import CHANNELS, save_net, snapshot_path

if TYPE_CHECKING:
    from sparsekern.topology import UpdateRecord

__all__ = [
    "TrainResult",
    "check_folder",
    "check_same",
    "has_checkpoint",
    "read_result",
    "start_folder",
    "train",
    "write_json",
]


def train(
    config: TrainConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    label: str = "",
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train the model of ``config`` and, with ``out``, leave a run folder behind.

    The folder holds ``config.yaml``, ``plan.json``, ``metrics.jsonl``, ``curves.png``, ``result.json``, ``model.pt``
    and ``checkpoints/``, and ``snapshots/`` where the configuration asks for them. On the CPU with the same number of
    threads, a run that was killed and resumed ends with exactly the weights of one that was not.

    Args:
        out: run folder; None keeps everything in memory.
        resume: continue from the newest checkpoint in ``out``; a finished run is returned as it is.
        overwrite: delete an earlier run in ``out``.
        reporter: progress output, silent by default.
        label: name of the run in progress lines.
        callbacks: get every record as it is written, see :class:`sparsekern.training.Callback`.

    Raises:
        ConfigError: a value that does not fit, a folder in use, or a resume with another configuration.
        CheckpointError: no readable checkpoint.
        DataError: data missing or damaged.
        DivergedError: the loss is not finite.
        Interrupted: Ctrl-C or SIGTERM; with ``out``, a checkpoint was written.
    """
    reporter = reporter or Reporter()
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_folder(folder, config, resume=resume, overwrite=overwrite)
    elif resume:
        raise ConfigError("resume: needs the run folder (--out)")
    elif config.snapshots:
        raise ConfigError("snapshots: need the run folder (--out)")
    if config.threads:
        torch.set_num_threads(config.threads)
    with reporter:
        return _Run(config, folder, resume, reporter, label, callbacks).run()


@dataclass
class _Sums:
    """Running sums, part of every checkpoint so that a resumed run writes the same lines."""

    loss: Tensor
    correct: Tensor
    count: int = 0

    @classmethod
    def zero(cls, device: torch.device) -> _Sums:
        return cls(
            torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)
        )

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        self.loss += loss.double() * y.numel()
        self.correct += (logits.argmax(1) == y).sum()
        self.count += y.numel()

    def means(self) -> tuple[float, float]:
        count = max(1, self.count)
        return float(self.loss) / count, float(self.correct) / count

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "correct": self.correct, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.count = state["count"]


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        folder: Path | None,
        resume: bool,
        reporter: Reporter,
        label: str,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config, self.folder, self.resume, self.reporter, self.label = config, folder, resume, reporter, label
        self.callbacks = callbacks
        self.device = resolve_device(config.device)
        self.task: Task = load_task(config)
        self.per_epoch = len(self.task.train)
        self.total = config.steps or config.epochs * self.per_epoch
        if any(step > self.total for step in config.snapshots):
            raise ConfigError(f"snapshots: expected steps up to {self.total} (the run's), got {max(config.snapshots)}")
        self.explored: dict[str, Any] | None = None
        self.step_number = 0
        self.seconds_before = 0.0
        self.resumed_from: int | None = None
        self.last: dict[str, float | None] = {}
        saved = self._newest() if resume else None
        self.network, plan = self._build(saved)
        self.optimizer = make_optimizer(self.network.model, config)
        self.topology = build_topology(self.network.model, self.network.plan, self.optimizer, config, self.total)
        self.channels = channel_training(self.network.model, config, self.task.example(self.device))
        self.step = Step(self.network.model, self.optimizer, config, topology=self.topology, channels=self.channels)
        self.factor = schedule(
            config.schedule,
            self.total,
            warmup=round(config.warmup * self.per_epoch),
            milestones=config.milestones,
            gamma=config.gamma,
        )
        self.interval, self.epoch = _Sums.zero(self.device), _Sums.zero(self.device)
        self.phases = dict.fromkeys(("data", *PHASES), 0.0)
        self.phase_steps = 0
        self.run_phases = dict(self.phases)
        self.run_steps = 0
        self.run_wall = 0.0
        self.metrics: MetricsLog | None = None
        self.metrics_offset: int = saved["metrics_offset"] if saved is not None else 0
        if saved is not None:
            self._restore(saved)
        elif folder is not None:
            self._open_folder()
        if plan is not None:
            reporter.show(plan)
        self.base_lr = self._scaled_lr()
        for note in self.network.notes:
            reporter.warn(note)
        if self.topology is not None and not will_update(self.topology):
            reporter.warn(
                f"blocks will not move: an update every {config.update_every} steps until "
                f"{config.stop_fraction:g} of {self.total} steps is none"
            )

    # -- setting up ------------------------------------------------------------------------------------------------

    def _newest(self) -> dict[str, Any] | None:
        assert self.folder is not None
        saved = load_newest(self.folder / "checkpoints", self.reporter.warn)
        if saved is None:
            return None
        check_same(TrainConfig.from_dict(saved["config"], source="checkpoint"), self.config, self.folder)
        if saved["threads"] != torch.get_num_threads():
            self.reporter.warn(
                f"the run was started with {saved['threads']} threads and continues with {torch.get_num_threads()}: "
                "results will agree to rounding, not to the bit"
            )
        return saved

    def _build(self, saved: dict[str, Any] | None) -> tuple[Network, Any]:
        example = self.task.example(self.device)
        config = self.config
        own = self.folder / CHANNELS if self.resume and self.folder is not None else None
        if own is not None and own.is_file():
            # The folder's copy: the file it was made from may be gone.
            config = dataclasses.replace(config, channels=str(own))
        if saved is not None:
            classes = self.task.num_classes
            return restore_network(config, saved["model"], saved["plan"], example, classes), None
        scored = config.allocation in ("snip", "grasp")
        batches = self.task.scoring_batches(self.device) if scored else None
        network, plan = build_network(config, example, self.task.num_classes, batches=batches)
        # Whatever the construction drew, dense and sparse nets train with the same random numbers.
        seed_all(config.seed)
        return network, plan

    def _open_folder(self) -> None:
        """Not before data, model and method are known to work: a mistake leaves no folder behind."""
        assert self.folder is not None
        own = self.folder / CHANNELS
        kept = own if self.resume and own.is_file() else self.config.channels
        # Read before an earlier run's files go: it may be one of them.
        channels = Path(kept).read_bytes() if kept is not None else None
        if not self.resume:
            start_folder(self.folder, self.config)
        if channels is not None:
            (self.folder / CHANNELS).write_bytes(channels)
        if self.network.plan is not None:
            write_json(self.folder / "plan.json", self.network.plan)

    def _restore(self, saved: dict[str, Any]) -> None:
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.task.train.load_state_dict(saved["data"])
            if self.topology is not None:
                self.topology.load_state_dict(saved["topology"])
            if self.channels is not None:
                self.channels.load_state_dict(saved["channels"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"checkpoint of step {saved['step']} does not fit this run: {error}") from None
        self.step_number = self.resumed_from = saved["step"]
        self.seconds_before = saved["seconds"]
        self.interval.load_state_dict(saved["interval"])
        self.epoch.load_state_dict(saved["epoch"])
        self.last = dict(saved["last"])
        set_rng_state(saved["rng"])

    def _scaled_lr(self) -> float:
        """The base rate; with ``sparse_lr``, scaled for the sparsity that the net has now."""
        if not self.config.sparse_lr:
            return self.config.base_lr
        return self.config.base_lr * sparse_lr_factor(realised_sparsity(self.network.model))

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        finished = self._finished()
        if finished is not None:
            self.reporter.line(f"{self._prefix()}already finished: {self.folder}")
            return finished
        self.reporter.start(self.label or self.config.model, self.total, self.step_number)
        if self.resumed_from is not None:
            self.reporter.line(f"{self._prefix()}resumed at step {self.step_number} of {self.total}")
        if self.config.sparse_lr:
            self.reporter.line(
                f"{self._prefix()}learning rate {self.config.base_lr:g} x {self.base_lr / self.config.base_lr:.3g} = "
                f"{self.base_lr:.4g} at sparsity {realised_sparsity(self.network.model):.4g}"
            )
        self.started = self.saved_at = time.monotonic()
        self.tick = (self.started, self.step_number)
        self.network.model.train()
        if self.folder is not None:
            self.metrics = MetricsLog(self.folder / "metrics.jsonl", self.metrics_offset)
            if self.step_number == 0:
                self._snapshot()
        try:
            with _stop_signals() as stop:
                for x, y in self._batches():
                    self._train_step(x, y)
                    if stop.number is not None and self.step_number < self.total:
                        self._stop(stop.number)
                    if self._checkpoint_due():
                        self._checkpoint()
                if self.folder is not None and self.run_steps:
                    self._checkpoint()
                return self._finish()
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches until the last step; epochs follow each other without end."""
        while self.step_number < self.total:
            begin = time.perf_counter()
            for x, y in self.task.train:
                x, y = self.step.to_device(x, y)
                self._spend("data", time.perf_counter() - begin)
                yield x, y
                if self.step_number >= self.total:
                    return
                begin = time.perf_counter()

    def _train_step(self, x: Tensor, y: Tensor) -> None:
        set_lr(self.optimizer, self.base_lr * self.factor(self.step_number))
        out = self.step(x, y)
        self.step_number += 1
        for name, seconds in zip(PHASES, out.seconds, strict=True):
            self._spend(name, seconds)
        self.phase_steps += 1
        self.run_steps += 1
        for sums in (self.interval, self.epoch):
            sums.add(out.loss, out.logits, y)
        if out.update is not None:
            self._log_update(out.update)
        epoch_ends = self.step_number % self.per_epoch == 0 or self.step_number == self.total
        if self.step_number % self.config.log_every == 0 or epoch_ends:
            self._log_interval()
        if epoch_ends:
            self._end_epoch()
        self._snapshot()

    def _snapshot(self) -> None:
        if self.folder is not None and self.step_number in self.config.snapshots:
            self._save_net(snapshot_path(self.folder, self.step_number), self.network.plan)

    def _save_net(self, path: Path, plan: dict[str, Any] | None) -> None:
        save_net(
            path,
            self.network.model,
            self.config,
            plan=plan,
            in_shape=self.task.in_shape,
            num_classes=self.task.num_classes,
        )

    def _spend(self, phase: str, seconds: float) -> None:
        self.phases[phase] += seconds
        # The first step of a process compiles, allocates and starts threads: it does not count in the run's means.
        if self.run_steps or self.total == 1:
            self.run_phases[phase] += seconds

    def _log_interval(self) -> None:
        loss, accuracy = self.interval.means()
        if not math.isfinite(loss):
            raise DivergedError(
                f"loss became {loss} by step {self.step_number}: lower the learning rate (now {self.base_lr:g}) "
                "or add warm-up"
            )
        now = time.monotonic()
        then, step_then = self.tick
        rate = (self.step_number - step_then) / max(now - then, 1e-9)
        self.run_wall += now - then
        self.tick = (now, self.step_number)
        explored = {} if self.topology is None else {"exploration_rate": self._exploration()["exploration_rate"]}
        record = self._write(
            "interval",
            loss=loss,
            train_acc=accuracy,
            lr=self.optimizer.param_groups[0]["lr"],
            **explored,
            step_ms=self._split(self.phases, max(1, self.phase_steps), 1e3 / max(rate, 1e-9), scale=1e3),
        )
        for callback in self.callbacks:
            callback.on_step(record)
        self.reporter.step(self.step_number, loss, accuracy, rate)
        self.interval = _Sums.zero(self.device)
        self.phases = dict.fromkeys(self.phases, 0.0)
        self.phase_steps = 0

    def _split(self, phases: dict[str, float], steps: int, wall: float, scale: float = 1.0) -> dict[str, float]:
        """Mean times of one step; ``wall`` is its total where the phases only measure launches."""
        if self.device.type != "cpu":
            return {"total": wall}
        means = {name: scale * seconds / steps for name, seconds in phases.items()}
        return {**means, "total": sum(means.values())}

    def _end_epoch(self) -> None:
        if self.channels is not None:
            self.channels.end_epoch()
        loss, accuracy = self.epoch.means()
        self.epoch = _Sums.zero(self.device)
        self.last.update(train_loss=loss, train_acc=accuracy)
        now: dict[str, Any] = {"train_loss": loss, "train_acc": accuracy}
        epoch = self.step_number // self.per_epoch
        if self.step_number == self.total or epoch % self.config.eval_every == 0:
            now.update(self._test())
        seconds = self._seconds()
        if self.topology is not None:
            now.update(self._exploration(), density=densities(self.topology))
        record = self._write("epoch", lr=self.optimizer.param_groups[0]["lr"], seconds=seconds, **now)
        for callback in self.callbacks:
            callback.on_epoch(record)
        accuracies = "  ".join(
            f"{split} {100 * value:.2f} %"
            for split in ("train", "val", "test")
            if (value := now.get(f"{split}_acc")) is not None
        )
        if self.topology is not None:
            accuracies += f"  R_s {now['exploration_rate']:.3f}"
        self.reporter.line(
            f"{self._prefix()}epoch {self.step_number / self.per_epoch:.4g}/{self.total / self.per_epoch:.4g}  "
            f"loss {loss:.4f}  {accuracies}  {seconds:.1f} s"
        )
        self.tick = (time.monotonic(), self.step_number)

    def _test(self) -> dict[str, float | None]:
        test_loss, test_acc = evaluate(self.step, self.task.test)
        self.last.update(test_loss=test_loss, test_acc=test_acc)
        if self.task.val is not None:
            val_loss, val_acc = evaluate(self.step, self.task.val)
            self.last.update(val_loss=val_loss, val_acc=val_acc)
            if val_acc > (self.last.get("best_val_acc") or -1.0):
                self.last.update(best_val_acc=val_acc, test_acc_at_best_val=test_acc)
        return self.last

    def _log_update(self, update: UpdateRecord) -> None:
        self.base_lr = self._scaled_lr()
        self.explored = None
        record = self._write(
            "update",
            number=update.number,
            drop_fraction=update.fraction,
            dropped=sum(update.dropped.values()),
            grown=sum(update.grown.values()),
        )
        for callback in self.callbacks:
            callback.on_update(record)

    def _exploration(self) -> dict[str, Any]:
        # Counted once per update: at block 1 it reads one bit per weight.
        if self.explored is None:
            self.explored = exploration(self.topology, self.network.model)
        return self.explored

    def _write(self, kind: str, **values: Any) -> dict[str, Any]:
        """The record, which is also a line of metrics.jsonl if there is a folder."""
        place = {"step": self.step_number, "epoch": round(self.step_number / self.per_epoch, 6)}
        if self.metrics is not None:
            self.metrics.write(kind, **place, **values)
        return {"kind": kind, **place, **values}

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _prefix(self) -> str:
        return f"{self.label}: " if self.label else ""

    # -- checkpoints and the end -----------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        if self.folder is None or self.step_number == self.total:
            return False
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        by_step = bool(every) and self.step_number % every == 0
        return by_step or (bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes)

    def _checkpoint(self) -> Path:
        assert self.folder is not None and self.metrics is not None
        state = {
            "config": self.config.to_dict(),
            "digest": self.config.digest(),
            "model": self.network.model.state_dict(),
            "plan": self.network.plan,
            "optimizer": self.optimizer.state_dict(),
            "topology": None if self.topology is None else self.topology.state_dict(),
            "channels": None if self.channels is None else self.channels.state_dict(),
            "data": self.task.train.state_dict(),
            "rng": rng_state(),
            "metrics_offset": self.metrics.sync(),
            "interval": self.interval.state_dict(),
            "epoch": self.epoch.state_dict(),
            "last": self.last,
            "seconds": self._seconds(),
            "threads": torch.get_num_threads(),
        }
        path = save_checkpoint(self.folder / "checkpoints", self.step_number, state)
        self.saved_at = time.monotonic()
        return path

    def _stop(self, number: int) -> None:
        if self.folder is not None:
            self._checkpoint()
        raise Interrupted(f"{self._prefix()}stopped at step {self.step_number} of {self.total}", self.folder, number)

    def _finish(self) -> TrainResult:
        if self.channels is not None:
            self.channels.finish()
        if self.topology is not None:
            # Blocks have moved: what the plan says of densities, parameters and MACs is of the first step.
            example = self.task.example(self.device)
            plan = plan_of(self.network.model, example, self.network.plan)
            self.network = measure(self.network.model, plan, example)
        size = self.network.size()
        steps = max(1, self.run_steps - (self.total > 1))
        ended: dict[str, Any] = {name: self.last.get(name) for name in MEASURED}
        ended.update(self._exploration())
        result = TrainResult(
            config=self.config,
            steps=self.step_number,
            epochs=self.step_number / self.per_epoch,
            **ended,
            params=size["params"],
            macs=size["macs"],
            layers=size["layers"],
            seconds=self._seconds(),
            step_seconds=self._split(self.run_phases, steps, self.run_wall / max(1, self.run_steps)),
            threads=torch.get_num_threads(),
            updates=0 if self.topology is None else self.topology.updates,
            resumed_from=self.resumed_from,
            folder=self.folder,
            model=self.network.model.eval(),
        )
        if self.folder is not None:
            self._write_result(result)
        return result

    def _write_result(self, result: TrainResult) -> None:
        assert self.folder is not None
        self._save_net(self.folder / "model.pt", self.network.plan)
        plot_curves({self.label or self.config.model: self.folder}, self.folder / "curves.png")
        # Last: its presence says that the run is complete.
        write_json(self.folder / "result.json", result.to_dict())

    def _finished(self) -> TrainResult | None:
        if self.folder is None or self.resumed_from != self.total:
            return None
        if self.channels is not None:
            self.channels.finish()
        return read_result(self.folder, self.network.model.eval())


class _Stop:
    number: int | None = None


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the running step; a second one acts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.number is not None:
            raise KeyboardInterrupt
        stop.number = number

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
