"""How the speed benchmarks time, with a clock that the tests turn."""

from __future__ import annotations

import contextlib
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import device as on_device
from benchmarks import machine, peers, shapes
from benchmarks.machine import machine_info
from benchmarks.problems import conv_problem, linear_problem, random_layout, relative_error
from benchmarks.timing import CLOCK, MIN_ROUNDS, CudaTimer, Effort, race, sample, speedup


class Turned:
    """A timer whose time passes only inside contenders."""

    repeats_short = True

    def __init__(self) -> None:
        self.now = 0.0

    def prepare(self) -> None:
        self.now += 1000.0  # must never be counted

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start


class Pedantic:
    """What pytest-benchmark's fixture does in pedantic mode."""

    def __init__(self) -> None:
        self.samples: list[float] = []

    def pedantic(self, target: Any, rounds: int) -> None:
        for _ in range(rounds):
            start = CLOCK()
            target()
            self.samples.append(CLOCK() - start)


def _contenders(timer: Turned, **seconds: float) -> tuple[dict[str, Any], list[str]]:
    calls: list[str] = []

    def contender(name: str) -> Any:
        def call() -> None:
            calls.append(name)
            timer.now += seconds[name]

        return call

    return {name: contender(name) for name in seconds}, calls


def test_race_interleaves_and_records_the_hero() -> None:
    timer, benchmark = Turned(), Pedantic()
    contenders, calls = _contenders(timer, dense=0.2, sparse=0.05)
    times = race(benchmark, timer, contenders, hero="sparse", effort=Effort(rounds=4, budget_s=100))
    assert times["dense"] == pytest.approx([0.2] * 4) and times["sparse"] == pytest.approx([0.05] * 4)
    assert benchmark.samples == pytest.approx(times["sparse"])
    rounds = [calls[i : i + 2] for i in range(2, len(calls), 2)]  # after the warm-up
    assert rounds == [["sparse", "dense"], ["dense", "sparse"]] * 2


def test_race_averages_short_calls_and_keeps_the_budget() -> None:
    timer = Turned()
    contenders, calls = _contenders(timer, dense=0.5, sparse=1e-4)
    times = race(Pedantic(), timer, contenders, hero="sparse", effort=Effort(rounds=50, budget_s=2.6))
    assert len(times["dense"]) == 5
    assert calls.count("sparse") == 2 + 5 * 20 and times["sparse"] == pytest.approx([1e-4] * 5)
    times = race(Pedantic(), timer, contenders, hero="sparse", effort=Effort(rounds=50, budget_s=0.1))
    assert len(times["dense"]) == MIN_ROUNDS


def test_race_gives_every_gpu_sample_its_own_preparation() -> None:
    timer = Turned()
    timer.repeats_short = False
    contenders, calls = _contenders(timer, dense=1e-4, sparse=1e-5)
    times = race(Pedantic(), timer, contenders, hero="sparse", effort=Effort(rounds=4, budget_s=100))
    assert len(times["dense"]) == 4 and times["sparse"] == pytest.approx([1e-5] * 4, rel=1e-6)
    assert calls.count("sparse") == 2 + 4 and timer.now > 1000 * 2 * (2 + 4)


class FakeCuda:
    """The part of ``torch.cuda`` that the timer uses; a stream that remembers its order."""

    def __init__(self) -> None:
        self.queue: list[str] = []

    def _sleep(self, cycles: int) -> None:
        self.queue.append(f"sleep {cycles}")

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at = cuda, -1

    def record(self) -> None:
        self.at = len(self.cuda.queue)
        self.cuda.queue.append("event")

    def synchronize(self) -> None:
        self.cuda.queue.append("wait")

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)  # milliseconds


