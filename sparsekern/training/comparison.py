"""Train a sparse net beside its dense twin and beside a narrower dense net of equal MACs, and compare all three."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekern.training import text_table
from sparsekern.training.config import TrainConfig
from sparsekern.training.curves import plot_curves
from sparsekern.training.errors import CheckpointError, ConfigError
from sparsekern.training.folder import check_folder, start_folder, write_json
from sparsekern.training.memory import measure_memory
from sparsekern.training.network import build_network, load_model, resolve_device
from sparsekern.training.part import train_part
from sparsekern.training.progress import Reporter
from sparsekern.training.result import TrainResult, read_result
from sparsekern.training.task import Task, load_task
from sparsekern.training.timing import ROUNDS, StepTime, time_steps

NETS = ("dense", "small", "sparse")


@dataclass
class CompareResult:
    """Three nets side by side.

    Attributes:
        width: width factor of the small net.
        results, times, memory: by net; ``memory`` as :func:`sparsekern.training.memory.training_memory` returns it.
    """

    config: TrainConfig
    width: float
    results: dict[str, TrainResult]
    times: dict[str, StepTime]
    memory: dict[str, dict[str, Any]]
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "width": self.width,
            "nets": {
                name: {
                    "result": self.results[name].to_dict(),
                    "time": self.times[name].to_dict(),
                    "memory": self.memory[name],
                }
                for name in self.results
            },
        }


def compare(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    rounds: int = ROUNDS,
) -> CompareResult:
    """Train the dense twin, the narrower dense net of equal MACs, and the sparse net of ``config``, one after another.

    All see the same batches in the same order from the same seed. Each is an ordinary run in ``out/dense``,
    ``out/small`` and ``out/sparse``; with ``resume``, finished ones are kept and a broken-off one continues. Step
    times are then measured in turn in this process, memory in a process per net.

    Writes ``table.md``, ``compare.json`` and ``curves.png`` into ``out``.

    Raises:
        ConfigError: sparsity 0, or a model that cannot be made as narrow as equal MACs ask.
        Others: those of :func:`sparsekern.training.train`.
    """
    if config.sparsity == 0 and not config.override:
        raise ConfigError("compare: expected a sparsity above 0, got 0; there is nothing to compare with")
    if config.init is not None or config.channels is not None:
        name = "init" if config.init is not None else "channels"
        raise ConfigError(f"compare: trains fresh nets of the model's own shape, got {name}; drop it")
    reporter = reporter or Reporter()
    folder = Path(out)
    check_folder(folder, config, resume=resume, overwrite=overwrite)
    finished = _finished(config, folder) if resume else None
    if finished is not None:
        reporter.line(f"already finished: {folder}")
        return finished
    task = load_task(config)
    width = _width(config, folder, task, resume)
    configs = {
        "dense": config.dense(),
        "small": config.dense(width=width),
        "sparse": config,
    }
    results = {}
    for name in NETS:
        results[name] = train_part(configs[name], folder / name, resume=resume, reporter=reporter)
    reporter.line("measuring step times and memory")
    times = _times(configs, folder, task, rounds)
    memory = {name: measure_memory(folder / name) for name in NETS}
    comparison = CompareResult(config, width, results, times, memory, folder)
    plot_curves({name: folder / name for name in NETS}, folder / "curves.png")
    (folder / "table.md").write_text(markdown_table(comparison), encoding="utf-8")
    write_json(folder / "compare.json", comparison.to_dict())
    return comparison


def _width(config: TrainConfig, folder: Path, task: Task, resume: bool) -> float:
    """Width of the dense net that costs what the sparse one costs; kept in the folder, for a measured plan may vary."""
    if resume:
        return float(_saved(folder)["width"])
    try:
        width = width_of_equal_macs(config, task)
    except NoSuchWidth as error:
        raise ConfigError(f"compare: no dense {config.model} is as small as the sparse one: {error}") from None
    start_folder(folder, config)
    write_json(folder / "compare.json", {"config": config.to_dict(), "width": width})
    return width


class NoSuchWidth(ValueError):
    """No dense net has as few MACs as the sparse one."""


def width_of_equal_macs(config: TrainConfig, task: Task) -> float:
    """Width factor at which the dense net has the MACs of the sparse net of ``config``.

    Raises:
        NoSuchWidth: none is as small.
    """
    from sparsekern import models

    device = resolve_device(config.device)
    scored = task.scoring_batches(device) if config.allocation in ("snip", "grasp") else None
    network, _ = build_network(config, task.example(device), task.num_classes, batches=scored)
    try:
        width, _ = models.match_macs(config.model, network.macs, num_classes=task.num_classes, in_shape=task.in_shape)
    except ValueError as error:
        raise NoSuchWidth(str(error)) from None
    return float(width)


def _saved(folder: Path) -> dict[str, Any]:
    path = folder / "compare.json"
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        float(saved["width"])
    except FileNotFoundError:
        raise ConfigError(f"resume: {folder} holds a single run, not a comparison; drop --compare") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); start again with --overwrite") from None
    return saved


def _finished(config: TrainConfig, folder: Path) -> CompareResult | None:
    saved = _saved(folder)
    nets = saved.get("nets")
    results = {name: read_result(folder / name) for name in NETS}
    if nets is None or any(result is None for result in results.values()):
        return None
    complete = {name: result for name, result in results.items() if result is not None}
    times = {name: StepTime(**nets[name]["time"]) for name in NETS}
    return CompareResult(config, saved["width"], complete, times, {n: nets[n]["memory"] for n in NETS}, folder)


def _times(configs: Mapping[str, TrainConfig], folder: Path, task: Task, rounds: int) -> dict[str, StepTime]:
    device = resolve_device(configs["sparse"].device)
    batches = [batch for batch, _ in zip(task.train, range(4), strict=False)]
    full = [batch for batch in batches if batch[0].shape[0] == batches[0][0].shape[0]]
    nets = {name: (load_model(folder / name, device), config) for name, config in configs.items()}
    return time_steps(nets, full, rounds=rounds)


# -- the table ---------------------------------------------------------------------------------------------------------


def table_rows(comparison: CompareResult) -> list[list[str]]:
    """A row per quantity: its name, then its value for each net."""
    nets = list(comparison.results)
    results = [comparison.results[net] for net in nets]
    times = [comparison.times[net] for net in nets]
    memory = [comparison.memory[net] for net in nets]
    state = [[m.get(key) for key in ("weights", "gradients", "optimizer")] for m in memory]

    def milliseconds(phase: str) -> list[str]:
        return [f"{1e3 * getattr(time, phase):.2f}" for time in times]

    return [
        ["test accuracy [%]", *("-" if r.test_acc is None else f"{100 * r.test_acc:.2f}" for r in results)],
        ["parameters", *(f"{r.params:,}" for r in results)],
        ["MACs per sample", *(f"{r.macs:,}" for r in results)],
        ["training step [ms]", *milliseconds("total")],
        ["- forward and loss", *milliseconds("forward")],
        ["- backward", *milliseconds("backward")],
        ["- optimizer", *milliseconds("optimizer")],
        *_topology_row(results),
        ["speedup of the step", *(f"{time.speedup:.2f}x" for time in times)],
        ["peak training memory [MB]", *(_megabytes(m.get("peak")) for m in memory)],
        ["- weights, grads, optimizer [MB]", *(_megabytes(_sum(parts)) for parts in state)],
        ["- saved for backward [MB]", *(_megabytes(m.get("saved")) for m in memory)],
        ["layers sparse/masked/dense", *("{sparse}/{masked}/{dense}".format(**r.layers) for r in results)],
    ]


def _topology_row(results: list[TrainResult]) -> list[list[str]]:
    """Means of the run itself, for nets whose blocks move."""
    if not any(result.updates for result in results):
        return []
    spent = [r.step_seconds.get("topology") if r.updates else None for r in results]
    return [["topology updates, per step [ms]", *("-" if s is None else f"{1e3 * s:.2f}" for s in spent)]]


def heading(comparison: CompareResult) -> list[str]:
    titles = {"dense": "dense", "small": f"dense, width {comparison.width:.3g}", "sparse": "sparse"}
    return ["", *(titles[name] for name in comparison.results)]


def _sum(parts: list[int | None]) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"


def conditions(comparison: CompareResult) -> list[str]:
    """How the numbers were measured, one line each."""
    time, result = comparison.times["sparse"], comparison.results["sparse"]
    config = comparison.config
    lines = [
        f"{config.model} on {config.data}, batch {config.batch_size}, sparsity {config.sparsity:g} of {config.budget}, "
        f"block {config.block}, allocation {config.allocation}, seed {config.seed}, {result.steps} steps, "
        f"{result.threads} threads{', bf16 autocast' if config.amp else ''}{', compiled' if config.compile else ''}.",
        f"Step times: medians of {time.rounds} rounds of {time.steps} steps, the nets in turn in one process on the "
        "same real batches; speedup: median over rounds of dense time / own time. Data loading is outside.",
        "Peak memory: growth of peak resident memory over three training steps, in a process per net (on CUDA: of "
        "allocated memory); below it, bytes counted tensor by tensor.",
    ]
    if result.layers["sparse"] == 0:
        lines.append("No layer runs sparse here: the plan says why (sparse/plan.json).")
    errors = {name: m["error"] for name, m in comparison.memory.items() if "error" in m}
    lines += [f"Memory of {name} could not be measured: {error}" for name, error in errors.items()]
    return lines


def markdown_table(comparison: CompareResult) -> str:
    table = text_table.markdown(heading(comparison), table_rows(comparison))
    return table + "\n" + "\n".join(f"- {line}" for line in conditions(comparison)) + "\n"


def rich_table(comparison: CompareResult) -> Any:
    """The table for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    for index, column in enumerate(heading(comparison)):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in table_rows(comparison):
        table.add_row(*[Text(cell) for cell in row], style="bold" if row[0].startswith("speedup") else None)
    return Group(table, *[Text(line, style="dim") for line in conditions(comparison)])
