"""Results of a GPU against the targets of targets.json: met, missed or not measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekern.report.net_tables import dense_twin
from sparsekern.report.results import AccuracyRow, NetRow, OverheadRow, PassRow, PeerRow, Results
from sparsekern.report.summary import geometric_mean
from sparsekern.report.tables import significant

TARGETS = Path(__file__).parent / "targets.json"
MISS, MUST, STRETCH, UNKNOWN = "MISS", "must", "stretch", "not measured"


@dataclass(frozen=True)
class Line:
    """One target. ``measured`` decides; ``graph`` and ``forced`` are shown beside it and may be None.

    Attributes:
        measured: speed-up by device time with the backend that sparsekern chooses, else with Triton forced.
        graph: the same from replayed CUDA graphs.
        forced: with the Triton kernels forced, whatever the dispatch would do.
    """

    what: str
    must: float
    stretch: float | None
    measured: float | None
    graph: float | None = None
    forced: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return UNKNOWN
        if self.measured < self.must:
            return MISS
        return STRETCH if self.stretch is not None and self.measured >= self.stretch else MUST


def targets() -> dict[str, Any]:
    """The content of targets.json."""
    found = json.loads(TARGETS.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def rehearsal_targets(shape: str, conv_shape: str) -> dict[str, Any]:
    """The same targets held against toy rows of a rehearsal, so that every table has lines to fill."""
    found = targets()
    found["linear"]["shape"], found["conv2d"]["shapes"] = shape, [conv_shape]
    found["conv2d"] |= {"blocks": [16], "at": {"50": found["conv2d"]["at"]["80"]}}
    found["nets"] |= {"nets": ["toy"], "blocks": [16]}
    found["linear"]["rows"] = [{**row, "block": min(row["block"], 32)} for row in found["linear"]["rows"][1:]]
    return found


def judge(results: Results, wanted: Mapping[str, Any], device: str = "cuda") -> list[Line]:
    """One line per target: linear, conv2d, whole nets, accuracy, overheads, peers, never slower, metadata."""
    passes = [row for row in results.passes if row.device == device]
    peers = [row for row in results.peers if row.device == device]
    return [
        *_linear(passes, wanted["linear"]),
        *_conv2d(passes, wanted["conv2d"]),
        *_nets([row for row in results.nets if row.device == device], wanted["nets"]),
        *_accuracy([row for row in results.accuracy if row.device == device], wanted["accuracy"]),
        *_overheads([row for row in results.overheads if row.device == device], wanted),
        *(line for target in wanted["peers"] for line in _peer(peers, target)),
        _never_slower(passes, wanted["never_slower"]["within"]),
        _metadata(passes, wanted["metadata"]),
    ]


def _find(rows: Sequence[PassRow], **want: object) -> PassRow | None:
    return next((row for row in rows if all(getattr(row, name) == value for name, value in want.items())), None)


def _speedup_line(what: str, rows: Sequence[PassRow], pair: Sequence[float | None], **want: object) -> Line:
    chosen, forced = _find(rows, mode="auto", **want), _find(rows, mode="triton", **want)
    row, must = chosen or forced, pair[0]
    assert must is not None
    if row is None:
        return Line(what, must, pair[1], None)
    note = row.backend if chosen is not None else "Triton forced"
    if row.error_bound is not None and not row.max_error <= row.error_bound:
        return Line(what, must, pair[1], 0.0, note=f"wrong result, error {row.max_error:.1e}")
    return Line(what, must, pair[1], row.speedup, row.graph_speedup, forced.speedup if forced else None, note)


def _linear(rows: Sequence[PassRow], wanted: Mapping[str, Any]) -> Iterator[Line]:
    for target in wanted["rows"]:
        for sparsity, pair in target["at"].items():
            what = f"linear {wanted['shape']}, block {target['block']}, {_pass_name(target['pass'])}, {sparsity} %"
            want = {"op": "linear", "shape": wanted["shape"], "dtype": wanted["dtype"], "pass_": target["pass"]}
            yield _speedup_line(what, rows, pair, block=target["block"], sparsity=int(sparsity), **want)


def _conv2d(rows: Sequence[PassRow], wanted: Mapping[str, Any]) -> Iterator[Line]:
    for shape in wanted["shapes"]:
        for block in wanted["blocks"]:
            for sparsity, pair in wanted["at"].items():
                what = f"conv2d {shape}, block {block}, {_pass_name(wanted['pass'])}, {sparsity} %"
                want = {"op": "conv2d", "shape": shape, "dtype": wanted["dtype"], "pass_": wanted["pass"]}
                yield _speedup_line(what, rows, pair, block=block, sparsity=int(sparsity), **want)


def _nets(rows: Sequence[NetRow], wanted: Mapping[str, Any]) -> Iterator[Line]:
    """A sparse net is never slower than the dense one; Amdahl's bound and the narrow net stand beside it."""
    for net in wanted["nets"]:
        for mode in wanted["modes"]:
            here = [row for row in rows if (row.net, row.mode, row.pass_) == (net, mode, wanted["pass"])]
            narrow = next((row.speedup for row in here if row.contender == "narrow"), None)
            for block in wanted["blocks"]:
                what = f"net {net}, {mode}, {_net_pass(wanted['pass'])}, block {block}, {wanted['allocation']}"
                row = next((r for r in here if (r.block, r.allocation) == (block, wanted["allocation"])), None)
                if row is None:
                    yield Line(what, 1 - wanted["within"], None, None)
                    continue
                bound = "" if row.ideal is None else f"Amdahl's bound {significant(row.ideal, 3)}"
                beside = "" if narrow is None else f"narrow dense {significant(narrow, 3)}"
                note = "; ".join(filter(None, (bound, beside)))
                yield Line(what, 1 - wanted["within"], None, row.speedup, note=note)


