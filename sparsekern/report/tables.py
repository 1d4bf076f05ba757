"""The tables of a report as plain data; Markdown, CSV and HTML print the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsekern.report.results import (
    AccuracyRow,
    Contender,
    NetRow,
    OverheadRow,
    PassRow,
    PeerRow,
    Results,
    TrainRow,
)
from sparsekern.report.summary import Change, Mean, break_even, geometric_mean, grouped, main_shape

Cell = str | int | float | None


@dataclass(frozen=True)
class Column:
    """``digits``: significant digits of numbers; ``unit`` multiplies them before printing (100 for percent)."""

    name: str
    digits: int = 0
    unit: float = 1.0


@dataclass(frozen=True)
class Table:
    """``losing`` marks rows in which sparse is slower than dense, one flag per row."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    losing: Sequence[bool]
    note: str = ""


def text(cell: Cell, column: Column) -> str:
    """A cell as people read it; None is a dash."""
    if cell is None:
        return "\N{EN DASH}"
    if isinstance(cell, float):
        return significant(cell * column.unit, column.digits or 3)
    return str(cell)


def significant(value: float, digits: int) -> str:
    """``value`` with so many significant digits, without an exponent between 0.001 and a million."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    whole = len(str(int(abs(rounded)))) if abs(rounded) >= 1 else 1 - _leading_zeros(abs(rounded))
    return f"{rounded:.{max(0, digits - whole)}f}"


def _leading_zeros(value: float) -> int:
    zeros = 0
    while value < 1:
        value *= 10
        zeros += 1
    return zeros


def place(device: str, threads: int) -> str:
    """Where rows ran, for titles: "GPU", or the number of threads."""
    return "GPU" if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}"


def _plain(rows: Sequence[PassRow | PeerRow]) -> bool:
    """Whether all rows are what tables need not say: float32 on a CPU, backend chosen by sparsekern."""
    return all((row.device, row.dtype, row.mode) == ("cpu", "float32", "auto") for row in rows)


_WHERE = (Column("device"), Column("dtype"), Column("mode"))
_BESIDE = (
    *(Column("dense wall ms", 3, 1e3), Column("sparse wall ms", 3, 1e3)),
    *(Column("dense graph ms", 3, 1e3), Column("sparse graph ms", 3, 1e3), Column("graph speed-up", 3)),
    *(Column("dense peak MB", 3, 1e-6), Column("sparse peak MB", 3, 1e-6)),
)


def _where(row: PassRow | PeerRow) -> list[Cell]:
    return [row.device, row.dtype, row.mode]


def pass_table(rows: Sequence[PassRow], changes: Mapping[tuple[object, ...], Change] | None = None) -> Table:
    """Every timed pass, one line each; with ``changes`` also the base's time and speed-up."""
    columns = [
        *(Column(name) for name in ("op", "pass", "shape", "format", "block", "sparsity %")),
        *(Column("density", 3), Column("threads"), Column("backend")),
        *(
            Column("dense ms", 3, 1e3),
            Column("sparse ms", 3, 1e3),
            Column("speed-up", 3),
            Column("q1", 3),
            Column("q3", 3),
        ),
        *(Column("of ideal %", 3, 100.0), Column("GFLOP/s", 3), Column("dense GFLOP/s", 3), Column("GB/s", 3)),
        *(Column("error", 2), Column("rounds")),
    ]
    plain, beside = _plain(rows), any(row.wall != (None, None) for row in rows)
    columns += [*(() if plain else _WHERE), *(_BESIDE if beside else ())]
    if changes is not None:
        columns += [Column("base ms", 3, 1e3), Column("base speed-up", 3), Column("change", 3)]
    lines = []
    for row in rows:
        line: list[Cell] = [row.op, row.pass_, row.shape, row.memory_format, row.block, row.sparsity]
        line += [row.density, row.threads, row.backend, row.dense_s, row.sparse_s, row.speedup, row.q1, row.q3]
        line += [row.of_ideal, row.gflops, row.dense_gflops, row.gbytes_per_s, row.max_error, row.rounds]
        line += [] if plain else _where(row)
        line += [*row.wall, *row.graph, row.graph_speedup, *row.peak] if beside else []
        if changes is not None:
            change = changes.get(row.key)
            line += [change.base.sparse_s, change.base.speedup, change.factor] if change else [None, None, None]
        lines.append(line)
    return Table("All rows", columns, lines, [row.loses for row in rows])


