"""The run on a GPU, without one: planning, budget, resuming, isolation of failures, verdicts, and a rehearsal."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    cuda_build,
    cuda_primitives,
    cuda_sanitize,
    families,
    files,
    gpu,
    runner,
    shards,
    toolkit,
    verdict,
    wheels,
)
from benchmarks.chunks import LOGS, RESULT, Chunk, Settings, plan
from benchmarks.gpu_summary import family_lines, row_files, summarise, with_prefix
from benchmarks.runner import Budget, State, StateError
from benchmarks.shapes import Selection, conv2d_cases, linear_cases
from sparsekern.report import load

ROOT = Path(__file__).parent.parent
WRITE = "import json, sys; json.dump({'value': %s}, open(sys.argv[1], 'w'))"


def chunk(name: str, code: str = WRITE % 1, **changes: Any) -> Chunk:
    return Chunk(
        name, ("-c", code, RESULT), **{"result": f"{name}.json", "timeout_s": 30.0, "estimate_s": 1.0, **changes}
    )


def run(out: Path, *chunks: Chunk, budget: Budget | None = None, **more: Any) -> tuple[State, list[Chunk]]:
    state = State(out, rehearsal=False)
    late = runner.run_all(chunks, out, state, budget or Budget(None), dict(os.environ), **more)
    return state, late


# -- plan --------------------------------------------------------------------------------------------------------------


def test_plan_is_in_order_of_importance() -> None:
    names = [chunk.name for chunk in plan(Settings())]
    assert len(names) == len(set(names))
    order = ["cuda-primitives", "cuda-build", "smoke", "cuda-smoke", "tests-cuda-gpu", "tests-gpu", "cuda-memcheck"]
    order += ["probe-l2", "gate-64", "gate-32", "gate-128", "gate-16", "conv-gate-64", "cuda-gate-64"]
    order += ["cuda-conv-gate-32", "families-linear", "families-conv2d"]
    order += ["net-wrn-28-10-eager", "net-wrn-28-10-compile", "net-resnet50-graph", "tune", "full-64"]
    order += ["shape-8192x8192", "overheads", "cifar-dense", "cifar-sparse", "peers-64", "conv-wrn-64", "conv-resnet"]
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
    assert names[:3] == ["cuda-primitives", "cuda-build", "smoke"]


def test_gates_force_the_kernels_and_the_rest_is_as_dispatched() -> None:
    env = {chunk.name: chunk.env for chunk in plan(Settings())}
    assert env["gate-64"] == env["conv-gate-32"] == env["smoke"] == {"SPARSEKERN_BACKEND": "triton"}
    assert env["cuda-gate-64"] == env["cuda-conv-gate-32"] == env["cuda-smoke"] == {"SPARSEKERN_BACKEND": "cuda"}
    as_dispatched = ("full-64", "peers-32", "conv-wrn-64", "net-resnet50-eager", "overheads", "cifar-sparse")
    as_dispatched += ("families-linear", "families-conv2d")
    assert all(env[name] == {"SPARSEKERN_BACKEND": None} for name in as_dispatched)


def test_plan_covers_every_target() -> None:
    """Each row that targets.json names is in a chunk of its own selection."""
    commands = {chunk.name: " ".join(chunk.command) for chunk in plan(Settings())}
    wanted = verdict.targets()
    for row in wanted["linear"]["rows"]:
        command = commands[f"full-{row['block']}"]
        assert wanted["linear"]["shape"] in command and "--sk-suite gpu-full" in command
    for block in wanted["conv2d"]["blocks"]:
        command = commands[f"conv-wrn-{block}"]
        assert all(shape in command for shape in wanted["conv2d"]["shapes"]) and f"--sk-blocks {block}" in command
    nets = {f"net-{net}-{mode}" for net in wanted["nets"]["nets"] for mode in wanted["nets"]["modes"]}
    assert nets | {"cifar-dense", "cifar-sparse", "overheads"} <= set(commands)
    assert {f"peers-{block}" for peer in wanted["peers"] for block in peer["blocks"]} <= set(commands)


def test_a_backend_without_convolutions_skips_them_with_the_reason() -> None:
    skipped = {chunk.name: chunk.skip for chunk in plan(Settings(conv2d="no kernel")) if chunk.skip == "no kernel"}
    assert {"conv-gate-64", "conv-wrn-32", "conv-vgg"} <= set(skipped)
    assert all(name.startswith("conv-") for name in skipped)


def test_every_conv_shape_that_a_chunk_names_is_in_the_suite() -> None:
    """A name that no case has would leave the chunk without rows."""
    for chunk in plan(Settings()):
        if "benchmarks/test_conv2d.py" not in chunk.command:
            continue
        options = dict(zip(chunk.command, chunk.command[1:], strict=False))
        names = options["--sk-shapes"].split(",") if "--sk-shapes" in options else []
        blocks = tuple(int(b) for b in options["--sk-blocks"].split(","))
        want = Selection(options["--sk-suite"], (1,), blocks, None, None, tuple(names) or None)
        cases = conv2d_cases(want)
        assert {case.shape.name for case in cases} >= set(names) and {case.block for case in cases} == set(blocks)
        assert {case.sparsity for case in cases} >= {80, 90} and {case.memory_format for case in cases} == {"nhwc"}


def test_no_chunk_takes_longer_than_five_minutes_but_the_tests_and_the_trained_nets() -> None:
    for chunk in plan(Settings(data="somewhere")):
        assert chunk.estimate_s <= chunk.timeout_s <= (560 if chunk.name == "tests-other-tiles" else 420)
        if chunk.name.startswith(("net-", "conv-")):
            assert chunk.timeout_s <= 300


def test_cifar_needs_data() -> None:
    without = {chunk.name: chunk for chunk in plan(Settings()) if chunk.name.startswith("cifar-")}
    assert all("--data" in chunk.skip for chunk in without.values())
    with_data = {chunk.name: chunk for chunk in plan(Settings(data="a,b")) if chunk.name.startswith("cifar-")}
    assert all(not chunk.skip and chunk.command[-6:-4] == ("--data", "a,b") for chunk in with_data.values())
    assert not any(chunk.skip for chunk in plan(Settings("cpu")) if chunk.name.startswith("cifar-"))


def test_slices_hold_every_chunk_once_and_keep_their_length(tmp_path: Path) -> None:
    chunks, state = plan(Settings()), State(tmp_path, rehearsal=False)
    cut = runner.slices(chunks, state, 540.0)
    assert sorted(c.name for members in cut for c in members) == sorted(c.name for c in chunks if not c.skip)
    assert all(sum(c.estimate_s for c in members) <= 540.0 - runner.PREPARE_S for members in cut)
    huge = chunk("huge", estimate_s=900.0)
    assert [[c.name for c in members] for members in runner.slices([huge, chunk("a")], state, 540.0)] == [
        ["a"],
        ["huge"],
    ]
    text = runner.describe_slices(chunks, state, 540.0)
    assert text.startswith("slice 1: about ") and "skipped: cifar-dense (no data" in text
    state.set(chunks[0], status="ok")
    assert chunks[0].name not in {c.name for members in runner.slices(chunks, state, 540.0) for c in members}


def test_tests_are_shared_by_workers_and_only_listed_in_a_rehearsal() -> None:
    tests = [chunk for chunk in plan(Settings(workers=4, xdist=True)) if chunk.name.startswith("tests-")]
    assert "tests-cuda-gpu" in {chunk.name for chunk in tests}
    assert tests and all("-n 4" in " ".join(chunk.command) for chunk in tests)
    tests = [chunk for chunk in plan(Settings(workers=4)) if chunk.name.startswith("tests-")]
    assert tests and all(chunk.command[:5] == ("-m", "benchmarks.shards", "4", LOGS, "--") for chunk in tests)
    rehearsed = [chunk for chunk in plan(Settings("cpu", workers=4)) if chunk.name.startswith("tests-")]
    assert all("--collect-only" in chunk.command and "-n" not in chunk.command for chunk in rehearsed)
    own = [chunk for chunk in plan(Settings(tests=("tests/test_layout.py", "-k", "x"))) if chunk.name == "tests"]
    assert own[0].command[-3:] == ("tests/test_layout.py", "-k", "x")


def test_tiles_that_no_default_takes_are_tested_last() -> None:
    chunks = plan(Settings(workers=4))
    by_name = {chunk.name: chunk for chunk in chunks}
    assert chunks[-1] is by_name["tests-other-tiles"] and chunks[-1].command[-2:] == ("-k", "other_tiles")
    assert by_name["tests-triton-gpu"].command[-2:] == ("-k", "not other_tiles")
    assert "def test_other_tiles(" in (ROOT / "tests" / "test_triton_gpu.py").read_text()


def test_only_takes_names_and_patterns() -> None:
    chunks = plan(Settings())
    assert [c.name for c in gpu.chosen(chunks, "tune,gate-*")] == ["gate-64", "gate-32", "gate-128", "gate-16", "tune"]
    with pytest.raises(SystemExit, match="gate-7: expected some of cuda-primitives"):
        gpu.chosen(chunks, "gate-7")


def test_chunks_of_the_cuda_kernels_need_their_build() -> None:
    chunks = {chunk.name: chunk for chunk in plan(Settings())}
    theirs = {name for name in chunks if name.startswith(("cuda-", "tests-cuda"))}
    assert {"cuda-smoke", "cuda-gate-16", "cuda-conv-gate-64", "cuda-racecheck", "tests-cuda-gpu"} <= theirs
    needing = {name for name, chunk in chunks.items() if chunk.needs}
    assert needing == theirs - {"cuda-primitives", "cuda-build"}
    assert {chunks[name].needs for name in needing} == {"cuda-build"}
    assert "tests/test_cuda_gpu.py" in chunks["tests-cuda-gpu"].command
    assert "--ignore=tests/test_cuda_gpu.py" in chunks["tests-gpu"].command
    rehearsed = {chunk.name: chunk for chunk in plan(Settings("cpu"))}
    skipped = {name for name, chunk in rehearsed.items() if "need a GPU" in chunk.skip}
    assert skipped == {name for name in rehearsed if name.startswith(("cuda-gate", "cuda-conv", "cuda-smoke"))}


def test_every_block_of_the_cuda_gates_has_rows() -> None:
    gates = [chunk for chunk in plan(Settings()) if chunk.name.startswith(("cuda-gate", "cuda-conv-gate"))]
    for chunk in gates:
        options = dict(zip(chunk.command, chunk.command[1:], strict=False))
        want = Selection(options["--sk-suite"], (1,), (int(options["--sk-blocks"]),))
        cases = conv2d_cases(want) if "conv" in chunk.name else linear_cases(want)
        assert {case.pass_ for case in cases} >= {"forward", "dgrad", "wgrad"} and {
            case.sparsity for case in cases
        } >= {90}


# -- runs --------------------------------------------------------------------------------------------------------------


def test_failures_stay_alone(tmp_path: Path) -> None:
    chunks = (
        chunk("crash", "import os; print('about to die', flush=True); os.abort()"),
        chunk("hang", "import time; print('hanging', flush=True); time.sleep(600)", timeout_s=1.0),
        chunk("silent", "pass"),
        chunk("half", "import sys; open(sys.argv[1], 'w').write('{\"a\": ')"),
        chunk("fine"),
    )
    start = time.monotonic()
    state, late = run(tmp_path, *chunks)
    assert time.monotonic() - start < 300  # nobody waited for the one that hangs
    status = {name: facts["status"] for name, facts in state.chunks.items()}
    assert status == {"crash": "failed", "hang": "timeout", "silent": "failed", "half": "failed", "fine": "ok"}
    assert state.chunks["crash"]["tail"] == ["about to die"] and "hanging" in state.chunks["hang"]["tail"]
    assert state.chunks["hang"]["note"].startswith("over 1 s")
    assert state.chunks["silent"]["note"] == "wrote no result"
    assert late == [] and [path.name for path in tmp_path.glob("*.json")].count("half.json") == 0
    assert json.loads((tmp_path / "fine.json").read_text()) == {"value": 1}
    assert runner.failures(chunks, state) == ["crash", "hang", "silent", "half"]


def test_what_needs_a_failed_chunk_is_skipped_with_its_reason(tmp_path: Path) -> None:
    broken, needing = chunk("broken", "raise SystemExit('no nvcc here')"), chunk("needing", needs="broken")
    free, other = chunk("free"), chunk("other", needs="never run")
    state, _ = run(tmp_path, broken, needing, free, other)
    assert state.chunks["needing"]["status"] == "skipped"
    assert state.chunks["needing"]["note"] == "broken failed: no nvcc here"
    assert state.chunks["free"]["status"] == state.chunks["other"]["status"] == "ok"
    mended = dataclasses.replace(broken, command=chunk("broken").command)
    state, _ = run(tmp_path, mended, needing)
    assert state.chunks["needing"]["status"] == "ok"


def test_a_timeout_ends_children_and_keeps_what_was_written(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "try:\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    open(sys.argv[1], 'w').write('{\"rows\": 3}')\n"
    )
    state, _ = run(tmp_path, chunk("rows", code, timeout_s=6.0))
    assert state.chunks["rows"]["status"] == "timeout"
    assert json.loads((tmp_path / "rows.json").read_text()) == {"rows": 3}
    child = int(state.chunks["rows"]["tail"][0])
    deadline = time.monotonic() + 60
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_resume_runs_the_new_then_the_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def logged(name: str, tail: str = "") -> Chunk:
        return chunk(name, f"open({str(log)!r}, 'a').write('{name} ')\n{WRITE % 1}\n{tail}")

    broken, first, second = logged("broken", "raise SystemExit(3)"), logged("first"), logged("second")
    run(tmp_path, broken, first)
    run(tmp_path, broken, first, second)
    assert log.read_text() == "broken first second broken "
    changed = dataclasses.replace(first, env={"X": "1"})
    run(tmp_path, changed, second)
    assert log.read_text().endswith("broken first ")
    run(tmp_path, changed, second, again=True)
    assert log.read_text().endswith("broken first first second ")


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """The whole run dies without a chance to clean up; the cut-off chunk runs again, finished ones do not."""
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from benchmarks import runner\n"
        "from benchmarks.chunks import Chunk, RESULT\n"
        "out = Path(sys.argv[1])\n"
        "done = \"import sys; open(sys.argv[1], 'w').write('{}')\"\n"
        'kill = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"\n'
        "chunks = [Chunk('one', ('-c', done, RESULT), 'one.json'), Chunk('two', ('-c', kill, RESULT), 'two.json')]\n"
        "runner.run_all(chunks, out, runner.State(out, rehearsal=False), runner.Budget(None), dict(os.environ))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    state = State(tmp_path, rehearsal=False)
    assert state.chunks["one"]["status"] == "ok" and state.chunks["two"]["status"] == "running"
    cut = Chunk("two", ("-c", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)", RESULT), "two.json")
    assert state.status(cut) is None and runner.order([cut], state) == [cut]


def test_budget_starts_nothing_that_would_not_end(tmp_path: Path) -> None:
    now = [0.0]
    budget = Budget(300.0, reserve_s=20.0, clock=lambda: now[0])
    small, large = chunk("small", estimate_s=60.0), chunk("large", estimate_s=200.0)

    def later() -> None:
        now[0] += 200.0

    state, late = run(tmp_path, large, chunk("middle", estimate_s=100.0), small, budget=budget, after=later)
    assert [c.name for c in late] == ["middle"] and set(state.chunks) == {"large", "small"}
    now[0] = 290.0
    assert not budget.allows(small) and Budget(None).allows(large)
    now[0] = 200.0
    assert budget.timeout(dataclasses.replace(large, timeout_s=900.0)) == pytest.approx(300 - 20 - 200 - runner.GRACE_S)


def test_a_chunk_that_the_budget_cuts_is_no_failure_and_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LEAST_S", 1.0)
    slow = chunk("slow", "import time; time.sleep(30)")
    state, late = run(tmp_path, slow, budget=Budget(26.0, reserve_s=5.0))  # a second is left after the grace
    assert state.chunks["slow"]["status"] == "cut" and late == []
    assert runner.failures([slow], state) == [] and runner.order([slow], state) == [slow]


def test_late_chunks_are_told(tmp_path: Path) -> None:
    state, late = run(tmp_path, chunk("large", estimate_s=500.0), chunk("small"), budget=Budget(100.0))
    assert [c.name for c in late] == ["large"] and set(state.chunks) == {"small"}


def test_environment_of_a_chunk_is_laid_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SK_GONE", "1")
    code = (
        "import json, os, sys; json.dump({k: os.environ.get(k) for k in ('SK_GONE', 'SK_NEW')}, open(sys.argv[1], 'w'))"
    )
    run(tmp_path, chunk("env", code, env={"SK_GONE": None, "SK_NEW": "2"}))
    assert json.loads((tmp_path / "env.json").read_text()) == {"SK_GONE": None, "SK_NEW": "2"}


def test_no_tests_found_is_no_failure(tmp_path: Path) -> None:
    none = Chunk("tests", ("-c", "raise SystemExit(5)"), empty_ok=True)
    state, _ = run(tmp_path, none, dataclasses.replace(none, name="rows", empty_ok=False))
    assert (state.chunks["tests"]["status"], state.chunks["rows"]["status"]) == ("ok", "failed")


def test_rehearsed_and_measured_results_do_not_mix(tmp_path: Path) -> None:
    State(tmp_path, rehearsal=True).set(chunk("a"), status="ok")
    with pytest.raises(StateError, match="holds a rehearsal"):
        State(tmp_path, rehearsal=False)
    assert State(tmp_path, rehearsal=False, fresh=True).chunks == {}


# -- verdicts ----------------------------------------------------------------------------------------------------------

TABLE = {  # block: (pass, {sparsity: (must, stretch)})
    128: ("step", {50: (1.25, 1.5), 80: (3.0, 3.7), 90: (5.3, 6.8), 95: (7, 8.5)}),
    64: ("step", {50: (1.0, 1.1), 80: (2.0, 2.5), 90: (3.8, 4.8), 95: (6.3, 8)}),
    32: ("forward", {50: (1.0, 1.2), 80: (1.2, 1.9), 90: (2.3, 2.9), 95: (4.4, 5.2)}),
    16: ("forward", {50: (1.0, 1.2), 80: (1.0, 1.6), 90: (1.25, 2.2), 95: (2.4, 3.5)}),
}


def test_targets_are_the_promised_ones() -> None:
    found = verdict.targets()
    assert (found["linear"]["shape"], found["linear"]["dtype"]) == ("8192x4096->4096", "bfloat16")
    rows = {
        row["block"]: (row["pass"], {int(s): tuple(pair) for s, pair in row["at"].items()})
        for row in found["linear"]["rows"]
    }
    assert rows == TABLE
    assert found["conv2d"]["blocks"] == [32, 64] and found["conv2d"]["pass"] == "step"
    assert {int(s): pair[0] for s, pair in found["conv2d"]["at"].items()} == {80: 1.8, 90: 3}
    factors = {peer["peer"]: (peer["factor"], peer["blocks"]) for peer in found["peers"]}
    assert factors == {
        "torch bsr_dense_addmm": (2, [32, 64]),
        "torch sampled_addmm": (5, [32, 64]),
        "blksprs": (5, [32, 64]),
        "stk": (1, [128]),
    }
    assert found["conv2d"]["shapes"] == [f"128x{c}x{h}x{h}->{c} 3x3" for c, h in ((160, 32), (320, 16), (640, 8))]
    assert found["dispatch"] == {"share": 0.03, "least_s": 1e-3} and found["topology_update"] == {"share": 0.05}
    assert found["nets"]["within"] == found["accuracy"]["within"] == 0.03
    assert found["never_slower"]["within"] == 0.03 and found["metadata"] == {"block": 32, "share": 0.02}


def pass_bench(block: int, pass_: str, sparsity: int, speedup: float, **changes: Any) -> dict[str, Any]:
    info = {
        **{"kind": "pass", "op": "linear", "pass_": pass_, "shape": "8192x4096->4096", "memory_format": "row-major"},
        **{"block": block, "sparsity": sparsity, "density": 1 - sparsity / 100, "dtype": "bfloat16", "threads": 1},
        **{"backend": "triton", "bias": True, "dense_median_s": 4e-4, "sparse_median_s": 4e-4 / speedup},
        **{"speedup": speedup, "speedup_q1": speedup, "speedup_q3": speedup, "gflops": 1e5, "dense_gflops": 7e5},
        **{"gbytes_per_s": 1e3, "max_error": 2e-3, "neighbours": 0.0, "device": "cuda", "mode": "auto"},
        **{"error_bound": 2**-8 + 1e-5, "index_bytes": 16, "value_bytes": 2 * block * block},
        **{"dense_wall_s": 5e-4, "sparse_wall_s": 3e-4, "dense_graph_s": 4e-4, "sparse_graph_s": 4e-4 / speedup / 1.1},
        **{"dense_peak_bytes": 1 << 26, "sparse_peak_bytes": 1 << 25},
        **changes,
    }
    return {"name": f"{block}-{pass_}-{sparsity}-{info['mode']}", "extra_info": info, "stats": {"rounds": 50}}


def peer_bench(block: int, pass_: str, speedup: float, peers: dict[str, float], **failed: str) -> dict[str, Any]:
    bench = pass_bench(block, pass_, 90, speedup, kind="peers")
    bench["extra_info"] |= {
        "peers": {n: {"median_s": 1e-3, "speedup": s} for n, s in peers.items()},
        "failed_peers": failed,
    }
    return bench


def results_file(path: Path, *benches: dict[str, Any]) -> Path:
    gpu_facts = {"name": "NVIDIA H200", "capability": "9.0", "sms": 132, "memory": 150 << 30, "l2": 60 << 20}
    content = {
        "benchmarks": list(benches),
        "machine_info": {"cpu": "a", "torch": "2.11.0", "gpu": {**gpu_facts, "cuda": "13.0", "triton": "3.6.0"}},
        "sparsekern_run": {"format": 1, "suite": "gpu-full", "load_average_start": None, "neighbours": None},
        "datetime": "2026-01-01T00:00:00",
    }
    path.write_text(json.dumps(content))
    return path


def judged(tmp_path: Path, *benches: dict[str, Any]) -> dict[str, verdict.Line]:
    lines = verdict.judge(load([results_file(tmp_path / "rows.json", *benches)]), verdict.targets())
    return {line.what: line for line in lines}


def test_a_miss_shows_as_a_miss(tmp_path: Path) -> None:
    lines = judged(
        tmp_path,
        pass_bench(64, "step", 90, 3.79),
        pass_bench(64, "step", 80, 2.0),
        pass_bench(64, "step", 95, 8.0),
        pass_bench(64, "forward", 90, 99.0),  # not what the target asks for
    )
    where = "linear 8192x4096->4096, block 64, forward and backward, "
    assert [lines[f"{where}{s} %"].verdict for s in (50, 80, 90, 95)] == ["not measured", "must", "MISS", "stretch"]
    assert lines[f"{where}90 %"].graph == pytest.approx(3.79 * 1.1)
    table = verdict.markdown(list(lines.values()))
    assert f"| {where}90 % | 3.80 | 4.80 | 3.79 | **MISS** | 4.17 |" in table
    assert table.count("MISS") == 1
    assert verdict.counts(list(lines.values())).startswith("1 stretch, ")


def test_the_dispatched_row_decides_and_a_wrong_one_never_passes(tmp_path: Path) -> None:
    lines = judged(
        tmp_path,
        pass_bench(32, "forward", 50, 0.6, mode="triton"),
        pass_bench(32, "forward", 50, 1.0, backend="dense"),
        pass_bench(32, "forward", 90, 2.5, mode="triton"),
        pass_bench(32, "forward", 95, 9.0, max_error=0.5),
        pass_bench(32, "forward", 80, 9.0, device="cpu"),
        pass_bench(16, "forward", 90, 9.0, dtype="float16"),
    )
    where = "linear 8192x4096->4096, block 32, forward, "
    chosen = lines[f"{where}50 %"]
    assert (chosen.verdict, chosen.measured, chosen.forced, chosen.note) == ("must", 1.0, 0.6, "dense")
    assert (lines[f"{where}90 %"].verdict, lines[f"{where}90 %"].note) == ("must", "Triton forced")
    assert lines[f"{where}95 %"].verdict == "MISS" and "wrong result" in lines[f"{where}95 %"].note
    assert lines[f"{where}80 %"].verdict == "not measured"
    assert lines["linear 8192x4096->4096, block 16, forward, 90 %"].verdict == "not measured"


def test_peers_are_beaten_at_every_row_or_not_at_all(tmp_path: Path) -> None:
    lines = judged(
        tmp_path,
        peer_bench(32, "forward", 3.0, {"torch bsr_dense_addmm": 1.0, "blksprs": 0.3}),
        peer_bench(32, "dgrad", 3.0, {"torch bsr_dense_addmm": 1.6}, blksprs="out of memory"),
        peer_bench(128, "forward", 5.0, {"stk": 5.0}),
        peer_bench(64, "forward", 5.0, {}, blksprs="is not installed"),
    )
    bsr = lines["over torch bsr_dense_addmm, block 32"]
    assert bsr.verdict == "MISS" and bsr.measured == pytest.approx(1.875) and "least of 2 rows" in bsr.note
    assert lines["over blksprs, block 32"].verdict == "must"
    assert lines["over blksprs, block 64"].verdict == "not measured"
    assert lines["over blksprs, block 64"].note == "is not installed"
    assert lines["over stk, block 128"].verdict == "must"


def test_never_slower_looks_at_dispatched_rows(tmp_path: Path) -> None:
    name = "never slower than dense, least speed-up of the rows as dispatched"
    good = judged(tmp_path, pass_bench(32, "dgrad", 50, 0.98), pass_bench(32, "dgrad", 50, 0.5, mode="triton"))[name]
    bad = judged(tmp_path, pass_bench(32, "dgrad", 50, 0.96), pass_bench(32, "dgrad", 90, 2.0))[name]
    assert (good.verdict, bad.verdict) == ("must", "MISS")
    assert bad.note.startswith("1 of 2 rows below; worst: linear 8192x4096->4096 dgrad, block 32, 50 %")


def net_bench(mode: str, contender: str, speedup: float, **changes: Any) -> dict[str, Any]:
    sparse = contender == "sparse"
    info = {
        **{"kind": "net", "net": "wrn-28-10", "batch": 128, "contender": contender, "mode": mode, "pass_": "step"},
        **{"block": 32 if sparse else 0, "sparsity": 90 if sparse else 0, "allocation": "erk" if sparse else ""},
        **{"median_s": 0.04 / speedup, "dense_median_s": 0.04, "speedup": speedup, "speedup_q1": speedup},
        **{"speedup_q3": speedup, "wall_s": 0.05, "ideal": 2.5 if sparse else None, "params": 4, "macs": 5},
        **{"peak_bytes": 1 << 30, "parts_s": {"convolutions": 0.01, "norms": 0.02}, "layers": {"sparse": 25}},
        **{"optimizers_s": {"fused": 1e-4, "foreach": 2e-4}, "device": "cuda", "dtype": "bfloat16"},
        **changes,
    }
    return {"name": f"{contender}-{mode}", "extra_info": info, "stats": {"rounds": 5}}


def accuracy_bench(contender: str, test_acc: float, seconds: float) -> dict[str, Any]:
    info = {
        **{"kind": "accuracy", "net": "wrn-16-8", "data": "cifar10", "contender": contender, "block": 32},
        **{"sparsity": 90 if contender == "sparse" else 0, "epochs": 12.0, "batch": 128, "test_acc": test_acc},
        **{"seconds": seconds, "step_s": 0.02, "params": 4, "macs": 5, "layers": {"sparse": 9}, "device": "cuda"},
    }
    return {"name": contender, "extra_info": info, "stats": {"rounds": 1}}


def overhead_bench(what: str, share: float, base_s: float, **changes: Any) -> dict[str, Any]:
    info = {
        **{"kind": "overhead", "what": what, "op": "linear", "shape": "8192x8192->8192", "pass_": "step"},
        **{"block": 32, "sparsity": 80, "seconds": share * base_s, "base_s": base_s, "share": share},
        **{"backend": "triton", "device": "cuda", **changes},
    }
    return {"name": f"{what}-{info['shape']}", "extra_info": info, "stats": {"rounds": 1}}


def test_convolutions_are_held_to_their_targets(tmp_path: Path) -> None:
    conv = {"op": "conv2d", "shape": "128x160x32x32->160 3x3", "memory_format": "nhwc"}
    lines = judged(
        tmp_path,
        pass_bench(32, "step", 80, 1.79, **conv),
        pass_bench(64, "step", 90, 3.2, **conv),
        pass_bench(64, "step", 80, 2.0, **conv, mode="triton"),
    )
    where = "conv2d 128x160x32x32->160 3x3, block "
    assert lines[f"{where}32, forward and backward, 80 %"].verdict == "MISS"
    assert lines[f"{where}64, forward and backward, 90 %"].verdict == "must"
    assert lines[f"{where}64, forward and backward, 80 %"].note == "Triton forced"
    assert lines[f"{where}32, forward and backward, 90 %"].verdict == "not measured"


def test_whole_nets_must_not_lose(tmp_path: Path) -> None:
    rows = [net_bench("eager", "sparse", 0.9), net_bench("eager", "narrow", 1.4), net_bench("graph", "sparse", 1.6)]
    lines = judged(tmp_path, *rows, net_bench("compile", "sparse", 0.5), net_bench("eager", "dense", 1.0))
    eager, graph = (lines[f"net wrn-28-10, {mode}, training step, block 32, erk"] for mode in ("eager", "graph"))
    assert (eager.verdict, eager.note) == ("MISS", "Amdahl's bound 2.50; narrow dense 1.40")
    assert (graph.verdict, graph.measured) == ("must", 1.6)
    assert lines["net wrn-28-10, eager, training step, block 64, erk"].verdict == "not measured"
    assert not any("compile" in what for what in lines), "compiled nets are outside the promise"


def test_accuracy_and_time_of_real_training(tmp_path: Path) -> None:
    found = judged(tmp_path, accuracy_bench("dense", 0.9, 200.0), accuracy_bench("sparse", 0.86, 150.0))
    where = "wrn-16-8 on cifar10, 12.0 epochs, "
    accuracy = found[f"{where}test accuracy over the dense net's"]
    assert accuracy.verdict == "MISS" and accuracy.measured == pytest.approx(0.86 / 0.9)
    assert accuracy.note == "86.00 % and dense 90.00 %"
    run = found[f"{where}training run, seconds of dense / seconds of sparse"]
    assert run.verdict == "must" and run.measured == pytest.approx(200 / 150)
    alone = judged(tmp_path, accuracy_bench("sparse", 0.86, 150.0))
    assert alone["test accuracy over the dense net's"].verdict == "not measured"


def test_overheads_are_judged_by_the_worst_of_large_layers(tmp_path: Path) -> None:
    lines = judged(
        tmp_path,
        overhead_bench("dispatch", 0.02, 2e-3),
        overhead_bench("dispatch", 0.5, 2e-4, shape="small"),
        overhead_bench("topology update", 0.04, 0.1),
        overhead_bench("topology update", 0.06, 0.1, shape="other"),
    )
    dispatch = lines["kernels launched directly / through dispatch, layers of 1 ms and more"]
    assert dispatch.verdict == "must" and dispatch.note == "most 2.0 %: linear 8192x8192->8192 step, block 32, 80 %"
    update = lines["100 training steps / one topology update"]
    assert update.verdict == "MISS" and "other" in update.note
    slow = judged(tmp_path, overhead_bench("dispatch", 0.04, 2e-3))
    assert slow["kernels launched directly / through dispatch, layers of 1 ms and more"].verdict == "MISS"


def test_layouts_are_weighed(tmp_path: Path) -> None:
    name = "bytes of the values / bytes of the layout, block 32"
    assert judged(tmp_path, pass_bench(32, "step", 90, 2.0))[name].verdict == "must"
    heavy = judged(tmp_path, pass_bench(32, "step", 90, 2.0, index_bytes=42))[name]
    assert heavy.verdict == "MISS" and heavy.measured == pytest.approx(2048 / 42)


def test_summary_joins_slices_and_survives_bad_ones(tmp_path: Path) -> None:
    results_file(tmp_path / "gate-64.json", pass_bench(64, "step", 90, 3.0, mode="triton"))
    cut_off = {"name": "cut off", "extra_info": {}, "stats": {}}
    results_file(tmp_path / "full-64.json", pass_bench(64, "step", 90, 4.0), cut_off)
    (tmp_path / "torn.json").write_text('{"benchmarks": [')
    results_file(tmp_path / "empty.json")
    figure = {"name": "L2 to shared memory, tma", "value": 6.5e12, "unit": "bytes/s", "config": "8 warps", "others": {}}
    files.write_json(tmp_path / "probe-l2.json", {"figures": [figure], "failed": {"gather 16": "no"}})
    state = State(tmp_path, rehearsal=False)
    state.set(chunk("peers-32"), status="failed", seconds=3.0, note="boom | bang", tail=["Traceback", "boom"])
    good, bad = row_files(tmp_path)
    assert {path.name for path in good} == {"gate-64.json", "full-64.json"} and len(bad) == 2
    assert "cut off" in "".join(bad) and "empty.json" in "".join(bad)
    counted = summarise(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert counted.startswith("0 stretch, 2 must, 0 MISS") and counted in page
    assert "| 3.80 | 4.80 | 4.00 | must | 4.40 | 3.00 | triton |" in page
    assert "6.50 TB/s" in page and "gather 16: no" in page and "**failed**" in page and "boom / bang" in page
    assert "Rehearsal" not in page
    report = (tmp_path / "report" / "report.md").read_text()
    assert "NVIDIA H200, sm 9.0, 132 SMs, 150 GiB, 60 MiB L2" in report and "graph speed-up" in report


def test_a_rehearsal_says_so(tmp_path: Path) -> None:
    State(tmp_path, rehearsal=True).set(chunk("smoke"), status="ok", seconds=1.0, note="fine")
    summarise(tmp_path)
    assert "Rehearsal on the interpreter: the numbers mean nothing" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(4.31e12, "bytes/s", "4.31 TB/s"), (2.5e-6, "s", "2.50 us"), (7.9e14, "FLOP/s", "790 TFLOP/s"), (0, "s", "0 ns")],
)
def test_prefixes(value: float, unit: str, text: str) -> None:
    assert with_prefix(value, unit) == text


# -- shards ------------------------------------------------------------------------------------------------------------

SUITE = """
import pytest
@pytest.mark.parametrize("i", range(7))
def test_it(i):
    assert i != %d