def _net_pass(pass_: str) -> str:
    return "training step" if pass_ == "step" else pass_


def _accuracy(rows: Sequence[AccuracyRow], wanted: Mapping[str, Any]) -> Iterator[Line]:
    """Real training: what the sparse net reaches of the dense net's accuracy, and in what time."""
    name, run = "test accuracy over the dense net's", "training run, seconds of dense / seconds of sparse"
    pairs = [(row, twin) for row in rows if (twin := dense_twin(rows, row)) is not None]
    if not pairs:
        yield Line(name, wanted["of_dense"], None, None)
        yield Line(run, 1 - wanted["within"], None, None)
    for sparse, dense in pairs:
        where = f"{sparse.net} on {sparse.data}, {significant(sparse.epochs, 3)} epochs, "
        reached = f"{100 * sparse.test_acc:.2f} % and dense {100 * dense.test_acc:.2f} %"
        ratio = sparse.test_acc / dense.test_acc if dense.test_acc else 0.0
        yield Line(where + name, wanted["of_dense"], None, ratio, note=reached)
        steps = f"step {1e3 * sparse.step_s:.1f} ms and dense {1e3 * dense.step_s:.1f} ms"
        yield Line(where + run, 1 - wanted["within"], None, dense.seconds / sparse.seconds, note=steps)


def _overheads(rows: Sequence[OverheadRow], wanted: Mapping[str, Any]) -> Iterator[Line]:
    """Turned so that more is better: kernels over the whole call, 100 steps over one update."""
    share, least = wanted["dispatch"]["share"], wanted["dispatch"]["least_s"]
    large = [row for row in rows if row.what == "dispatch" and row.base_s >= least]
    what = f"kernels launched directly / through dispatch, layers of {1e3 * least:.0f} ms and more"
    worst = max(large, key=lambda row: row.share, default=None)
    note = "" if worst is None else f"most {100 * worst.share:.1f} %: {_overhead(worst)}"
    yield Line(what, 1 / (1 + share), None, None if worst is None else 1 / (1 + worst.share), note=note)
    updates = [row for row in rows if row.what.startswith("topology update")]
    worst = max(updates, key=lambda row: row.share, default=None)
    note = "" if worst is None else f"most {100 * worst.share:.1f} %: {_overhead(worst)}"
    measured = None if worst is None else 1 / worst.share
    yield Line(
        "100 training steps / one topology update", 1 / wanted["topology_update"]["share"], None, measured, note=note
    )


def _overhead(row: OverheadRow) -> str:
    return f"{row.op} {row.shape} {row.pass_}, block {row.block}, {row.sparsity} %"


def _pass_name(pass_: str) -> str:
    return "forward and backward" if pass_ == "step" else pass_


def _peer(rows: Sequence[PeerRow], target: Mapping[str, Any]) -> Iterator[Line]:
    """The least factor over the rows at each block: every one of them has to reach it."""
    name = target["peer"]
    for block in target["blocks"]:
        what = f"over {name}, block {block}"
        here = [row for row in rows if row.block == block]
        factors = [row.speedup / row.speedups[name] for row in here if name in row.speedups]
        reasons = sorted({row.failed[name] for row in here if name in row.failed})
        if not factors:
            yield Line(what, target["factor"], None, None, note="; ".join(reasons))
            continue
        note = f"least of {len(factors)} rows, mean {significant(geometric_mean(factors), 3)}"
        yield Line(what, target["factor"], None, min(factors), note=note)


def _never_slower(rows: Sequence[PassRow], within: float) -> Line:
    chosen = [row for row in rows if row.mode == "auto"]
    what = "never slower than dense, least speed-up of the rows as dispatched"
    if not chosen:
        return Line(what, 1 - within, None, None)
    slower = [row for row in chosen if row.speedup < 1 - within]
    worst = min(chosen, key=lambda row: row.speedup)
    where = f"{worst.op} {worst.shape} {worst.pass_}, block {worst.block}, {worst.sparsity} %"
    return Line(
        what, 1 - within, None, worst.speedup, note=f"{len(slower)} of {len(chosen)} rows below; worst: {where}"
    )


def _metadata(rows: Sequence[PassRow], wanted: Mapping[str, Any]) -> Line:
    """Values over layout, so that more is better as in every other line."""
    shares = [row.metadata for row in rows if row.block == wanted["block"] and row.metadata]
    what = f"bytes of the values / bytes of the layout, block {wanted['block']}"
    return Line(what, 1 / wanted["share"], None, 1 / max(shares) if shares else None)


def counts(lines: Sequence[Line]) -> str:
    """``"3 stretch, 5 must, 1 MISS, 7 not measured"``."""
    found = {name: sum(line.verdict == name for line in lines) for name in (STRETCH, MUST, MISS, UNKNOWN)}
    return ", ".join(f"{count} {name}" for name, count in found.items())


def markdown(lines: Sequence[Line]) -> str:
    """The pass/fail table."""
    out = [
        "| target | must | stretch | measured | verdict | graph | Triton forced | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        numbers = [line.must, line.stretch, line.measured]
        cells = [line.what, *(_number(n) for n in numbers), _bold(line.verdict), _number(line.graph)]
        cells += [_number(line.forced), line.note.replace("|", "/")]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def _number(value: float | None) -> str:
    return "" if value is None else significant(value, 3)


def _bold(verdict: str) -> str:
    return f"**{verdict}**" if verdict == MISS else verdict
