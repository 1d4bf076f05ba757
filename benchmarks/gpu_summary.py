"""One page over a run on a GPU: ``python -m benchmarks.gpu_summary OUT``.

Joins the row files into the speed report, holds them against the targets, and writes ``README.md`` with both, the
probes, and what became of every chunk.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import files, verdict
from benchmarks.shapes import CONV_SUITES, LINEAR_SUITES
from sparsekern.report import ReportError, build_report, load
from sparsekern.report.results import Results
from sparsekern.report.tables import significant

REHEARSAL = "> **Rehearsal on the interpreter: the numbers mean nothing.** It shows that every step runs."
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))


def row_files(out: Path) -> tuple[list[Path], list[str]]:
    """Files with rows, oldest first, and what is wrong with others; a row that can't be read leaves its file."""
    good, bad = [], []
    for path in sorted(out.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        content = files.read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
            continue
        problem = _problem(path)
        if problem is not None and len(content["benchmarks"]) > 1:
            content["benchmarks"] = [bench for bench in content["benchmarks"] if _sound(content, bench, out)]
            bad.append(f"{problem}; {len(content['benchmarks'])} other rows were kept")
            files.write_json(path, content)
            problem = _problem(path)
        elif problem is not None:
            bad.append(problem)
        if problem is None:
            good.append(path)
    return good, bad


def _problem(path: Path) -> str | None:
    """Why the report can't read a file, or None."""
    try:
        load([path])
    except ReportError as error:
        return str(error)
    return None


def _sound(content: dict[str, Any], bench: Any, out: Path) -> bool:
    alone = out / ".row.part.json"
    files.write_json(alone, {**content, "benchmarks": [bench]})
    try:
        return _problem(alone) is None
    finally:
        alone.unlink()


def machine_lines(machine: dict[str, Any]) -> list[str]:
    gpu = machine.get("gpu") or {}
    facts = {**gpu, "torch": machine.get("torch"), "python": machine.get("python"), "cpu": machine.get("cpu")}
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def chunk_lines(state: dict[str, Any]) -> list[str]:
    lines = ["| chunk | status | s | |", "|---|---|---|---|"]
    for name, facts in state["chunks"].items():
        status = f"**{facts['status']}**" if facts["status"] in ("failed", "timeout") else facts["status"]
        note = str(facts.get("note", "")).replace("|", "/")
        lines.append(f"| {name} | {status} | {facts.get('seconds', '')} | {note} |")
    for name, facts in state["chunks"].items():
        if facts.get("tail"):
            lines += ["", f"End of the output of {name}:", "", "```", *facts["tail"], "```"]
    return lines


def probe_lines(out: Path) -> list[str]:
    found = [content for path in sorted(out.glob("probe-*.json")) if (content := files.read_json(path)) is not None]
    if not found:
        return ["Not measured."]
    lines = ["| figure | value | configuration |", "|---|---|---|"]
    lines += [
        f"| {figure['name']} | {with_prefix(figure['value'], figure['unit'])} | {figure['config']} |"
        for content in found
        for figure in content["figures"]
    ]
    failed = [f"- {name}: {reason}" for content in found for name, reason in content["failed"].items()]
    return [*lines, "", *(["Probes that failed:", "", *failed] if failed else [])]


def family_lines(out: Path) -> list[str]:
    """The fastest kernel of each family beside dense, its own prediction and the best of other libraries."""
    found = [content for path in sorted(out.glob("families-*.json")) if (content := files.read_json(path)) is not None]
    rows = [row for content in found for row in content["rows"]]
    if not rows:
        return ["Not measured."]
    lines = ["| pass | dense | Triton (predicted) | CUDA (predicted) | Triton / CUDA | others | CUDA plan |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        triton, cuda = (row["families"][name] for name in ("triton", "cuda"))
        cells = [f"{row['op']} {row['shape']} {row['pass']}, {row['dtype']}, block {row['block']}, {row['sparsity']} %"]
        cells += [with_prefix(row["dense_s"], "s"), _timed(triton), _timed(cuda)]
        both = "seconds" in triton and "seconds" in cuda
        cells.append(significant(triton["seconds"] / cuda["seconds"], 3) if both else "")
        others = row.get("peers") or {}
        first = min(others, key=others.__getitem__, default=None)
        cells += ["" if first is None else f"{first} {with_prefix(others[first], 's')}", cuda.get("kernel", "")]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"- {entry['case']}: {entry['why']}" for content in found for entry in content["failed"]]
    return [*lines, *(["", "Layers that failed:", "", *failed] if failed else [])]


def _timed(family: dict[str, Any]) -> str:
    if "seconds" not in family:
        why = next(iter(family["skipped"].values()), "")
        return f"not run{': ' + why[:80] if why else ''}".replace("|", "/")
    return f"{with_prefix(family['seconds'], 's')} ({with_prefix(family['predicted_s'], 's')})"


def with_prefix(value: float, unit: str) -> str:
    """``4.3 TB/s`` for 4.3e12 bytes/s."""
    scale, prefix = next((pair for pair in _PREFIXES if abs(value) >= pair[0]), _PREFIXES[-1])
    return f"{significant(value / scale, 3)} {prefix}{unit.replace('bytes', 'B')}"


def error_lines(results: Results) -> list[str]:
    """The worst error of each op, pass and block beside its bound."""
    worst: dict[tuple[str, str, int], Any] = {}
    for row in results.passes:
        key = row.op, row.pass_, row.block
        if key not in worst or row.max_error > worst[key].max_error:
            worst[key] = row
    lines = ["| op | pass | block | dtype | worst error | bound |", "|---|---|---|---|---|---|"]
    for (op, pass_, block), row in worst.items():
        bound = "" if row.error_bound is None else f"{row.error_bound:.2e}"
        lines.append(f"| {op} | {pass_} | {block} | {row.dtype} | {row.max_error:.2e} | {bound} |")
    return lines


def summarise(out: Path) -> str:
    """Write the report and ``README.md``; returns the counts of verdicts."""
    state = files.read_json(out / "state.json") or {"rehearsal": False, "chunks": {}}
    machine = files.read_json(out / "machine.json") or {}
    good, notes = row_files(out)
    results: Results | None = None
    if good:
        try:
            results = load(good)
        except ReportError as error:
            notes.append(f"Slices of different machines were joined: {error}")
            results = load(good, force=True)
        build_report(good, out / "report", force=True, plots=importlib.util.find_spec("matplotlib") is not None)
    wanted, device = verdict.targets(), "cuda"
    if state["rehearsal"]:
        wanted, device = verdict.rehearsal_targets(_toy(LINEAR_SUITES), _toy(CONV_SUITES)), "cpu"
    lines = verdict.judge(results or Results({}, []), wanted, device)
    gpu = (machine.get("gpu") or {}).get("name", "no GPU")
    page = [f"# Results on {gpu}", "", *([REHEARSAL, ""] if state["rehearsal"] else [])]
    page += [f"> {note}\n" for note in notes]
    page += ["## Targets", "", f"{verdict.counts(lines)}. {_HOW}", "", verdict.markdown(lines), ""]
    page += ["## Correctness", "", _ERRORS, "", *(error_lines(results) if results else ["Not measured."]), ""]
    page += ["## Triton and CUDA kernels", "", _FAMILIES, "", *family_lines(out), ""]
    page += ["## Limits of this machine", "", *probe_lines(out), ""]
    page += ["## Machine", "", *machine_lines(machine), ""]
    page += ["## Chunks", "", *chunk_lines(state), ""]
    page += ["All rows, peers included: [report/report.md](report/report.md).", ""] if good else []
    files.write_text(out / "README.md", "\n".join(page))
    return verdict.counts(lines)


_HOW = (
    "Measured: dense time / sparse time on the device with a cold L2, with the backend that sparsekern chooses, else "
    "with Triton forced. Graph: the same from replayed CUDA graphs."
)
_FAMILIES = "Fastest candidate of each family of kernels on the device, L2 cold, in turns with the dense op."
_ERRORS = "Largest |error| against float64, relative to the same product of absolute values."


def _toy(suites: dict[str, Any]) -> str:
    return str(suites["gpu-toy"][0].shapes[0].name)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run")
    print(summarise(parser.parse_args(arguments).out))


if __name__ == "__main__":
    main()
