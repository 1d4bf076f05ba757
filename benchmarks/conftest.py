"""Options, fixtures and machine facts of the benchmarks; see results/README.md."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import adapters, machine, shapes
from benchmarks import device as on_device
from benchmarks.problems import Problem
from benchmarks.shapes import Case, Selection
from benchmarks.timing import CpuTimer, CudaTimer, Effort, Timer, race, speedup
from sparsekern.backends import GPU, forced

_CASES: dict[str, Callable[[Selection], list[Any]]] = {
    "linear_case": shapes.linear_cases,
    "conv2d_case": shapes.conv2d_cases,
    "peer_case": shapes.peer_cases,
    "train_case": shapes.train_cases,
    "topology_case": shapes.topology_cases,
}


_DTYPES = ("float32", "bfloat16", "float16")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsekern", "speed benchmarks")
    group.addoption("--sk-suite", choices=shapes.SUITES, default=None, help="which cases (default: quick)")
    group.addoption("--sk-rounds", type=int, default=None, help="most rounds per case (default: by suite)")
    group.addoption("--sk-budget-s", type=float, default=None, help="seconds per case, at least 3 rounds run")
    group.addoption("--threads", default=None, metavar="1,2", help="thread counts (default: 1,2; toy: 1)")
    group.addoption("--sk-blocks", default=None, metavar="16,32", help="block edges instead of the suite's")
    group.addoption("--sk-sparsities", default=None, metavar="80,90", help="percents instead of the suite's")
    group.addoption("--sk-device", choices=("cpu", "cuda"), default=None, help="default: cuda for the gpu suites")
    group.addoption("--sk-dtype", choices=_DTYPES, default=None, help="default: float32, bfloat16 for the gpu suites")
    group.addoption("--sk-shapes", default=None, metavar="8192x4096->4096", help="only these, by name, commas between")
    group.addoption("--sk-passes", default=None, metavar="forward,step", help="passes instead of the suite's")


def _numbers(text: str | None) -> tuple[int, ...] | None:
    return tuple(int(part) for part in text.split(",")) if text else None


def _disabled(config: pytest.Config) -> bool:
    return bool(config.getoption("benchmark_disable", False)) and not config.getoption("benchmark_enable", False)


def _selection(config: pytest.Config) -> Selection:
    suite = config.getoption("--sk-suite") or ("toy" if _disabled(config) else "quick")
    passes, names = config.getoption("--sk-passes"), config.getoption("--sk-shapes")
    on_cpu = suite in shapes.CPU_SUITES and config.getoption("--sk-device") != "cuda"
    try:
        blocks, sparsities = _numbers(config.getoption("--sk-blocks")), _numbers(config.getoption("--sk-sparsities"))
        threads = _numbers(config.getoption("--threads")) or ((1, 2) if on_cpu and suite != "toy" else (1,))
    except ValueError as error:
        raise pytest.UsageError(
            f"--threads, --sk-blocks, --sk-sparsities: expected 16,32 or the like, {error}"
        ) from None
    if passes and not set(passes.split(",")) <= set(shapes.PASSES):
        raise pytest.UsageError(f"--sk-passes: expected some of {','.join(shapes.PASSES)}, got {passes!r}")
    as_names = (tuple(text.split(",")) if text else None for text in (passes, names))
    return Selection(suite, threads, blocks, sparsities, *as_names)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, cases_of in _CASES.items():
        if name in metafunc.fixturenames:
            cases = cases_of(_selection(metafunc.config))
            metafunc.parametrize(name, cases, ids=[case.id for case in cases])


@pytest.fixture
def effort(request: pytest.FixtureRequest) -> Effort:
    config = request.config
    suite = _selection(config).suite
    rounds, budget = config.getoption("--sk-rounds"), config.getoption("--sk-budget-s")
    return Effort(
        shapes.ROUNDS[suite] if rounds is None else rounds,
        shapes.BUDGET_S[suite] if budget is None else budget,
        _disabled(config),
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where operands live: "cpu" or "cuda"."""
    config = request.config
    wish = config.getoption("--sk-device")
    found = wish or ("cuda" if _selection(config).suite in shapes.GPU_SUITES else "cpu")
    if found == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "--sk-device cuda: no CUDA device here; pass --sk-device cpu to rehearse the gpu suites"
        )
    torch.backends.cudnn.benchmark = found == "cuda"  # dense convolutions at their best
    return str(found)


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    config = request.config
    wish = config.getoption("--sk-dtype")
    found = getattr(torch, wish or ("bfloat16" if _selection(config).suite in shapes.GPU_SUITES else "float32"))
    assert isinstance(found, torch.dtype)
    return found