"""


def _shards(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_suite.py").write_text(text)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n    no_poison: x\n")
    arguments = ["3", str(tmp_path / "logs"), "--", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.shards", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_shards_run_every_test_once(tmp_path: Path) -> None:
    done = _shards(tmp_path, SUITE % 9)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("7 passed in 3 processes, 0 of them failed")
    logs = sorted((tmp_path / "logs").iterdir())
    assert [shards.counts(path.read_text())["passed"] for path in logs] == [3, 2, 2]


def test_a_failure_in_a_shard_is_shown_and_fails_all(tmp_path: Path) -> None:
    done = _shards(tmp_path, SUITE % 4)
    assert done.returncode == 1
    assert "-- shard-2, exit status 1:" in done.stdout and "test_it[4]" in done.stdout
    assert "6 passed, 1 failed in 3 processes, 1 of them failed" in done.stdout.splitlines()[-1]


def test_counts_of_a_summary() -> None:
    assert shards.counts("x\n==== 1 failed, 12 passed, 2 errors in 3.1s ====\n") == {
        "failed": 1,
        "passed": 12,
        "error": 2,
    }
    assert shards.counts("Segmentation fault") == {}


# -- the command -------------------------------------------------------------------------------------------------------


def _command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})


def test_needs_a_gpu_or_a_rehearsal(tmp_path: Path) -> None:
    done = _command("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "--dry-run" in done.stderr and not list(tmp_path.iterdir())


def test_the_plan_is_shown_without_a_gpu(tmp_path: Path) -> None:
    done = _command("--plan", "--only", "gate-*,conv-gate-*", "--out", str(tmp_path / "none"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("slice 1: about 420 s, 7 min in all") and "conv-gate-32" in done.stdout
    assert not (tmp_path / "none").exists()


def test_rehearsal_of_two_chunks(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out, archive = tmp_path / "out", tmp_path / "kept.tar.gz"
    only = (
        "--dry-run",
        "--only",
        "probe-memory,gate-16",
        "--archive",
        str(archive),
        "--wheels",
        str(tmp_path / "none"),
    )
    done = _command(*only, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = load([out / "gate-16.json"]).passes
    assert rows and {row.dtype for row in rows} == {"bfloat16"} and {row.device for row in rows} == {"cpu"}
    probe = json.loads((out / "probe-memory.json").read_text())
    assert {figure["unit"] for figure in probe["figures"]} == {"bytes/s", "s"}
    assert "Rehearsal" in (out / "README.md").read_text()
    with tarfile.open(archive) as content:
        assert {"state.json", "gate-16.json", "README.md"} <= set(content.getnames())
    again = _command(*only, "--out", str(tmp_path / "elsewhere"), "--list")
    lines = {
        line.split()[0]: line.split()[1] for line in again.stdout.splitlines() if line.startswith(("gate", "probe"))
    }
    assert lines == {"probe-memory": "ok", "gate-16": "ok"}, "the archive carries a run to another folder"


# -- wheels ------------------------------------------------------------------------------------------------------------


def _wheel(folder: Path, requires: list[str]) -> Path:
    path = folder / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = ["Metadata-Version: 2.1", "Name: some-package", "Version: 1.0"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        archive.writestr("some_package-1.0.dist-info/METADATA", "\n".join(lines))
        archive.writestr(
            "some_package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr("some_package-1.0.dist-info/RECORD", "")
        archive.writestr("some_package.py", "VALUE = 7\n")
    return path


def test_needs_of_a_wheel(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, ["py-cpuinfo2", "torch>=2.8", "Some_Thing (>1)", "black; extra == 'dev'"])
    assert wheels.needs(wheel) == ["py-cpuinfo2", "some-thing"]


def test_a_bad_wheel_costs_only_itself(tmp_path: Path) -> None:
    _wheel(tmp_path, [])
    (tmp_path / "bad-1.0-py3-none-any.whl").write_bytes(b"no zip")
    outcome = wheels.install(tmp_path, tmp_path / "site")
    assert outcome["some_package-1.0-py3-none-any.whl"] == "installed"
    assert outcome["bad-1.0-py3-none-any.whl"].startswith("not installed")
    assert (tmp_path / "site" / "some_package.py").exists()


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert files.read_json(path) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["a.json"]
    assert files.read_json(tmp_path / "missing.json") is None


# -- the CUDA toolkit --------------------------------------------------------------------------------------------------


def test_primitives_are_compared_with_the_emulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rehearsal compiles the emulation; a wrong record of it is told and fails the chunk."""
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["cuda_primitives", "--device", "cpu", "--out", str(out)])
    cuda_primitives.main()
    found = json.loads(out.read_text())
    assert found["agree"] is True and found["differences"] == [] and found["found"]["source"] == "emulation"
    copy = tmp_path / "emulation"
    shutil.copytree(cuda_primitives.FOLDER, copy)
    record = json.loads((copy / "primitives.json").read_text())
    name = next(name for name in record if name.startswith("words"))
    record[name][0] ^= 1
    (copy / "primitives.json").write_text(json.dumps(record))
    monkeypatch.setattr(cuda_primitives, "FOLDER", copy)
    with pytest.raises(SystemExit, match="1 lists differ"):
        cuda_primitives.main()
    assert json.loads(out.read_text())["agree"] is False