def mean_table(rows: Sequence[PassRow]) -> Table:
    """Geometric means over shapes: one line per kind of row and block, one column per sparsity."""
    sparsities = sorted({row.sparsity for row in rows})
    plain = _plain(rows)
    kinds = grouped(
        rows,
        lambda row: (
            *(row.op, row.memory_format, row.pass_, row.threads, row.block),
            *(() if plain else (row.device, row.dtype, row.mode)),
        ),
    )
    columns = [Column(name) for name in ("op", "format", "pass", "threads", "block")]
    columns += [] if plain else _WHERE
    first = len(columns)
    columns += [Column(f"{sparsity} %", 3) for sparsity in sparsities]
    columns += [Column("of ideal %", 3, 100.0), Column("rows"), Column("losing"), Column("break-even density")]
    lines: list[list[Cell]] = []
    for kind, members in kinds.items():
        means = {s: Mean.of(group) for s, group in grouped(members, lambda row: row.sparsity).items()}
        total = Mean.of(members)
        swept = [row for row in members if row.shape == main_shape(members)]
        _, crossing = break_even([(row.density, row.speedup) for row in swept])
        line: list[Cell] = [*kind, *(means[s].speedup if s in means else None for s in sparsities)]
        lines.append([*line, total.of_ideal, total.rows, total.losing, crossing])
    note = (
        "Speed-up over dense, geometric mean over shapes. Break-even: density below which sparse wins, "
        "on the shape with the most rows."
    )
    losing = [
        any(isinstance(cell, float) and cell < 1.0 for cell in line[first : first + len(sparsities)]) for line in lines
    ]
    return Table("Geometric means", columns, lines, losing, note)


def peer_tables(rows: Sequence[PeerRow]) -> list[Table]:
    """Speed-up over dense of sparsekern and of every peer, side by side; a table per pass, as peers differ by it."""
    return [_peer_table(pass_, members) for pass_, members in grouped(rows, lambda row: row.pass_).items()]


def _peer_table(pass_: str, rows: Sequence[PeerRow]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in (*row.speedups, *row.failed)))
    plain = _plain(rows)
    columns = [Column(name) for name in ("shape", "block", "sparsity %", "threads")]
    columns += [] if plain else _WHERE
    columns += [Column("dense ms", 3, 1e3), Column("sparsekern", 3), *(Column(name, 3) for name in names)]
    columns += [Column("over best peer", 3)]
    lines: list[list[Cell]] = []
    for row in rows:
        best = row.best
        line: list[Cell] = [row.shape, row.block, row.sparsity, row.threads, *([] if plain else _where(row))]
        line += [row.dense_s, row.speedup]
        line += [row.speedups.get(name) for name in names]
        lines.append([*line, row.speedup / best[1] if best else None])
    note = "Speed-up over dense. A dash: not run, for a reason given below."
    return Table(f"Peers, {pass_}", columns, lines, [row.speedup < 1.0 for row in rows], note)


