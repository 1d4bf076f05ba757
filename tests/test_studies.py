"""Studies: the matrix of runs, killed and shared studies, failed cells, and tables against what the runs said."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparsekern.cli import main
from sparsekern.studies import Cell, DstStudy, open_study, run_study, summarise, write_outputs
from sparsekern.studies.claims import claim, holder
from sparsekern.studies.folder import StudyFolder
from sparsekern.studies.plots import exploration_curves
from sparsekern.studies.runner import forget_failures, run_workers
from sparsekern.training import ConfigError, read_result
from sparsekern.training.checkpoint import checkpoint_files

TINY = {"model": "mlp-32-32", "subset": 200, "batch_size": 50, "steps": 3, "update_every": 1, "log_every": 1}
MATRIX: dict[str, Any] = {"methods": ("static", "set"), "sparsities": (0.5,), "blocks": ("4",), "seeds": (0, 1)}


def study(base: dict[str, Any] | None = None, **changes: Any) -> DstStudy:
    values = {**TINY, **(base or {})}
    if changes.get("methods") == ("static",):
        del values["update_every"]
    return DstStudy(**{**MATRIX, **changes}, base=values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 8 cells with its outputs; tests only read it."""
    out = tmp_path_factory.mktemp("study")
    states = run_study(open_study(out, study()), out, say=lambda text: None)
    assert set(states.values()) == {"done"}
    write_outputs(out)
    return out


# -- which cells ---------------------------------------------------------------------------------------------------


def test_cells_are_the_matrix_and_the_dense_nets() -> None:
    names = [cell.name for cell in study(blocks=("4", "8x16"), sparsities=(0.5, 0.9), seeds=(3,)).cells()]
    sparse = {f"{m}-s{s}-b{b}-seed3" for m in ("static", "set") for s in (0.5, 0.9) for b in ("4", "8x16")}
    assert set(names) == sparse | {"dense-seed3", "small-s0.5-seed3", "small-s0.9-seed3"} and len(names) == 11


def test_every_cell_gets_the_options_its_method_takes() -> None:
    made = DstStudy(
        methods=("static", "set", "rigl", "dsr", "gradual"),
        base={"update_every": 7, "drop_fraction": 0.2, "exact": True},
    )
    found = {m: made.config(Cell(m, 0.8, "8", 5)) for m in made.methods}
    assert [found[m].update_every for m in made.methods] == [100, 7, 7, 7, 7]
    assert [found[m].drop_fraction for m in made.methods] == [0.3, 0.2, 0.2, 0.2, 0.3]
    assert [found[m].exact for m in made.methods] == [False, False, True, False, False]
    assert [found[m].capacity for m in made.methods] == [1.0, 1.0, 1.0, 2.0, 1.0]
    assert {(c.sparsity, c.block, c.seed, c.below_break_even) for c in found.values()} == {(0.8, "8", 5, "sparse")}
    dense = made.config(Cell("dense", 0.0, "", 5))
    assert (dense.sparsity, dense.method, dense.seed, dense.schedule) == (0.0, "static", 5, "cosine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("static", "sett")}, "methods: expected one of .* did you mean set"),
        ({"methods": ()}, "methods: expected at least one"),
        ({"sparsities": (0.0,)}, "sparsities: expected fractions above 0"),
        ({"blocks": ("auto",)}, "blocks: expected sizes"),
        ({"blocks": ("500",)}, "block: expected sizes within 1..128"),
        ({"base": {"seed": 1}}, "seed: the cells of a study differ in it"),
        ({"base": {"modle": "mlp"}}, "did you mean model"),
        ({"base": {"exact": True}}, "exact: none of the methods static, set takes it"),
        ({"base": {"lr": -1.0}}, "lr: expected a value at least 0"),
    ],
)
def test_a_study_that_cannot_run_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(**changes)