class FakeDevice(FakeCuda):
    """As much of ``torch.cuda`` as the figures beside device time need; ``captures`` says whether graphs work."""

    def __init__(self, captures: bool) -> None:
        super().__init__()
        self.captures, self.held, self.most = captures, 1000, 0
        self.stream = contextlib.nullcontext
        self.CUDAGraph = lambda: types.SimpleNamespace(replay=lambda: self.queue.append("replay"))

    def is_available(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.queue.append("synchronize")

    def current_stream(self) -> Any:
        return types.SimpleNamespace(wait_stream=lambda other: None)

    Stream = current_stream

    def graph(self, graph: Any) -> contextlib.AbstractContextManager[None]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return contextlib.nullcontext()

    def memory_allocated(self) -> int:
        return self.held

    def reset_peak_memory_stats(self) -> None:
        self.most = self.held

    def max_memory_allocated(self) -> int:
        return self.most


@pytest.mark.parametrize("captures", [True, False])
def test_figures_beside_device_time(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeDevice(captures)
    monkeypatch.setattr(on_device, "torch", types.SimpleNamespace(cuda=cuda))

    def call() -> None:
        cuda.queue.append("call")
        cuda.most = max(cuda.most, cuda.held + 300)

    found = on_device.beside("sparse", call, CudaTimer(cuda, l2_bytes=10))
    assert found["sparse_peak_bytes"] == 300 and found["sparse_wall_s"] > 0
    if captures:
        assert found["sparse_graph_s"] == pytest.approx(2e-3)
        assert cuda.queue.count("replay") == 1 + on_device.GRAPH_ROUNDS
    else:
        assert found["sparse_graph_failed"] == "RuntimeError: operation not permitted when stream is capturing"
        assert "sparse_graph_s" not in found
    assert on_device.beside("sparse", call, CudaTimer(cuda, l2_bytes=10), disabled=True) == {}


def test_cuda_timer_empties_l2_and_hides_launches() -> None:
    cuda = FakeCuda()
    timer = CudaTimer(cuda, l2_bytes=1000, spin_cycles=77)
    assert timer.scratch.numel() > 1000, "the write must not fit into L2"
    timer.scratch.fill_(1)
    seconds = sample(timer, lambda: cuda.queue.append("call"), 1)
    assert cuda.queue == ["sleep 77", "event", "call", "event", "wait"]
    assert not timer.scratch.any() and seconds == pytest.approx(2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pass_", shapes.PASSES)
def test_every_dtype_keeps_its_error_bound(pass_: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter rounds otherwise
    problem = linear_problem(shapes.LinearShape(32, 48, 32), 16, 50, "cpu", dtype)
    assert problem.operands.x.dtype == problem.values.dtype == dtype
    assert 0 < problem.error(pass_) <= problem.error_bound
    assert problem.error_bound == pytest.approx({torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0) + 1e-5)


def test_shapes_can_be_chosen_by_name() -> None:
    want = shapes.Selection("gpu-full", (1,), shapes=("8192x1024->1024",))
    assert {case.shape.name for case in shapes.linear_cases(want)} == {"8192x1024->1024"}


def test_gpu_peers_say_what_they_miss() -> None:
    problem = linear_problem(shapes.LinearShape(32, 32, 32, bias=False), 16, 50, "cpu", torch.bfloat16)
    for pass_, runs in (
        ("forward", {"masked dense (w * mask)"}),
        ("wgrad", set()),
        ("step", {"masked dense (w * mask)"}),
    ):
        calls, reasons = peers.ready(problem, pass_, peers.of_device("cpu", rehearse_gpu=True))
        assert set(calls) == runs
        assert all("CUDA" in reason or "blocks of 128" in reason for reason in reasons.values()), reasons


def test_race_disabled_runs_everything_once() -> None:
    timer = Turned()
    contenders, calls = _contenders(timer, dense=1e-4, sparse=1e-4, peer=1e-4)
    race(Pedantic(), timer, contenders, hero="sparse", effort=Effort(rounds=9, budget_s=9, disabled=True))
    assert sorted(calls) == ["dense", "peer", "sparse"]


def test_speedup_is_the_median_of_ratios() -> None:
    ratio = speedup([1.0, 10.0, 3.0], [1.0, 2.0, 1.0])  # a slow round slows both
    assert ratio == {"speedup": 3.0, "speedup_q1": 2.0, "speedup_q3": 4.0}
    assert speedup([2.0], [1.0]) == {"speedup": 2.0, "speedup_q1": 2.0, "speedup_q3": 2.0}


@pytest.mark.parametrize("suite", shapes.SUITES)
def test_cases_of_a_suite_are_distinct(suite: str) -> None:
    want = shapes.Selection(suite, (1, 2))
    for cases_of in (shapes.linear_cases, shapes.conv2d_cases, shapes.peer_cases, shapes.train_cases):
        ids = [case.id for case in cases_of(want)]
        assert len(ids) == len(set(ids))
    assert len({case.shape for case in shapes.linear_cases(want)}) == len(
        {case.shape.name for case in shapes.linear_cases(want)}
    )
    assert shapes.linear_cases(want) and shapes.conv2d_cases(want)


def test_cross_suite_holds_the_whole_product() -> None:
    want = shapes.Selection("cross", (1, 2))
    cells = {(c.block, c.sparsity, c.threads, c.pass_) for c in shapes.linear_cases(want) if c.shape == shapes.LINEAR}
    assert len(cells) == len(shapes.BLOCKS) * len(shapes.SPARSITIES) * 2 * len(shapes.PASSES)
    only = shapes.Selection("cross", (1,), blocks=(16,), sparsities=(90,), passes=("step",))
    assert {(c.block, c.sparsity, c.pass_) for c in shapes.conv2d_cases(only)} == {(16, 90, "step")}


def test_layout_has_the_exact_count() -> None:
    assert random_layout((64, 64), 8, 90).nnz == round(0.1 * 64)
    assert random_layout((64, 64), 64, 98).nnz == 1


def test_relative_error_sees_a_wrong_and_a_missing_number() -> None:
    want = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert relative_error(want.float(), want, want.abs()) == 0.0
    assert relative_error(torch.tensor([1.0, -1.9]), want, want.abs()) == pytest.approx(0.05, rel=1e-5)
    assert not relative_error(torch.tensor([1.0, float("nan")]), want, want.abs()) <= 1.0


@pytest.mark.parametrize("pass_", shapes.PASSES)
def test_error_check_catches_a_wrong_weight(pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = linear_problem(shapes.LinearShape(32, 32, 32), 8, 50)
    conv = conv_problem(shapes.ConvShape(2, 16, 16, 6), "nhwc", 8, 50)
    for problem in (linear, conv):
        assert problem.error(pass_) <= 1e-5
        # The reference is computed from other operands than those that the operator gets.
        with monkeypatch.context() as patch:
            if pass_ == "wgrad":
                want, absolute = problem.operands.wgrad_reference
                patch.setitem(problem.operands.__dict__, "wgrad_reference", (want * 1.001, absolute))
            else:
                to_dense = type(problem.layout).to_dense
                patch.setattr(
                    type(problem.layout), "to_dense", lambda self, values, f=to_dense: f(self, values) * 1.001
                )
            assert problem.error(pass_) > 1e-5


def test_machine_info_names_no_host_and_no_path() -> None:
    info = machine_info()
    assert info["torch"] == torch.__version__ and info["cores"] >= 1
    assert "node" not in info and str(Path.cwd()) not in json.dumps(info)


def test_nvidia_smi_leaves_out_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$2" in *,*|*nonsense*) echo "Field is not a valid field to query"; exit 2;; esac\n'
        'case "$2" in *power*) echo "[N/A]";; *) echo "1980 MHz";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.nvidia_smi(["clocks.sm", "nonsense", "power.draw"]) == {"clocks.sm": "1980 MHz"}
    tool.write_text('#!/bin/sh\necho "1980 MHz, P0, [N/A]"\n')
    assert machine.nvidia_smi(["clocks.sm", "pstate", "power.draw"]) == {"clocks.sm": "1980 MHz", "pstate": "P0"}
    monkeypatch.setenv("PATH", "")
    assert machine.nvidia_smi(["clocks.sm"]) == {}
