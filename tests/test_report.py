"""Speed reports, from the results of a real run of the toy suite (tests/data/benchmark_toy.json)."""

from __future__ import annotations

import copy
import csv
import html.parser
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparsekern.cli.report import report_command
from sparsekern.report import ReportError, build_report, load
from sparsekern.report.results import PassRow
from sparsekern.report.summary import break_even, changes, geometric_mean
from sparsekern.report.tables import significant

TOY = Path(__file__).parent / "data" / "benchmark_toy.json"
DATA: dict[str, Any] = json.loads(TOY.read_text())
PASSES = [b["extra_info"] for b in DATA["benchmarks"] if b["extra_info"]["kind"] == "pass"]

app = typer.Typer()
app.command()(report_command)
cli = CliRunner()


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Path]:
    """Write the toy results after ``change(data)`` and give the file."""

    def write(change: Callable[[dict[str, Any]], object] = lambda data: None, name: str = "variant.json") -> Path:
        data = copy.deepcopy(DATA)
        change(data)
        path = tmp_path / name
        path.write_text(json.dumps(data))
        return path

    return write


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    written = build_report([TOY], out)
    assert all(path.stat().st_size > 0 for path in written)
    return out


_VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "stop"}


class Page(html.parser.HTMLParser):
    """Balance of tags, rows per table, addresses that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0
        self.rows: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and value and not value.startswith("#"):
                self.fetched.append(value)
        self.scripts += tag == "script"
        if tag == "tr":
            self.rows.append(dict(attrs).get("class") or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag


def test_page_is_complete_and_fetches_nothing(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.fetched == [] and "@import" not in text and not re.search(r"url\((?!#)", text)
    assert page.scripts == 1
    trained = sum(b["extra_info"]["kind"] == "train" for b in DATA["benchmarks"])
    assert len(page.rows) > len(PASSES) + trained
    assert text.count("<svg") == len(list(report.glob("*.png")))


def test_every_row_is_shown_and_losing_ones_are_marked(report: Path) -> None:
    lines = (report / "report.md").read_text().splitlines()
    for op, pass_ in {(row["op"], row["pass_"]) for row in PASSES}:
        start = lines.index(f"## {op}, {pass_}") + 4
        rows = list(itertools.takewhile(bool, lines[start:]))
        want = [row for row in PASSES if (row["op"], row["pass_"]) == (op, pass_)]
        assert len(rows) == len(want)
        assert [row.startswith("| ▼ |") for row in rows] == [row["speedup"] < 1 for row in want]
    assert any(row["speedup"] < 1 for row in PASSES), "the fixture must hold a losing row"


def test_csv_holds_the_numbers_in_full(report: Path) -> None:
    with (report / "passes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(PASSES)
    for got, want in zip(rows, PASSES, strict=True):
        assert float(got["speed-up"]) == want["speedup"]
        assert float(got["sparse ms"]) == pytest.approx(want["sparse_median_s"] * 1e3, rel=1e-12)
        assert float(got["of ideal %"]) == pytest.approx(100 * want["speedup"] * want["density"], rel=1e-12)
        assert got["loses"] == str(int(want["speedup"] < 1))


def test_failed_peers_are_listed_with_their_reason(report: Path, variant: Callable[..., Path], tmp_path: Path) -> None:
    def fail(data: dict[str, Any]) -> None:
        info = next(b["extra_info"] for b in data["benchmarks"] if b["extra_info"]["kind"] == "peers")
        info["failed_peers"]["some peer"] = "does not do this"

    build_report([variant(fail)], tmp_path / "out", plots=False)
    for name in ("report.md", "report.html"):
        assert "some peer: does not do this (1 rows)" in (tmp_path / "out" / name).read_text()


def test_runs_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    written = build_report([TOY], tmp_path / "out")
    assert {path.name for path in written} >= {"report.html", "report.md", "passes.csv"}
    assert not list((tmp_path / "out").glob("*.png"))


def test_names_from_the_file_are_escaped(variant: Callable[..., Path], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|\n"

    def spoil(data: dict[str, Any]) -> None:
        data["machine_info"]["cpu"] = evil
        for bench in data["benchmarks"]:
            bench["extra_info"]["shape"] = evil

    build_report([variant(spoil)], tmp_path / "out", plots=False)
    text = (tmp_path / "out" / "report.html").read_text()
    assert Page(text).scripts == 1 and "&lt;script&gt;" in text
    header, rule, *_ = (tmp_path / "out" / "report.md").read_text().split("## linear, forward\n\n")[1].splitlines()
    row = (tmp_path / "out" / "report.md").read_text().split("## linear, forward\n\n")[1].splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", header)) == rule.count("|") == len(re.findall(r"(?<!\\)\|", row))


def _torn(data: dict[str, Any]) -> str:
    return json.dumps(data)[:-2000]


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "torn": (_torn(DATA), "broken JSON at line 1"),
    "empty": ("", "broken JSON"),
    "binary": (b"\xff\xfe\x00\x01" * 20, "no text"),
    "list": ("[1, 2]", "without a list of benchmarks"),
    "number": ("3", "without a list of benchmarks"),
    "foreign": (json.dumps({"benchmarks": [], "machine_info": {}}), "another project"),
    "future": (json.dumps({**DATA, "sparsekern_run": {**DATA["sparsekern_run"], "format": 99}}), "expected format 1"),
    "no rows": (json.dumps({**DATA, "benchmarks": []}), "got an empty run"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_and_writes_nothing(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = cli.invoke(app, [str(path), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in result.stderr and "bad.json" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    result = cli.invoke(app, [str(tmp_path / "nowhere.json"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and "nowhere.json" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0, "fast", None])
@pytest.mark.parametrize("field", ["sparse_median_s", "speedup", "density"])
def test_senseless_number_is_refused_with_the_row(field: str, value: Any, variant: Callable[..., Path]) -> None:
    def spoil(data: dict[str, Any]) -> None:
        data["benchmarks"][3]["extra_info"][field] = value

    with pytest.raises(ReportError, match=re.escape(DATA["benchmarks"][3]["name"])):
        load([variant(spoil)])


@pytest.mark.parametrize("field", ["kind", "shape", "speedup", "neighbours"])
def test_missing_field_is_named(field: str, variant: Callable[..., Path]) -> None:
    with pytest.raises(ReportError, match=f"no '{field}'"):
        load([variant(lambda data: data["benchmarks"][0]["extra_info"].pop(field))])


def test_other_machine_is_refused_unless_forced(variant: Callable[..., Path], tmp_path: Path) -> None:
    other = variant(lambda data: data["machine_info"].update(cpu="Another CPU"))
    with pytest.raises(ReportError, match=r"cpu .*Another CPU.*--force"):
        load([TOY, other])
    with pytest.raises(ReportError, match="machines differ"):
        build_report([TOY], tmp_path / "out", base=other, plots=False)
    assert load([TOY, other], force=True).passes
    result = cli.invoke(app, [str(TOY), "-o", str(tmp_path / "out"), "--base", str(other), "--force", "--no-plots"])
    assert result.exit_code == 0


def test_another_sparsekern_is_no_other_machine(variant: Callable[..., Path]) -> None:
    newer = variant(lambda data: data["machine_info"]["sparsekern"].update(version="99"))
    assert load([TOY, newer]).passes


def test_base_columns_show_the_change(variant: Callable[..., Path], tmp_path: Path) -> None:
    def slower(data: dict[str, Any]) -> None:
        for bench in data["benchmarks"]:
            info = bench["extra_info"]
            if info["kind"] == "pass" and info["op"] == "linear":
                info["sparse_median_s"] *= 2
                info["speedup"] /= 2
        data["benchmarks"] = [b for b in data["benchmarks"] if b["extra_info"]["op"] != "conv2d"]

    base = variant(slower)
    factors = changes(load([base]).passes, load([TOY]).passes)
    assert {key[0] for key in factors} == {"linear"}
    assert all(change.factor == pytest.approx(2) for change in factors.values())
    build_report([TOY], tmp_path / "out", base=base, plots=False)
    text = (tmp_path / "out" / "report.md").read_text()
    linear = text.split("## linear, forward")[1].split("##")[0].strip().splitlines()
    assert "base ms | base speed-up | change" in linear[0]
    assert all(line.endswith("| 2.00 |") for line in linear[2:])
    conv = text.split("## conv2d, forward")[1].split("##")[0].strip().splitlines()
    assert all(line.endswith("| – | – | – |") for line in conv[2:])  # noqa: RUF001


def test_later_file_replaces_equal_rows(variant: Callable[..., Path]) -> None:
    def change(data: dict[str, Any]) -> None:
        data["benchmarks"] = data["benchmarks"][:1]
        data["benchmarks"][0]["extra_info"]["speedup"] = 123.0

    once, both = load([TOY]), load([TOY, variant(change)])
    assert len(both.passes) == len(once.passes) and len(both.runs) == 2
    assert sum(row.speedup == 123.0 for row in both.passes) == 1


def test_doubtful_times_are_warned_about(variant: Callable[..., Path]) -> None:
    def quiet(data: dict[str, Any]) -> None:
        data["sparsekern_run"].update(suite="full", load_average_start=[0.05, 0.1, 0.1])
        for bench in data["benchmarks"]:
            bench["extra_info"]["neighbours"] = None

    def busy(data: dict[str, Any]) -> None:
        quiet(data)
        data["sparsekern_run"]["load_average_start"] = [3.0, 1.0, 0.5]
        data["benchmarks"][0]["extra_info"]["neighbours"] = 1.5

    assert load([variant(quiet)]).warnings() == []
    load_average, neighbours = load([variant(busy)]).warnings()
    assert "load average was 3.00" in load_average
    assert f"1 of {len(DATA['benchmarks'])} rows (up to 1.5)" in neighbours
    assert any("toy suite" in warning for warning in load([TOY]).warnings())


def _on_gpu(data: dict[str, Any]) -> None:
    """As if the linear rows had run on a GPU."""
    data["benchmarks"] = [b for b in data["benchmarks"] if b["extra_info"]["op"] == "linear"]
    data["machine_info"]["gpu"] = {"name": "NVIDIA H200", "capability": "9.0", "sms": 132, "triton": "3.6.0"}
    for bench in data["benchmarks"]:
        info = bench["extra_info"]
        info.update(device="cuda", dtype="bfloat16", mode="triton")
        if info["kind"] == "pass":
            info.update(dense_wall_s=0.012, sparse_wall_s=0.007, sparse_graph_s=0.004, dense_graph_s=0.01)
            info.update(dense_peak_bytes=3_000_000, sparse_peak_bytes=1_000_000)


def test_gpu_rows_show_device_dtype_and_other_clocks(variant: Callable[..., Path], tmp_path: Path) -> None:
    build_report([variant(_on_gpu)], tmp_path / "out")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "NVIDIA H200, sm 9.0, 132 SMs" in text and "device time by events" in text
    assert (tmp_path / "out" / "speedup-linear-cuda-bfloat16-triton.png").exists()
    with (tmp_path / "out" / "passes.csv").open() as file:
        row = next(csv.DictReader(file))
    assert (row["device"], row["dtype"], row["mode"]) == ("cuda", "bfloat16", "triton")
    assert float(row["sparse wall ms"]) == pytest.approx(7) and float(row["graph speed-up"]) == pytest.approx(2.5)
    assert float(row["sparse peak MB"]) == pytest.approx(1)
    peers = (tmp_path / "out" / "peers-forward.csv").read_text().splitlines()[0]
    assert "device,dtype,mode" in peers


def _net(contender: str, pass_: str, seconds: float, **changes: Any) -> dict[str, Any]:
    sparse = contender == "sparse"
    return {
        **{"kind": "net", "net": "wrn-28-10", "batch": 128, "contender": contender, "mode": "eager", "pass_": pass_},
        **{"block": 32 if sparse else 0, "sparsity": 90 if sparse else 0, "allocation": "erk" if sparse else ""},
        **{"median_s": seconds, "dense_median_s": 0.04, "speedup": 0.04 / seconds, "speedup_q1": 0.04 / seconds},
        **{"speedup_q3": 0.04 / seconds, "wall_s": 0.05, "ideal": 3.1 if sparse else None, "params": 4_000_000},
        **{"macs": 5_000_000, "peak_bytes": 2_000_000_000, "layers": {"sparse": 25, "dense": 3} if sparse else {}},
        **{"parts_s": {"convolutions": 0.015, "norms": 0.005}, "optimizers_s": {"fused": 1e-4}},
        **{"device": "cuda", "dtype": "bfloat16", **changes},
    }


def _accuracy(contender: str, seconds: float, test_acc: float = 0.9) -> dict[str, Any]:
    return {
        **{"kind": "accuracy", "net": "wrn-16-8", "data": "cifar10", "contender": contender, "block": 0},
        **{"sparsity": 0, "epochs": 12.0, "batch": 128, "test_acc": test_acc, "seconds": seconds, "step_s": 0.02},
        **{"params": 4, "macs": 5, "layers": {"dense": 9}, "device": "cuda"},
    }


def _whole(data: dict[str, Any]) -> None:
    """Whole nets, real training, an overhead and a row that failed instead of the toy rows."""
    overhead = {
        **{"kind": "overhead", "what": "topology update", "op": "conv2d", "shape": "s", "pass_": "step", "block": 32},
        **{"sparsity": 90, "seconds": 1e-3, "base_s": 0.1, "share": 0.01, "backend": "triton", "device": "cuda"},
    }
    infos = [
        *(_net("dense", "step", 0.04), _net("sparse", "step", 0.02), _net("sparse", "forward", 0.05)),
        *(_accuracy("dense", 100.0), _accuracy("sparse", 120.0, 0.88), overhead),
        {"kind": "missing", "what": "wrn-28-10 compile", "reason": "out | of memory"},
    ]
    data["benchmarks"] = [{"name": i["kind"], "extra_info": i, "stats": {"rounds": 3}} for i in infos]


def test_whole_nets_training_and_overheads_are_shown(variant: Callable[..., Path], tmp_path: Path) -> None:
    build_report([variant(_whole)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| ▼ | wrn-28-10 | 128 | forward | eager | sparse, block 32, erk | 90 | 50.0 | 40.0 | 0.800 |" in text
    assert "|  | wrn-28-10 | 128 | step | eager | sparse, block 32, erk | 90 | 20.0 | 40.0 | 2.00 |" in text
    assert "| 3.10 | 50.0 | 4.00 | 5.00 | 2000 | 25 sparse, 3 dense |" in text
    assert "sparse, block 32, erk | 20.0 | 20.0 | 15.0 | 5.00 | 75.0 | 0.100 |" in text
    assert "| ▼ | wrn-16-8 | cifar10 | sparse | 0 | 0 | 12.0 | 128 | 88.00 | 120 |" in text
    assert "topology update | conv2d | s | step | 32 | 90 | triton | 1.00 | 100 | 1.00 | cuda |" in text
    assert "- wrn-28-10 compile: out \\| of memory" in text
    assert "| rows slower than dense | 1 | of 2 |" in text and "NVIDIA" not in text.splitlines()[0]
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.open == [] and page.rows.count("loses") == 3
    with (tmp_path / "out" / "whole-nets.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["speed-up"]) for row in rows] == pytest.approx([1.0, 2.0, 0.8])
    assert [row["loses"] for row in rows] == list("001")
    with (tmp_path / "out" / "training-on-real-data.csv").open() as file:
        assert [float(row["test accuracy %"]) for row in csv.DictReader(file)] == [90.0, 88.0]


@pytest.mark.parametrize(("row", "field", "value"), [(1, "median_s", 0), (3, "test_acc", 1.5), (5, "base_s", "x")])
def test_senseless_whole_rows_are_refused(row: int, field: str, value: Any, variant: Callable[..., Path]) -> None:
    def spoil(data: dict[str, Any]) -> None:
        _whole(data)
        data["benchmarks"][row]["extra_info"][field] = value

    with pytest.raises(ReportError, match=data_kind(row)):
        load([variant(spoil)])


def data_kind(row: int) -> str:
    return {1: "row net", 3: "row accuracy", 5: "row overhead"}[row]


def test_a_busy_host_is_no_matter_to_a_gpu(variant: Callable[..., Path]) -> None:
    def busy(data: dict[str, Any]) -> None:
        _on_gpu(data)
        data["sparsekern_run"].update(suite="gpu-full", load_average_start=[9.0, 9.0, 9.0])

    assert load([variant(busy)]).warnings() == []


def test_a_row_on_a_gpu_is_no_row_on_a_cpu(variant: Callable[..., Path]) -> None:
    both = load([TOY, variant(_on_gpu)], force=True)
    linear = [row for row in load([TOY]).passes if row.op == "linear"]
    assert sum(row.op == "linear" for row in both.passes) == 2 * len(linear)


def test_cpu_rows_do_not_name_what_is_usual(report: Path) -> None:
    for name in ("report.md", "passes.csv"):
        text = (report / name).read_text()
        assert "dtype" not in text and "wall ms" not in text and "GPU" not in text


def test_of_ideal_is_speedup_times_density() -> None:
    row = load([TOY]).passes[0]
    assert isinstance(row, PassRow) and row.of_ideal == row.speedup * row.density


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0.1, 10))
def test_geometric_mean_scales_and_inverts(values: list[float], factor: float) -> None:
    mean = geometric_mean(values)
    assert geometric_mean(v * factor for v in values) == pytest.approx(mean * factor)
    assert geometric_mean(1 / v for v in values) == pytest.approx(1 / mean)


def test_geometric_mean_of_nothing() -> None:
    with pytest.raises(ValueError, match="got none"):
        geometric_mean([])


@given(st.floats(0.06, 0.45), st.floats(0.3, 2.0))
def test_break_even_of_a_power_law_is_exact(density: float, power: float) -> None:
    points = [(d, (density / d) ** power) for d in (0.5, 0.05, 0.3, 0.1)]
    found, text = break_even(points)
    assert found == pytest.approx(density) and float(text) == pytest.approx(density, rel=5e-3)


def test_break_even_outside_the_range() -> None:
    assert break_even([(0.1, 2.0), (0.5, 1.5)]) == (None, "> 0.5")
    assert break_even([(0.1, 0.9), (0.5, 0.2)]) == (None, "< 0.1")
    assert break_even([]) == (None, "not measured")


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (9.996, "10.0"),
        (99.96, "100"),
        (12345.0, "12300"),
        (0.01234, "0.0123"),
        (0.9996, "1.00"),
        (1.5e-7, "1.50e-07"),
        (2e7, "2.00e+07"),
        (-3.14159, "-3.14"),
        (0.1, "0.100"),
    ],
)
def test_significant_digits(value: float, printed: str) -> None:
    assert significant(value, 3) == printed