def failed_peers(rows: Sequence[PeerRow]) -> list[tuple[str, str, int]]:
    """``(peer, reason, rows)`` of every peer that did not run somewhere."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, reason in row.failed.items():
            counts[name, reason] = counts.get((name, reason), 0) + 1
    return [(name, reason, count) for (name, reason), count in counts.items()]


def train_table(rows: Sequence[TrainRow]) -> Table:
    """Whole training steps: parameters, MACs and measured time of dense, sparse and narrow dense, side by side."""
    columns = [Column(name) for name in ("model", "block", "sparsity %", "threads")]
    columns += [Column("dense ms", 3, 1e3), Column("sparse ms", 3, 1e3), Column("narrow ms", 3, 1e3)]
    columns += [Column("speed-up", 3), Column("q1", 3), Column("q3", 3), Column("narrow speed-up", 3)]
    columns += [Column(f"{who} {what}", 3) for what in ("M params", "M MACs") for who in ("dense", "sparse", "narrow")]
    columns += [Column(f"{who} state MB", 3) for who in ("dense", "sparse", "narrow")]
    columns += [Column("layers")]
    lines: list[list[Cell]] = []
    for row in rows:
        three = [row.contenders[who] for who in ("dense", "sparse", "narrow")]
        line: list[Cell] = [row.shape, row.block, row.sparsity, row.threads, *(one.seconds for one in three)]
        line += [row.speedup, row.q1, row.q3, row.narrow_speedup]
        line += [one.params / 1e6 for one in three] + [one.macs / 1e6 for one in three]
        line += [_state_bytes(one) / 1e6 for one in three]
        lines.append([*line, layer_counts(row.layers)])
    note = (
        "Narrow: the dense net of the same MACs as the sparse one. MACs per sample, forward. State: parameters and "
        "optimizer state. Layers: how the plan left them."
    )
    return Table("Training steps", columns, lines, [row.loses for row in rows], note)


def _state_bytes(one: Contender) -> int:
    return one.parameter_bytes + one.optimizer_bytes


def layer_counts(layers: Mapping[str, int]) -> str:
    """``"3 sparse, 1 dense"``."""
    return ", ".join(f"{count} {state}" for state, count in layers.items())


def headline(results: Results) -> list[tuple[str, str, str]]:
    """``(what, value, detail)`` of the figures that sum the run up."""
    out = []
    for (op, pass_, mode), rows in grouped(results.passes, lambda row: (row.op, row.pass_, row.mode)).items():
        at_90 = [row for row in rows if row.sparsity == 90 and row.block >= 16] or rows
        where = "90 % sparse, blocks of 16 and more" if at_90 is not rows else "all rows"
        mean = Mean.of(at_90)
        name = f"{op} {pass_}" + ("" if mode == "auto" else f", {mode} forced")
        out.append((name, f"{significant(mean.speedup, 3)}x", f"{where}, {mean.rows} rows"))
    if results.training:
        mean_train = geometric_mean(row.speedup for row in results.training)
        out.append(("training step", f"{significant(mean_train, 3)}x", f"{len(results.training)} rows"))
    sparse = [row for row in results.nets if row.sparsity]
    for (pass_, mode), nets in grouped(sparse, lambda row: (row.pass_, row.mode)).items():
        value = f"{significant(geometric_mean(row.speedup for row in nets), 3)}x"
        out.append((f"whole nets, {pass_}, {mode}", value, f"{len(nets)} rows"))
    wins = [row.speedup / row.best[1] for row in results.peers if row.best]
    if wins:
        out.append(("over the best peer", f"{significant(geometric_mean(wins), 3)}x", f"{len(wins)} rows"))
    rows_against_dense: list[PassRow | TrainRow | NetRow] = [*results.passes, *results.training, *sparse]
    losing = sum(row.loses for row in rows_against_dense)
    total = len(rows_against_dense)
    out.append(("rows slower than dense", str(losing), f"of {total}"))
    return out


def conditions(results: Results) -> list[tuple[str, str]]:
    """``(name, value)`` of machine and software."""
    machine = results.machine
    sparsekern = machine.get("sparsekern") or {}
    build = sparsekern.get("build") or {}
    pairs: list[tuple[str, object]] = [
        ("processor", machine.get("cpu")),
        ("cores", machine.get("cores")),
        ("instruction sets", ", ".join(map(str, machine.get("isa") or []))),
        ("system", f"{machine.get('system')} {machine.get('architecture')}, Python {machine.get('python')}"),
        ("torch", f"{machine.get('torch')} ({machine.get('torch_isa')})"),
        ("MKL, oneDNN", f"{machine.get('mkl')}, {machine.get('onednn')}"),
        ("sparsekern", f"{sparsekern.get('version')}, {', '.join(f'{k} {v}' for k, v in build.items() if v)}"),
        ("environment", ", ".join(f"{k}={v}" for k, v in (machine.get("environment") or {}).items()) or "default"),
        ("threads", ", ".join(map(str, sorted(_threads(results))))),
    ]
    pairs[2:2] = _gpu(machine.get("gpu") or {}, results)
    for run in results.runs:
        load = run["load_average_start"]
        loaded = f"load {load[0]:.2f} at the start" if load else "load unknown"
        about = (
            f"suite {run['suite']}, {run['datetime'][:16].replace('T', ' ')} UTC, commit {run['commit'] or 'unknown'}"
        )
        pairs.append((run["file"], f"{about}, {loaded}"))
    return [(name, str(value)) for name, value in pairs]


def _gpu(gpu: Mapping[str, object], results: Results) -> list[tuple[str, object]]:
    """The device of GPU rows, and how they were timed; nothing where no row ran on one."""
    rows: list[PassRow | PeerRow | NetRow | AccuracyRow | OverheadRow] = [
        *results.passes,
        *results.peers,
        *results.nets,
    ]
    if not any(row.device == "cuda" for row in [*rows, *results.accuracy, *results.overheads]):
        return []
    memory, l2 = gpu.get("memory"), gpu.get("l2")
    facts = [f"{gpu.get('name')}", f"sm {gpu.get('capability')}", f"{gpu.get('sms')} SMs"]
    facts += [f"{memory / 2**30:.0f} GiB"] if isinstance(memory, int) else []
    facts += [f"{l2 / 2**20:.0f} MiB L2"] if isinstance(l2, int) else []
    software = [f"CUDA {gpu.get('cuda')}", f"driver {gpu.get('driver_version')}", f"Triton {gpu.get('triton')}"]
    timed = "device time by events with a cold L2; wall time has the host's work, warm; graph is a replayed CUDA graph"
    return [("GPU", ", ".join(facts)), ("GPU software", ", ".join(software)), ("timed", timed)]


def _threads(results: Results) -> set[int]:
    rows: list[PassRow | PeerRow | TrainRow] = [*results.passes, *results.peers, *results.training]
    return {row.threads for row in rows}
