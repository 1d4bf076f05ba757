"""Reads what ``pytest benchmarks --benchmark-json`` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
KINDS = ("pass", "peers", "train", "net", "accuracy", "overhead", "missing")
BUSY = 0.25  # cores busy with other processes above which times are not to be trusted
_HOW = "expected a file written by `python -m pytest benchmarks --benchmark-json FILE`"


class ReportError(Exception):
    """The results can't be used; the message is one line that says why and what to do."""


Pair = tuple[float | None, float | None]


@dataclass(frozen=True)
class PassRow:
    """One pass of one layer, dense against sparse. Times in seconds, ``sparsity`` in percent.

    ``speedup`` is the median over rounds of dense / sparse with quartiles ``q1`` and ``q3``; ``max_error`` is relative
    to the product of absolute values. On a GPU (``device`` "cuda") times are device time with a cold L2; ``wall`` holds
    seconds with the host's work, ``graph`` seconds of a replayed CUDA graph and ``peak`` bytes allocated beyond the
    operands, each a (dense, sparse) pair of which either may be None. ``mode`` is "auto" or the backend forced.
    """

    op: str
    pass_: str
    shape: str
    memory_format: str
    block: int
    sparsity: int
    density: float
    dtype: str
    threads: int
    backend: str
    dense_s: float
    sparse_s: float
    speedup: float
    q1: float
    q3: float
    gflops: float
    dense_gflops: float
    gbytes_per_s: float
    max_error: float
    rounds: int
    neighbours: float | None
    device: str = "cpu"
    mode: str = "auto"
    wall: Pair = (None, None)
    graph: Pair = (None, None)
    peak: Pair = (None, None)
    metadata: float | None = None  # bytes of the layout over bytes of the values
    error_bound: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two rows the same measurement."""
        return (
            *(self.op, self.memory_format, self.shape, self.pass_, self.threads, self.block),
            *(self.sparsity, self.dtype, self.device, self.mode),
        )

    @property
    def graph_speedup(self) -> float | None:
        dense, sparse = self.graph
        return dense / sparse if dense and sparse else None

    @property
    def of_ideal(self) -> float:
        """Speed-up times density: 1.0 where all the work saved is time saved."""
        return self.speedup * self.density

    @property
    def loses(self) -> bool:
        return self.speedup < 1.0


@dataclass(frozen=True)
class PeerRow:
    """One pass of one linear layer by sparsekern and by others; ``speedups`` and ``failed`` are keyed by name."""

    pass_: str
    shape: str
    block: int
    sparsity: int
    density: float
    threads: int
    dense_s: float
    sparse_s: float
    speedup: float
    times: Mapping[str, float]
    speedups: Mapping[str, float]
    failed: Mapping[str, str]
    neighbours: float | None
    dtype: str = "float32"
    device: str = "cpu"
    mode: str = "auto"

    @property
    def key(self) -> tuple[object, ...]:
        where = (self.dtype, self.device, self.mode)
        return self.shape, self.pass_, self.threads, self.block, self.sparsity, *where

    @property
    def best(self) -> tuple[str, float] | None:
        """The fastest peer and its speed-up over dense."""
        return max(self.speedups.items(), key=lambda item: item[1]) if self.speedups else None


@dataclass(frozen=True)
class Contender:
    """One network in a training-step row: seconds, and what it holds and does per sample."""

    seconds: float
    parts: Mapping[str, float]
    params: int
    macs: int
    parameter_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class TrainRow:
    """Whole training steps; ``contenders`` are "dense", "sparse" and "narrow", ``layers`` counts layers by state."""

    model: str
    shape: str
    block: int | str
    sparsity: int
    threads: int
    speedup: float
    q1: float
    q3: float
    narrow_speedup: float
    layers: Mapping[str, int]
    contenders: Mapping[str, Contender]
    neighbours: float | None
    device: str = "cpu"

    @property
    def key(self) -> tuple[object, ...]:
        return self.shape, self.threads, str(self.block), self.sparsity, self.device

    @property
    def loses(self) -> bool:
        return self.speedup < 1.0


@dataclass(frozen=True)
class NetRow:
    """One whole network beside the dense one. Seconds of one batch, timed in turns with the dense net.

    Attributes:
        contender: "dense", "sparse", "narrow" (dense, of the sparse net's MACs) or "narrow, multiples of 8".
        mode: "eager", "compile" or "graph" (a replayed CUDA graph).
        pass_: "forward" (evaluation, no gradients) or "step" (forward, backward, optimizer).
        sparsity: percent; 0 for dense nets, whose block is 0 and allocation "".
        wall_s: seconds with the host's work.
        ideal: speed-up by Amdahl's law, had the convolutions taken their share of the dense MACs; None for dense nets.
        parts: seconds on the device by kind of kernel.
        optimizers: seconds of the optimizer's step alone, by implementation.
        peak_bytes: most memory that the net, its optimizer and one step held; None where it is not measured.
        layers: layers by state.
    """

    net: str
    batch: int
    contender: str
    mode: str
    pass_: str
    block: int
    sparsity: int
    allocation: str
    seconds: float
    dense_s: float
    speedup: float
    q1: float
    q3: float
    wall_s: float | None
    ideal: float | None
    params: int
    macs: int
    peak_bytes: int | None
    parts: Mapping[str, float]
    optimizers: Mapping[str, float]
    layers: Mapping[str, int]
    device: str
    dtype: str

    @property
    def name(self) -> str:
        """The contender with what tells it from its like."""
        return f"{self.contender}, block {self.block}, {self.allocation}" if self.sparsity else self.contender

    @property
    def key(self) -> tuple[object, ...]:
        return (self.net, self.batch, self.name, self.sparsity, self.mode, self.pass_, self.device)

    @property
    def loses(self) -> bool:
        return self.speedup < 1.0


@dataclass(frozen=True)
class AccuracyRow:
    """One net trained on real data; ``test_acc`` as a fraction, ``seconds`` of the whole run, tests included."""

    net: str
    data: str
    contender: str
    block: int
    sparsity: int
    epochs: float
    batch: int
    test_acc: float
    seconds: float
    step_s: float
    params: int
    macs: int
    layers: Mapping[str, int]
    device: str

    @property
    def key(self) -> tuple[object, ...]:
        return self.net, self.data, self.contender, self.block, self.sparsity, self.epochs, self.device


@dataclass(frozen=True)
class OverheadRow:
    """What something costs beside what it accompanies: ``share`` = ``seconds`` / ``base_s``.

    Attributes:
        what: "dispatch" (time of a call beyond that of the kernels it chooses, over theirs), "topology update" (one
            update over 100 steps of the layer), or, of a whole net (``op`` "net"), "topology update, METHOD" (one
            update over 100 steps of the net) and "dense gradient of every step, snfs" (over one step).
        base_s: seconds of what it accompanies.
    """

    what: str
    op: str
    shape: str
    pass_: str
    block: int
    sparsity: int
    seconds: float
    base_s: float
    share: float
    backend: str
    device: str

    @property
    def key(self) -> tuple[object, ...]:
        return self.what, self.op, self.shape, self.pass_, self.block, self.sparsity, self.device


@dataclass(frozen=True)
class Missing:
    """A row that could not be measured, and why."""

    what: str
    reason: str

    @property
    def key(self) -> tuple[object, ...]:
        return (self.what,)


@dataclass
class Results:
    """Rows of one or more files from one machine."""

    machine: dict[str, Any]
    runs: list[dict[str, Any]]
    passes: list[PassRow] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    training: list[TrainRow] = field(default_factory=list)
    nets: list[NetRow] = field(default_factory=list)
    accuracy: list[AccuracyRow] = field(default_factory=list)
    overheads: list[OverheadRow] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """What makes these times doubtful, one sentence each."""
        out = []
        for run in self.runs:
            load = None if run["on_gpu"] else run["load_average_start"]
            if load is not None and load[0] > 0.5:
                out.append(f"{run['file']}: the load average was {load[0]:.2f} when the run began; times are doubtful.")
        rows: list[PassRow | PeerRow | TrainRow] = [*self.passes, *self.peers, *self.training]
        rows = [row for row in rows if row.device == "cpu"]  # a busy host does not slow a device down
        busy = [row for row in rows if row.neighbours is not None and row.neighbours > BUSY]
        if busy:
            worst = max(row.neighbours or 0.0 for row in busy)
            out.append(
                f"Other processes kept more than {BUSY} cores busy during {len(busy)} of {len(rows)} rows "
                f"(up to {worst:.1f}); run them again when the machine is quiet."
            )
        if any(run["suite"] in ("toy", "gpu-toy") for run in self.runs):
            out.append("The toy suite only shows that everything runs; its times mean nothing.")
        return out


def load(paths: Iterable[Path], *, force: bool = False) -> Results:
    """Read result files into one set of rows; where two files hold the same row, the later one counts.

    Args:
        paths: at least one file.
        force: accept files of different machines.

    Raises:
        ReportError: a file is missing, torn, foreign or of another machine.
    """
    merged: Results | None = None
    for path in paths:
        one = _read(path)
        if merged is None:
            merged = one
            continue
        if not force:
            check_same_machine(merged, one)
        merged.runs += one.runs
        merged.passes = _later_wins(merged.passes + one.passes)
        merged.peers = _later_wins(merged.peers + one.peers)
        merged.training = _later_wins(merged.training + one.training)
        merged.nets = _later_wins(merged.nets + one.nets)
        merged.accuracy = _later_wins(merged.accuracy + one.accuracy)
        merged.overheads = _later_wins(merged.overheads + one.overheads)
        merged.missing = _later_wins(merged.missing + one.missing)
    if merged is None:
        raise ReportError("results: expected at least one file, got none")
    return merged


def check_same_machine(a: Results, b: Results) -> None:
    """Raise :class:`ReportError` unless both come from the same hardware and software; sparsekern may differ."""
    keys = [
        key for key in {**a.machine, **b.machine} if key != "sparsekern" and a.machine.get(key) != b.machine.get(key)
    ]
    if keys:
        differ = ", ".join(f"{key} {a.machine.get(key)!r} and {b.machine.get(key)!r}" for key in keys)
        raise ReportError(f"machines differ: {differ}; times do not compare, pass --force to do it all the same")


def _later_wins(rows: list[Any]) -> list[Any]:
    return list({row.key: row for row in rows}.values())


def _read(path: Path) -> Results:
    name = path.name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{name}: {_HOW}, can't read it ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ReportError(f"{name}: {_HOW}, got bytes that are no text") from None
    except json.JSONDecodeError as error:
        raise ReportError(
            f"{name}: {_HOW}, got broken JSON at line {error.lineno} ({error.msg}); the run may have been cut off"
        ) from None
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise ReportError(f"{name}: {_HOW}, got JSON without a list of benchmarks")
    run, machine = data.get("sparsekern_run"), data.get("machine_info")
    if not isinstance(run, dict) or not isinstance(machine, dict):
        raise ReportError(f"{name}: {_HOW}, got results of another project's benchmarks")
    if run.get("format") != FORMAT:
        raise ReportError(f"{name}: expected format {FORMAT}, got {run.get('format')!r}; use the matching sparsekern")
    commit = data.get("commit_info")
    about = {
        "file": name,
        "suite": str(run.get("suite")),
        "load_average_start": run.get("load_average_start"),
        "neighbours": run.get("neighbours"),
        "datetime": str(data.get("datetime", "")),
        "commit": str(commit.get("id", ""))[:12] if isinstance(commit, dict) else "",
    }
    results = Results(machine, [about])
    for entry in data["benchmarks"]:
        _add(results, entry, name)
    rows: list[PassRow | PeerRow | TrainRow] = [*results.passes, *results.peers, *results.training]
    more: list[NetRow | AccuracyRow | OverheadRow] = [*results.nets, *results.accuracy, *results.overheads]
    about["on_gpu"] = all(row.device == "cuda" for row in [*rows, *more])
    if not (rows or more or results.missing):
        raise ReportError(f"{name}: expected rows, got an empty run; were all rows deselected?")
    return results


def _add(results: Results, entry: Any, file: str) -> None:
    try:
        info, stats = entry["extra_info"], entry["stats"]
        if info["kind"] == "pass":
            results.passes.append(_pass_row(info, stats))
        elif info["kind"] == "peers":
            results.peers.append(_peer_row(info))
        elif info["kind"] == "train":
            results.training.append(_train_row(info))
        elif info["kind"] == "net":
            results.nets.append(_net_row(info))
        elif info["kind"] == "accuracy":
            results.accuracy.append(_accuracy_row(info))
        elif info["kind"] == "overhead":
            results.overheads.append(_overhead_row(info))
        elif info["kind"] == "missing":
            results.missing.append(Missing(str(info["what"]), str(info["reason"])))
        else:
            raise ReportError(f"{file}: expected rows of kind {', '.join(KINDS)}, got {info['kind']!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        row = entry.get("name", "?") if isinstance(entry, dict) else "?"
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ReportError(f"{file}: row {row}: {_HOW}, got {what}") from None


def _positive(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{value!r} where a positive number belongs")
    return number


def _neighbours(info: Mapping[str, Any]) -> float | None:
    return None if info["neighbours"] is None else float(info["neighbours"])


def _numbers(mapping: Any, read: Callable[[Any], float] = _positive) -> dict[str, float]:
    return {str(name): read(value) for name, value in mapping.items()}


def _pass_row(info: Mapping[str, Any], stats: Mapping[str, Any]) -> PassRow:
    return PassRow(
        op=str(info["op"]),
        pass_=str(info["pass_"]),
        shape=str(info["shape"]),
        memory_format=str(info["memory_format"]),
        block=int(info["block"]),
        sparsity=int(info["sparsity"]),
        density=_positive(info["density"]),
        dtype=str(info["dtype"]),
        threads=int(info["threads"]),
        backend=str(info["backend"]),
        dense_s=_positive(info["dense_median_s"]),
        sparse_s=_positive(info["sparse_median_s"]),
        speedup=_positive(info["speedup"]),
        q1=_positive(info["speedup_q1"]),
        q3=_positive(info["speedup_q3"]),
        gflops=_positive(info["gflops"]),
        dense_gflops=_positive(info["dense_gflops"]),
        gbytes_per_s=_positive(info["gbytes_per_s"]),
        max_error=float(info["max_error"]),
        rounds=int(stats["rounds"]),
        neighbours=_neighbours(info),
        device=str(info.get("device", "cpu")),
        mode=str(info.get("mode", "auto")),
        wall=_pair(info, "wall_s"),
        graph=_pair(info, "graph_s"),
        peak=_pair(info, "peak_bytes"),
        metadata=info["index_bytes"] / info["value_bytes"] if "index_bytes" in info else None,
        error_bound=float(info["error_bound"]) if "error_bound" in info else None,
    )


def _pair(info: Mapping[str, Any], what: str) -> Pair:
    dense, sparse = info.get(f"dense_{what}"), info.get(f"sparse_{what}")
    return None if dense is None else float(dense), None if sparse is None else float(sparse)


def _peer_row(info: Mapping[str, Any]) -> PeerRow:
    return PeerRow(
        pass_=str(info["pass_"]),
        shape=str(info["shape"]),
        block=int(info["block"]),
        sparsity=int(info["sparsity"]),
        density=_positive(info["density"]),
        threads=int(info["threads"]),
        dense_s=_positive(info["dense_median_s"]),
        sparse_s=_positive(info["sparse_median_s"]),
        speedup=_positive(info["speedup"]),
        times={name: _positive(peer["median_s"]) for name, peer in info["peers"].items()},
        speedups={name: _positive(peer["speedup"]) for name, peer in info["peers"].items()},
        failed={str(name): str(reason) for name, reason in info["failed_peers"].items()},
        neighbours=_neighbours(info),
        dtype=str(info.get("dtype", "float32")),
        device=str(info.get("device", "cpu")),
        mode=str(info.get("mode", "auto")),
    )


def _train_row(info: Mapping[str, Any]) -> TrainRow:
    contenders = {
        name: Contender(
            seconds=_positive(one["median_s"]),
            parts=_numbers(one["parts_s"], float),
            params=int(one["params"]),
            macs=int(one["macs"]),
            parameter_bytes=int(one["parameter_bytes"]),
            optimizer_bytes=int(one["optimizer_bytes"]),
        )
        for name, one in ((name, info["contenders"][name]) for name in ("dense", "sparse", "narrow"))
    }
    return TrainRow(
        model=str(info["model"]),
        shape=str(info["shape"]),
        block=info["block"] if isinstance(info["block"], int) else str(info["block"]),
        sparsity=int(info["sparsity"]),
        threads=int(info["threads"]),
        speedup=_positive(info["speedup"]),
        q1=_positive(info["speedup_q1"]),
        q3=_positive(info["speedup_q3"]),
        narrow_speedup=_positive(info["narrow_speedup"]),
        layers={str(state): int(count) for state, count in info["layers"].items()},
        contenders=contenders,
        neighbours=_neighbours(info),
        device=str(info.get("device", "cpu")),
    )


def _maybe(value: Any) -> float | None:
    return None if value is None else _positive(value)


def _counts(mapping: Any) -> dict[str, int]:
    return {str(name): int(count) for name, count in mapping.items()}


def _net_row(info: Mapping[str, Any]) -> NetRow:
    return NetRow(
        net=str(info["net"]),
        batch=int(info["batch"]),
        contender=str(info["contender"]),
        mode=str(info["mode"]),
        pass_=str(info["pass_"]),
        block=int(info["block"]),
        sparsity=int(info["sparsity"]),
        allocation=str(info["allocation"]),
        seconds=_positive(info["median_s"]),
        dense_s=_positive(info["dense_median_s"]),
        speedup=_positive(info["speedup"]),
        q1=_positive(info["speedup_q1"]),
        q3=_positive(info["speedup_q3"]),
        wall_s=_maybe(info["wall_s"]),
        ideal=_maybe(info["ideal"]),
        params=int(info["params"]),
        macs=int(info["macs"]),
        peak_bytes=None if info["peak_bytes"] is None else int(info["peak_bytes"]),
        parts=_numbers(info["parts_s"], float),
        optimizers=_numbers(info["optimizers_s"]),
        layers=_counts(info["layers"]),
        device=str(info["device"]),
        dtype=str(info["dtype"]),
    )


def _accuracy_row(info: Mapping[str, Any]) -> AccuracyRow:
    accuracy = float(info["test_acc"])
    if not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"{accuracy!r} where a fraction belongs")
    return AccuracyRow(
        net=str(info["net"]),
        data=str(info["data"]),
        contender=str(info["contender"]),
        block=int(info["block"]),
        sparsity=int(info["sparsity"]),
        epochs=_positive(info["epochs"]),
        batch=int(info["batch"]),
        test_acc=accuracy,
        seconds=_positive(info["seconds"]),
        step_s=_positive(info["step_s"]),
        params=int(info["params"]),
        macs=int(info["macs"]),
        layers=_counts(info["layers"]),
        device=str(info["device"]),
    )


def _overhead_row(info: Mapping[str, Any]) -> OverheadRow:
    return OverheadRow(
        what=str(info["what"]),
        op=str(info["op"]),
        shape=str(info["shape"]),
        pass_=str(info["pass_"]),
        block=int(info["block"]),
        sparsity=int(info["sparsity"]),
        seconds=float(info["seconds"]),
        base_s=_positive(info["base_s"]),
        share=float(info["share"]),
        backend=str(info["backend"]),
        device=str(info["device"]),
    )
