"""A sparse and a dense net trained on CIFAR-10: ``python -m benchmarks.accuracy --contender sparse --data DIR``.

Both train for equally many epochs, as many as both manage within ``--budget-s`` seconds by a few steps timed before.
The first of them writes what was decided into ``training/plan.json`` beside the result; a run that was cut goes on at
its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import files, machine
from benchmarks.device import synchronize
from benchmarks.row_file import RowFile
from sparsekern.training.config import TrainConfig
from sparsekern.training.loop import TrainResult, has_checkpoint, read_result, train
from sparsekern.training.network import build_network
from sparsekern.training.optim import make_optimizer
from sparsekern.training.progress import Reporter
from sparsekern.training.step import Step
from sparsekern.training.task import Task, load_task

CONTENDERS = ("dense", "sparse")
FOLDER = "training"
MODELS = ("wrn-28-10", "wrn-16-8")  # the first that gets LEAST_EPOCHS
LEAST_EPOCHS, MOST_EPOCHS = 8, 40
SHARE = 0.85  # of the budget for steps; the rest is for tests, checkpoints and the start
WARM_STEPS, TIMED_STEPS = 8, 24


def config(contender: str, model: str, epochs: int, data: str | None, device: str) -> TrainConfig:
    """The same run but for sparsity; ``data`` None stands for the rehearsal on a few digits."""
    common: dict[str, Any] = {
        **{"model": model, "epochs": epochs, "device": device, "amp": True, "channels_last": True, "seed": 0},
        **{"sparsity": 0.9 if contender == "sparse" else 0.0, "block": "32", "allocation": "erk"},
        **{"schedule": "linear", "nesterov": True, "lr": 0.1, "batch_size": 128, "warmup": min(1.0, epochs / 8)},
    }
    if data is None:
        digits = {"data": "digits", "subset": 32, "test_subset": 16, "batch_size": 16, "block": "16"}
        return TrainConfig(**{**common, **digits, "below_break_even": "sparse", "checkpoint_minutes": 0.0})
    cifar = {"data": "cifar10", "data_dir": data, "augment": ("crop", "flip"), "checkpoint_minutes": 0.75}
    return TrainConfig(**{**common, **cifar, "eval_every": max(1, epochs // 4)})


def joined(folders: str, into: Path) -> str:
    """One folder with the files of all ``folders`` (commas between), for a set that was carried in parts."""
    parts = [Path(part).resolve() for part in folders.split(",")]
    missing = [part for part in parts if not part.is_dir()]
    if missing:
        raise SystemExit(f"accuracy: expected a folder of data, {missing[0].name} is none")
    if len(parts) == 1:
        return str(parts[0])
    into.mkdir(parents=True, exist_ok=True)
    for path in (path for part in parts for path in part.rglob("*") if path.is_file()):
        (into / path.name).unlink(missing_ok=True)
        os.symlink(path, into / path.name)
    return str(into)


def step_seconds(settings: TrainConfig, task: Task) -> float:
    """Wall time of a training step, loading included, after a few that compile and tune."""
    device = torch.device(settings.device)
    network, _ = build_network(settings, task.example(device), task.num_classes)
    step = Step(network.model.train(), make_optimizer(network.model, settings), settings)
    done, start = 0, 0.0
    while done < WARM_STEPS + TIMED_STEPS:
        for x, y in task.train:
            if done == WARM_STEPS:
                synchronize(settings.device)
                start = time.perf_counter()
            step(*step.to_device(x, y))
            done += 1
            if done == WARM_STEPS + TIMED_STEPS:
                break
    synchronize(settings.device)
    return (time.perf_counter() - start) / TIMED_STEPS


def epochs_within(budget_s: float, slowest_step: float, steps: int) -> int:
    """Epochs of ``steps`` steps that the slowest net manages, at most ``MOST_EPOCHS``."""
    return min(MOST_EPOCHS, int(SHARE * budget_s / (slowest_step * steps)))


def decide(folder: Path, data: str | None, device: str, budget_s: float) -> dict[str, Any]:
    """Model and epochs, the same for both contenders: read, or timed and written."""
    known = files.read_json(folder / "plan.json")
    if isinstance(known, dict):
        return known
    if data is None:
        plan: dict[str, Any] = {"model": "wrn-10-1", "epochs": 1, "step_s": {}}
    else:
        task = load_task(config(CONTENDERS[0], MODELS[0], 1, data, device))  # the same batches for all
        for model in MODELS:
            seconds = {}
            for contender in CONTENDERS:
                seconds[contender] = step_seconds(config(contender, model, 1, data, device), task)
                print(f"{model}, {contender}: {1e3 * seconds[contender]:.1f} ms per step", flush=True)
            epochs = epochs_within(budget_s, max(seconds.values()), len(task.train))
            plan = {"model": model, "epochs": max(1, epochs), "step_s": seconds}
            if epochs >= LEAST_EPOCHS:
                break
    files.write_json(folder / "plan.json", plan)
    return plan


class Lines(Reporter):
    """Every message as a line of the log."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", flush=True)


def run(contender: str, folder: Path, data: str | None, device: str, budget_s: float) -> TrainResult:
    """Train, or go on, or read what is finished."""
    plan = decide(folder, data, device, budget_s)
    settings = config(contender, plan["model"], plan["epochs"], data, device)
    own = folder / contender
    finished = read_result(own)
    if finished is not None and not finished.config.differences(settings):
        return finished
    begun = (own / "config.yaml").exists() and has_checkpoint(own)
    return train(settings, own, resume=begun, overwrite=not begun, reporter=Lines(), label=contender)


def row_of(contender: str, result: TrainResult, device: str) -> dict[str, Any]:
    settings, sparse = result.config, contender == "sparse"
    return {
        **{"kind": "accuracy", "net": settings.model, "data": settings.data, "contender": contender},
        **{"block": int(settings.block) if sparse else 0, "sparsity": round(100 * settings.sparsity)},  # type: ignore[arg-type]
        **{"epochs": result.epochs, "batch": settings.batch_size, "test_acc": result.test_acc},
        **{"seconds": result.seconds, "step_s": result.step_seconds["total"], "params": result.params},
        **{"macs": result.macs, "layers": result.layers, "device": device, "resumed_from": result.resumed_from},
        **{"train_acc": result.train_acc, "train_loss": result.train_loss, "gpu_state": machine.gpu_state()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--data", help="folder of CIFAR-10, or several with commas between; none rehearses on digits")
    parser.add_argument("--budget-s", type=float, default=220.0)
    want = parser.parse_args()
    torch.backends.cudnn.benchmark = want.device == "cuda"
    if want.device == "cpu":
        torch.set_num_threads(1)
    folder = want.out.parent / FOLDER
    data = joined(want.data, folder / "data") if want.data else None
    if data is None and want.device == "cuda":
        raise SystemExit("accuracy: expected --data DIR")
    result = run(want.contender, folder, data, want.device, want.budget_s)
    out = RowFile(want.out, "gpu-toy" if data is None else "gpu-full")
    out.add(f"accuracy {want.contender}", row_of(want.contender, result, want.device))
    print(f"{want.contender}: test accuracy {100 * (result.test_acc or 0):.2f} %, {result.seconds:.0f} s")


if __name__ == "__main__":
    main()