def test_the_right_compiler_is_asked_for_the_right_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "nvcc", lambda: "/somewhere/nvcc")
    for capability, arch in (((8, 0), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")):
        monkeypatch.setattr(toolkit.torch.cuda, "get_device_capability", lambda c=capability: c)
        command = cuda_primitives.compile_command("cuda", Path("program"))
        assert command[0] == "/somewhere/nvcc" and f"-arch={arch}" in command and "-DSK_EMULATE" not in command
    monkeypatch.setattr(toolkit.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert cuda_build.environment() == {"TORCH_CUDA_ARCH_LIST": "10.0"}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert cuda_build.environment() == {"TORCH_CUDA_ARCH_LIST": "8.0"}


@pytest.mark.parametrize("carried", [True, False])
def test_without_nvcc_only_a_carried_build_will_do(carried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise toolkit.Missing("nvcc was not found")

    monkeypatch.setattr(toolkit, "nvcc", none)
    monkeypatch.setattr(cuda_build, "missing", lambda: "" if carried else "built without CUDA kernels")
    monkeypatch.setattr(cuda_build, "install", lambda mode, *rest: "" if mode == "auto" else pytest.fail("can't build"))
    if carried:
        assert cuda_build.build("cuda")["built"] is False
        assert gpu.build_native({}, False).startswith("left as it is: it has CUDA kernels")
    else:
        with pytest.raises(SystemExit, match="cuda-build: nvcc was not found"):
            cuda_build.build("cuda")
        assert gpu.build_native({}, False) == "built"


def test_a_failed_build_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_build, "install", lambda mode: "ptxas: out of registers")
    for reason in ("built without CUDA kernels", ""):  # an older build may still be there
        monkeypatch.setattr(cuda_build, "missing", lambda reason=reason: reason)
        with pytest.raises(SystemExit, match="cuda-build: ptxas: out of registers"):
            cuda_build.build("cuda")
    monkeypatch.setattr(cuda_build, "install", lambda mode: "")
    assert cuda_build.build("cuda")["built"] is True


def test_the_sanitizer_is_told_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "memcheck.json"
    monkeypatch.setattr(sys, "argv", ["cuda_sanitize", "memcheck", "--device", "cpu", "--out", str(out)])

    def none() -> str:
        raise toolkit.Missing("compute-sanitizer was not found")

    monkeypatch.setattr(toolkit, "sanitizer", none)
    cuda_sanitize.main()
    assert "was not found" in json.loads(out.read_text())["skipped"]


@pytest.mark.parametrize(("code", "lines", "fails"), [(0, 2, False), (9, 2, True), (0, 0, True)])
def test_what_a_sanitizer_finds_fails_the_chunk(
    code: int, lines: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "tool"
    ran = "".join('echo \'{"ran": "x", "difference": 0.0}\'\n' for _ in range(lines))
    tool.write_text(f"#!/bin/sh\n{ran}echo '========= ERROR SUMMARY: {code} errors'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(toolkit, "sanitizer", lambda: str(tool))
    monkeypatch.setattr(
        sys, "argv", ["cuda_sanitize", "memcheck", "--device", "cuda", "--out", str(tmp_path / "out.json")]
    )
    if fails:
        with pytest.raises(SystemExit, match=f"exit status {code} after {lines} kernels"):
            cuda_sanitize.main()
    else:
        cuda_sanitize.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["code"], len(found["ran"])) == (code, lines) and "ERROR SUMMARY" in found["output"][-1]


# -- families of kernels side by side ----------------------------------------------------------------------------------


def family_row(**families: Any) -> dict[str, Any]:
    row = {"op": "linear", "pass": "forward", "shape": "8x8->8", "dtype": "bfloat16", "block": 32, "sparsity": 90}
    return {**row, "dense_s": 30e-6, "families": families, "peers": {"stk": 20e-6, "blksprs": 15e-6}}


def test_families_stand_side_by_side(tmp_path: Path) -> None:
    timed = {"kernel": "k", "seconds": 12e-6, "predicted_s": 10e-6, "measured": 3, "skipped": {}}
    faster = {**timed, "kernel": "stationary plan", "seconds": 8e-6}
    absent = {"measured": 0, "skipped": {"plan": "RuntimeError: no kernel image"}}
    rows = [family_row(triton=timed, cuda=faster), family_row(triton=timed, cuda=absent)]
    content = {"kind": "families", "rows": rows, "failed": [{"case": "big", "why": "out of memory"}]}
    files.write_json(tmp_path / "families-linear.json", content)
    lines = family_lines(tmp_path)
    assert "| 30.0 us | 12.0 us (10.0 us) | 8.00 us (10.0 us) | 1.50 | blksprs 15.0 us | stationary plan |" in lines[2]
    assert "not run: RuntimeError: no kernel image" in lines[3] and lines[-1] == "- big: out of memory"
    assert family_lines(tmp_path / "nothing") == ["Not measured."]


def test_families_are_measured_on_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "families.json"
    command = [sys.executable, "-m", "benchmarks.families", "linear", "--device", "cpu", "--out", str(out)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "SPARSEKERN_BACKEND": "triton"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert [row["pass"] for row in content["rows"]] == ["forward", "dgrad", "wgrad"] and content["failed"] == []
    for row in content["rows"]:
        assert row["families"]["triton"]["measured"] == 2 and row["families"]["cuda"]["measured"] == 0
        assert row["dense_s"] > 0 and row["families"]["triton"]["seconds"] > 0


def test_families_measure_the_gates_first() -> None:
    for kind, shape in (("linear", "8192x4096->4096"), ("conv2d", "128x160x32x32->160 3x3")):
        listed = list(families.cases(kind, (90, 80)))
        assert (listed[0][0].name, *listed[0][1:]) == (shape, 64, 90, "bfloat16")
        assert {case[1] for case in listed} == {16, 32, 64, 128} and {case[3] for case in listed} == {
            "bfloat16",
            "float32",
        }
        assert all(case[2] == 90 for case in listed if case[3] == "float32")
