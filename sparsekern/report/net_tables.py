"""The tables of whole nets: their time and where it goes, training on real data, overheads."""

from __future__ import annotations

from collections.abc import Sequence

from sparsekern.report.results import AccuracyRow, NetRow, OverheadRow, Results
from sparsekern.report.tables import Cell, Column, Table, layer_counts


def net_table(rows: Sequence[NetRow]) -> Table:
    """Whole networks: time, the bound by Amdahl's law, size and memory of each contender beside the dense net."""
    columns = [Column(name) for name in ("net", "batch", "pass", "mode", "contender", "sparsity %")]
    columns += [Column("ms", 3, 1e3), Column("dense ms", 3, 1e3), Column("speed-up", 3), Column("q1", 3)]
    columns += [Column("q3", 3), Column("Amdahl's bound", 3), Column("wall ms", 3, 1e3), Column("M params", 3)]
    columns += [Column("M MACs", 3), Column("peak MB", 3), Column("layers"), Column("device"), Column("dtype")]
    lines: list[list[Cell]] = []
    for row in rows:
        line: list[Cell] = [row.net, row.batch, row.pass_, row.mode, row.name, row.sparsity]
        line += [row.seconds, row.dense_s, row.speedup, row.q1, row.q3, row.ideal, row.wall_s, row.params / 1e6]
        line += [row.macs / 1e6, None if row.peak_bytes is None else row.peak_bytes / 1e6]
        lines.append([*line, layer_counts(row.layers), row.device, row.dtype])
    note = (
        "Each contender is timed in turns with the dense net. Amdahl's bound: the speed-up if the convolutions of the "
        "dense net took only their remaining share of its MACs and all else stayed. MACs per sample, forward. "
        "Compiled rows are outside the promise of never being slower."
    )
    return Table("Whole nets", columns, lines, [row.loses for row in rows], note)


def parts_table(rows: Sequence[NetRow]) -> Table:
    """Where the time of whole networks goes: device time by kind of kernel, and the optimizers compared."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.parts))
    optimizers = list(dict.fromkeys(name for row in rows for name in row.optimizers))
    columns = [Column(name) for name in ("net", "pass", "mode", "contender")]
    columns += [Column("ms", 3, 1e3), Column("on the device ms", 3, 1e3)]
    columns += [Column(f"{kind} ms", 3, 1e3) for kind in kinds]
    columns += [Column("convolutions %", 3, 100.0)]
    columns += [Column(f"{name} step alone ms", 3, 1e3) for name in optimizers]
    lines: list[list[Cell]] = []
    shown = [row for row in rows if row.parts or row.optimizers]
    for row in shown:
        total = sum(row.parts.values())
        line: list[Cell] = [row.net, row.pass_, row.mode, row.name, row.seconds, total or None]
        line += [row.parts.get(kind) for kind in kinds]
        line += [row.parts.get("convolutions", 0.0) / total if total else None]
        lines.append([*line, *(row.optimizers.get(name) for name in optimizers)])
    note = (
        "Kernel times summed by kind, from torch.profiler. What ms has beyond the device's is time without a kernel. "
        "Convolutions hold the linear layers too; fused kernels count by what they do first."
    )
    return Table("Where the time goes", columns, lines, [row.loses for row in shown], note)


def accuracy_table(rows: Sequence[AccuracyRow]) -> Table:
    """Nets trained on real data for equally many epochs."""
    columns = [Column(name) for name in ("net", "data", "contender", "block", "sparsity %")]
    columns += [Column("epochs", 3), Column("batch"), Column("test accuracy %", 4, 100.0), Column("run s", 3)]
    columns += [Column("step ms", 3, 1e3), Column("M params", 3), Column("M MACs", 3), Column("layers")]
    columns += [Column("device")]
    lines: list[list[Cell]] = []
    losing = []
    for row in rows:
        line: list[Cell] = [row.net, row.data, row.contender, row.block, row.sparsity, row.epochs, row.batch]
        line += [row.test_acc, row.seconds, row.step_s, row.params / 1e6, row.macs / 1e6, layer_counts(row.layers)]
        lines.append([*line, row.device])
        dense = dense_twin(rows, row)
        losing.append(dense is not None and row.seconds > dense.seconds)
    note = "Same data, seed, schedule and epochs. Step: wall time of a step, loading and augmentation included."
    return Table("Training on real data", columns, lines, losing, note)


def dense_twin(rows: Sequence[AccuracyRow], row: AccuracyRow) -> AccuracyRow | None:
    """The dense run that a sparse one is compared with."""
    same = (
        one
        for one in rows
        if (one.net, one.data, one.epochs, one.device) == (row.net, row.data, row.epochs, row.device)
    )
    return next((one for one in same if one.contender == "dense" and row.contender != "dense"), None)


def overhead_table(rows: Sequence[OverheadRow]) -> Table:
    """Dispatch and topology updates."""
    columns = [Column(name) for name in ("what", "op", "shape", "pass", "block", "sparsity %", "backend")]
    columns += [Column("ms", 3, 1e3), Column("of ms", 3, 1e3), Column("share %", 3, 100.0), Column("device")]
    lines: list[list[Cell]] = []
    for row in rows:
        line: list[Cell] = [row.what, row.op, row.shape, row.pass_, row.block, row.sparsity, row.backend]
        lines.append([*line, row.seconds, row.base_s, row.share, row.device])
    note = (
        "Dispatch: wall time of the module's call beyond that of the same kernels launched directly. Topology update: "
        "the layout rewritten, values and momentum moved along, over 100 training steps of the layer alone; where op "
        "is net, all that an update adds to a step of the whole net, gradients and the choice of blocks included, over "
        "100 such steps (a dense gradient of every step: over one)."
    )
    return Table("Overheads", columns, lines, [False] * len(rows), note)


def whole_tables(results: Results) -> list[Table]:
    """The tables of whole nets, real training and overheads, as far as there are rows."""
    out = []
    if results.nets:
        out.append(net_table(results.nets))
        parts = parts_table(results.nets)
        out += [parts] if parts.rows else []
    out += [accuracy_table(results.accuracy)] if results.accuracy else []
    out += [overhead_table(results.overheads)] if results.overheads else []
    return out