def test_nets_of_a_row_are_equal_in_size_and_the_narrower_net_in_macs(finished: Path) -> None:
    results = {cell.name: read_result(finished / "cells" / cell.name) for cell in StudyFolder(finished).load().cells()}
    sizes = {(r.params, r.macs, r.layers["sparse"]) for name, r in results.items() if r and "-b4-" in name}
    assert len(sizes) == 1 and next(iter(sizes))[2] == 2  # both hidden layers; the classifier is dense
    small, sparse, dense = results["small-s0.5-seed0"], results["set-s0.5-b4-seed0"], results["dense-seed0"]
    assert small is not None and sparse is not None and dense is not None
    assert small.macs == pytest.approx(sparse.macs, rel=0.05) and sparse.macs < 0.6 * dense.macs
    assert sparse.updates == 2 and sparse.exploration_rate is not None and sparse.exploration_rate > 0.5


# -- tables and plots ----------------------------------------------------------------------------------------------


def test_tables_say_what_the_runs_said(finished: Path) -> None:
    runs = {
        path.parent.name.rpartition("-seed")[0]: [
            json.loads(p.read_text()) for p in sorted(path.parent.parent.glob(path.parent.name[:-1] + "?/result.json"))
        ]
        for path in finished.glob("cells/*/result.json")
    }
    rows = list(csv.DictReader((finished / "table.csv").read_text().splitlines()))
    assert len(rows) == len(runs) == 4
    written = (finished / "table.md").read_text()
    table = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in written.splitlines() if line[:2] == "| "
    ]
    for row, shown in zip(rows, table[1:], strict=True):
        name = {"dense": "dense", "small": "small-s0.5"}.get(row["method"], f"{row['method']}-s0.5-b4")
        accuracies = [run["test_acc"] for run in runs[name]]
        mean, std = sum(accuracies) / 2, abs(accuracies[0] - accuracies[1]) / 2**0.5
        assert (float(row["test_acc"]), float(row["test_acc_std"])) == pytest.approx((mean, std))
        assert shown[3] == f"{100 * mean:.2f} ± {100 * std:.2f}"
        assert shown[4:6] == [f"{runs[name][0]['params']:,}", f"{runs[name][0]['macs']:,}"]
        explored = [run["exploration_rate"] for run in runs[name]]
        assert row["exploration"] == ("" if explored[0] is None else str(statistics.fmean(explored)))
        assert shown[-1] == row["seeds"] == "2"
    cells = {cell["name"]: cell for cell in json.loads((finished / "results.json").read_text())["cells"]}
    assert {c["state"] for c in cells.values()} == {"done"} and len(cells) == 8
    assert cells["set-s0.5-b4-seed1"]["test_acc"] == runs["set-s0.5-b4"][1]["test_acc"]
    for plot in ("accuracy.png", "exploration.png"):
        assert (finished / plot).read_bytes()[:4] == b"\x89PNG"


def test_exploration_curves_are_means_over_seeds(finished: Path) -> None:
    curves = exploration_curves(summarise(finished))
    lines = [
        [
            json.loads(text)
            for text in (finished / f"cells/set-s0.5-b4-seed{seed}/metrics.jsonl").read_text().splitlines()
        ]
        for seed in (0, 1)
    ]
    at = [{line["step"]: line["exploration_rate"] for line in run if line["kind"] == "interval"} for run in lines]
    expected = [(0, 0.5), *((step, (at[0][step] + at[1][step]) / 2) for step in (1, 2, 3))]
    assert curves["set", 0.5, "4"] == [(step, pytest.approx(rate)) for step, rate in expected]
    assert curves["static", 0.5, "4"] == [(0, pytest.approx(0.5)), (3, pytest.approx(0.5))]