@pytest.fixture(scope="session")
def gpu_suite(request: pytest.FixtureRequest) -> bool:
    return _selection(request.config).suite in shapes.GPU_SUITES


@pytest.fixture(scope="session")
def timer(device: str) -> Timer:
    return CudaTimer() if device == "cuda" else CpuTimer()


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def gpu_figures(
    dense: Callable[[], object], sparse: Callable[[], object], timer: Timer, effort: Effort
) -> dict[str, Any]:
    """Figures beside device time of both contenders; taken before the race, which interleaves them."""
    return {
        **on_device.beside("dense", dense, timer, effort.disabled),
        **on_device.beside("sparse", sparse, timer, effort.disabled),
        "gpu_state": machine.gpu_state(),
    }


@pytest.fixture
def measure_pass(
    benchmark: Any, timer: Timer, effort: Effort, with_threads: Callable[[int], None]
) -> Callable[[Case, Problem], None]:
    """Time one row, dense against sparse, and note everything the report needs."""

    def run(case: Case, problem: Problem) -> None:
        with_threads(case.threads)
        calls = problem.calls(case.pass_)
        error = problem.error(case.pass_)
        extra = {} if problem.device == "cpu" else gpu_figures(calls.dense, calls.sparse, timer, effort)
        neighbours = machine.Neighbours()
        benchmark.group = f"{problem.op} {case.pass_}"  # read when the race starts
        contenders = {"dense": calls.dense, "sparse": calls.sparse}
        times = race(benchmark, timer, contenders, hero="sparse", effort=effort)
        median = {name: statistics.median(samples) for name, samples in times.items()}
        ratio = speedup(times["dense"], times["sparse"])
        benchmark.extra_info.update(
            kind="pass",
            op=problem.op,
            pass_=case.pass_,
            shape=case.shape.name,
            memory_format=case.memory_format,
            block=case.block,
            sparsity=case.sparsity,
            density=problem.density,
            dtype=str(problem.dtype).removeprefix("torch."),
            device=problem.device,
            mode=forced(),
            threads=case.threads,
            backend=problem.backend,
            bias=case.shape.bias,
            dense_median_s=median["dense"],
            sparse_median_s=median["sparse"],
            **ratio,
            of_ideal=ratio["speedup"] * problem.density,
            gflops=problem.flops(case.pass_) / median["sparse"] / 1e9,
            dense_gflops=problem.flops(case.pass_) / problem.density / median["dense"] / 1e9,
            gbytes_per_s=problem.bytes_moved(case.pass_) / median["sparse"] / 1e9,
            max_error=error,
            neighbours=neighbours.cores(),
            error_bound=problem.error_bound,
            index_bytes=problem.layout.index.numel() * problem.layout.index.element_size(),
            value_bytes=problem.values.numel() * problem.values.element_size(),
            choices=adapters.choices(problem, case.pass_, forced() == "auto") if problem.backend in GPU else {},
            **extra,
        )
        assert error <= problem.error_bound, f"expected an error of at most {problem.error_bound}, got {error}"

    return run


# -- machine facts -----------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SESSION] = (machine.Neighbours(), machine.load_average())


_SESSION = pytest.StashKey[tuple[machine.Neighbours, "list[float] | None"]]()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # drops the host name, which says nothing about speed
    machine_info.update(machine.machine_info())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    neighbours, load = config.stash[_SESSION]
    output_json["sparsekern_run"] = {
        "format": 1,
        "suite": _selection(config).suite,
        "load_average_start": load,
        "load_average_end": machine.load_average(),
        "neighbours": neighbours.cores(),
        "cpu_count": os.cpu_count(),
    }
    for bench in output_json["benchmarks"]:
        bench["params"] = bench["param"]  # the case objects; every field of theirs is in extra_info