def test_mean_density_of_gradual_pruning_counts_what_was_stored(tmp_path: Path) -> None:
    made = open_study(tmp_path, study({"steps": 12}, methods=("gradual",), seeds=(0,)))
    run_study(made, tmp_path, say=lambda text: None)
    text = (tmp_path / "cells/gradual-s0.5-b4-seed0/metrics.jsonl").read_text().splitlines()
    updates = {line["step"]: line["dropped"] for line in map(json.loads, text) if line["kind"] == "update"}
    stored, total = 16 * 8 + 8 * 8, 0  # all blocks of 64 -> 32 -> 32
    blocks = stored
    for step in range(12):
        total += stored
        stored -= updates.get(step + 1, 0)
    assert stored == blocks // 2
    row = summarise(tmp_path).row("gradual", 0.5, "4")
    assert row is not None and row.mean_density == pytest.approx(total / 12 / blocks)
    assert row.test_acc_std is None and row.seeds == 1


# -- killed, shared, failed ----------------------------------------------------------------------------------------


def test_a_claim_excludes_others_until_its_process_ends(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "cell"
    code = (
        "import sys, time; from pathlib import Path; from sparsekern.studies.claims import claim\n"
        "with claim(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with claim(path) as mine:
            assert not mine
        assert holder(path) == process.pid
        process.kill()
        process.wait()
    assert holder(path) is None and path.exists()
    with claim(path) as mine:
        assert mine and holder(path) == os.getpid()


# The command line in a process that a signal to itself ends right after the dense net's checkpoint at step 40.
_DIES = """
import os, signal, sys
from sparsekern.cli import main
from sparsekern.training import loop
save = loop.save_checkpoint
def save_and_die(folder, step, state):
    save(folder, step, state)
    if "dense" in str(folder) and step == 40:
        os.kill(os.getpid(), signal.SIGKILL)
loop.save_checkpoint = save_and_die
main(["study", "dst", "--out", sys.argv[1]])
"""


def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    made = study({"steps": 60, "update_every": 10, "checkpoint_every": 20}, methods=("set",), seeds=(0,))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    open_study(killed, made)
    ended = subprocess.run([sys.executable, "-c", _DIES, str(killed)], stdout=subprocess.DEVNULL, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    folder, (first, second, third) = StudyFolder(killed), made.cells()
    assert [folder.state(cell) for cell in (first, second, third)] == ["done", "open", "open"]
    before = (folder.run(first) / "result.json").stat().st_mtime_ns
    run_study(folder.load(), killed, say=lambda text: None)
    assert (folder.run(first) / "result.json").stat().st_mtime_ns == before
    resumed = read_result(folder.run(second))
    assert resumed is not None and (resumed.resumed_from, resumed.steps) == (40, 60)
    run_study(open_study(whole, made), whole, say=lambda text: None)
    assert summarise(killed).rows == summarise(whole).rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_says_how_to_go_on(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsekern.training import loop

    save = loop.save_checkpoint

    def save_and_stop(folder: Path, step: int, state: dict[str, Any]) -> Path:
        if step == 20:
            os.kill(os.getpid(), number)
        return save(folder, step, state)

    monkeypatch.setattr(loop, "save_checkpoint", save_and_stop)
    open_study(tmp_path, study({"steps": 60, "checkpoint_every": 20}, methods=("set",), seeds=(0,)))
    assert main(["study", "dst", "--out", str(tmp_path)]) == 128 + number
    assert f"continue with: sparsekern study dst --out {tmp_path}" in capsys.readouterr().err
    states = {result.cell.name: result.state for result in summarise(tmp_path).cells}
    assert set(states.values()) == {"open"}
    assert checkpoint_files(tmp_path / "cells" / "set-s0.5-b4-seed0" / "checkpoints")[0].name == "step-000000021.pt"


def test_two_workers_share_the_cells(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = open_study(tmp_path, study(methods=("static", "set", "rigl"), seeds=(0,)))
    assert run_workers(tmp_path, 2) == 0
    assert {result.state for result in summarise(tmp_path).cells} == {"done"}
    trained = re.findall(r"^\[\d/5\] (\S+): test accuracy", capfd.readouterr().out, re.MULTILINE)
    assert sorted(trained) == sorted(cell.name for cell in made.cells())


def test_a_signal_stops_all_workers_with_checkpoints(tmp_path: Path) -> None:
    made = open_study(tmp_path, study({"steps": 1_000_000, "log_every": 50}, methods=("set",), seeds=(0,)))
    command = [sys.executable, "-m", "sparsekern", "study", "dst", "--out", str(tmp_path), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        logs = [tmp_path / "cells" / cell.name / "metrics.jsonl" for cell in made.cells()]
        deadline = time.monotonic() + 120
        while sum(log.is_file() and bool(log.read_text()) for log in logs) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert sum(bool(checkpoint_files(log.parent / "checkpoints")) for log in logs) == 2
    assert {result.state for result in summarise(tmp_path).cells} == {"open"}


def test_a_cell_in_other_hands_is_left_alone(tmp_path: Path) -> None:
    made = open_study(tmp_path, study(methods=("static",), seeds=(0,)))
    cell = made.cells()[0]
    with claim(StudyFolder(tmp_path).claim_file(cell)) as mine:
        assert mine
        states = run_study(made, tmp_path, say=lambda text: None)
    assert states == {"static-s0.5-b4-seed0": "running", "dense-seed0": "done", "small-s0.5-seed0": "done"}
    assert not StudyFolder(tmp_path).run(cell).exists()


def test_a_failed_cell_is_shown_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsekern.training import loop

    train, broken = loop.train, ["set-s0.5-b4-seed1"]

    def fails(config: Any, out: Any = None, **options: Any) -> Any:
        if options["label"] in broken:
            raise RuntimeError("out of | luck")
        return train(config, out, **options)

    monkeypatch.setattr(loop, "train", fails)
    made = open_study(tmp_path, study(methods=("set",)))
    states = run_study(made, tmp_path, say=lambda text: None)
    assert [name for name, state in states.items() if state != "done"] == broken
    assert states[broken[0]] == "failed"
    assert main(["study", "dst", "--out", str(tmp_path)]) == 1
    assert "failed: set-s0.5-b4-seed1: RuntimeError: out of | luck" in capsys.readouterr().err
    text = (tmp_path / "table.md").read_text()
    assert "- set-s0.5-b4-seed1: RuntimeError: out of | luck" in text
    assert re.search(r"^\| set \| 0.5 \| 4 \| \d+\.\d\d \|.*\| 1 of 2 \|$", text, re.MULTILINE)
    failed = json.loads((tmp_path / "failed" / f"{broken[0]}.json").read_text())
    assert 'raise RuntimeError("out of | luck")' in failed["traceback"]
    name = broken.pop()
    assert run_study(made, tmp_path, say=lambda text: None)[name] == "failed"  # not by itself
    forget_failures(made, tmp_path)
    assert run_study(made, tmp_path, say=lambda text: None)[name] == "done"


# -- the command line ----------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "dst")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name != "update_every"]
    start = ["study", "dst", "--out", out, "--methods", "static", "--sparsities", "0.5", "--blocks", "4"]
    assert main(["study", "dst", "--out", out, "--table"]) == 2
    assert "holds no study" in capsys.readouterr().err
    assert main([*start, "--seeds", "one"]) == 2
    assert "seeds: expected numbers such as 0,1,2, got 'one'" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main([*start, "--seeds", "0", *options]) == 0
    shown = capsys.readouterr().out
    assert "[1/3] static-s0.5-b4-seed0: test accuracy" in shown and f"{out}/exploration.png" in shown
    assert main(["study", "dst", "--out", out, "--batch-size", "20"]) == 2
    assert "holds a study with other options: batch_size" in capsys.readouterr().err
    # More seeds are added; what is done is not done again.
    assert main(["study", "dst", "--out", out, "--seeds", "1", "--checkpoint-minutes", "5"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"\] (\S+): ", shown) == ["static-s0.5-b4-seed1", "dense-seed1", "small-s0.5-seed1"]
    (tmp_path / "dst" / "table.md").unlink()
    assert main(["study", "dst", "--out", out, "--table"]) == 0
    assert "| 2 |" in (tmp_path / "dst" / "table.md").read_text() and "test accuracy" not in capsys.readouterr().out
