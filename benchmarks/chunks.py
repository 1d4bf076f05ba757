"""The pieces of a run on a GPU, in order of importance: what each runs, how long it may take, what it leaves.

A chunk is a subprocess of its own: a hang or a CUDA error costs that chunk alone, and a run cut short goes on at the
next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.shapes import BLOCKS_GPU, CONV_GPU, LINEAR_GPU, LINEAR_GPU_MORE

# Test files in the order of doubt: kernels that no GPU has seen come first. Paths that do not exist are left out.
TESTS_FIRST = ("tests/test_triton_gpu.py", "tests/test_triton_linear.py", "tests/test_triton_conv2d.py", "tests/triton")
TESTS_REST = ("tests",)
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")
RESULT = "{result}"  # stands for the file a chunk writes


@dataclass(frozen=True)
class Chunk:
    """One subprocess.

    Attributes:
        command: arguments of Python; ``{result}`` stands for the file to write.
        result: name of that file in the output folder, "" for none.
        rows: whether it holds rows that the report reads.
        timeout_s: longest it may take.
        estimate_s: what it is assumed to take, to keep a budget; assumed until a run was seen.
        env: variables set for it; None removes one.
        skip: why it can't run here, or "".
        empty_ok: pytest finding no tests is no failure.
    """

    name: str
    command: tuple[str, ...]
    result: str = ""
    rows: bool = False
    timeout_s: float = 300.0
    estimate_s: float = 60.0
    env: dict[str, str | None] = field(default_factory=dict)
    skip: str = ""
    empty_ok: bool = False

    @property
    def digest(self) -> str:
        """Changes with what the chunk runs: a finished chunk of another digest is run again."""
        facts = asdict(self)
        for detail in ("timeout_s", "estimate_s", "skip"):
            del facts[detail]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Settings:
    """What shapes a plan.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal on Triton's interpreter.
        triton: whether the Triton backend is there to be forced.
        conv2d: why the Triton backend has no convolution, or "".
        tests: pytest arguments instead of the usual chunks of tests.
        workers: processes that share a chunk of tests, which mostly wait for compilers; 0 for one without pytest-xdist.
    """

    device: str = "cuda"
    triton: bool = True
    conv2d: str = ""
    tests: tuple[str, ...] = ()
    workers: int = 0
    root: Path = field(default_factory=lambda: Path(__file__).resolve().parent.parent)

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


def plan(settings: Settings) -> list[Chunk]:
    """All chunks, the most important first."""
    chunks = [
        _module("smoke", "benchmarks.smoke", settings, _forced(settings), timeout_s=240, estimate_s=60),
        *_tests(settings),
        *_probes(settings),
        *_gates(settings),
        _module("tune", "benchmarks.tune", settings, {}, timeout_s=360, estimate_s=250),
        *_full(settings),
        *_peers(settings),
        *_convolutions(settings),
    ]
    if settings.rehearsal:
        return [replace(chunk, estimate_s=10.0, timeout_s=120.0) for chunk in chunks]
    return chunks


def _forced(settings: Settings) -> dict[str, str | None]:
    """The Triton kernels whatever the dispatch would do; a rehearsal always forces them, as a CPU has its own."""
    return {"SPARSEKERN_BACKEND": "triton"} if settings.triton else {}


def _chosen(settings: Settings) -> dict[str, str | None]:
    """The backend that sparsekern chooses."""
    return {"SPARSEKERN_BACKEND": None}


def _module(
    name: str,
    module: str,
    settings: Settings,
    env: dict[str, str | None],
    arguments: Sequence[str] = (),
    *,
    timeout_s: float,
    estimate_s: float,
) -> Chunk:
    command = ("-m", module, *arguments, "--device", settings.device, "--out", RESULT)
    return Chunk(name, command, f"{name}.json", timeout_s=timeout_s, estimate_s=estimate_s, env=env)


def _tests(settings: Settings) -> list[Chunk]:
    if settings.rehearsal:
        only: tuple[str, ...] = ("--collect-only",)
    else:
        shared = ("-n", str(settings.workers)) if settings.workers else ()
        only = ("-o", "faulthandler_timeout=120", "--maxfail=30", *shared)
    if settings.tests:
        return [Chunk("tests", (*PYTEST, *only, *settings.tests), timeout_s=420, estimate_s=180, empty_ok=True)]
    first = [path for path in TESTS_FIRST if (settings.root / path).exists()]
    rest = ["-m", "gpu", "--continue-on-collection-errors", *(f"--ignore={path}" for path in first), *TESTS_REST]
    doubtful = [
        Chunk(
            Path(path).stem.replace("test_", "tests-").replace("_", "-"),
            (*PYTEST, *only, path),
            **{"timeout_s": 400, "estimate_s": 120, "empty_ok": True},
        )
        for path in first
    ]
    return [*doubtful, Chunk("tests-gpu", (*PYTEST, *only, *rest), timeout_s=300, estimate_s=60, empty_ok=True)]


def _probes(settings: Settings) -> list[Chunk]:
    estimates = {"l2": 100, "memory": 20, "gemm": 40, "ceiling": 30}
    return [
        _module(f"probe-{part}", "benchmarks.probes", settings, {}, (part,), timeout_s=240, estimate_s=seconds)
        for part, seconds in estimates.items()
    ]


def _rows(
    name: str,
    suite: str,
    arguments: Sequence[str],
    settings: Settings,
    env: dict[str, str | None],
    *,
    file: str = "test_linear",
    timeout_s: float = 300,
    estimate_s: float = 60,
    skip: str = "",
) -> Chunk:
    """Rows of a suite under pytest-benchmark; a rehearsal runs the toy suite instead."""
    options = ("--sk-suite", "gpu-toy" if settings.rehearsal else suite, "--sk-device", settings.device)
    command = (
        *PYTEST,
        f"benchmarks/{file}.py",
        *options,
        *arguments,
        "--benchmark-quiet",
        f"--benchmark-json={RESULT}",
    )
    return Chunk(name, command, f"{name}.json", True, timeout_s, estimate_s, env, skip)


def _gates(settings: Settings) -> list[Chunk]:
    """Kernels forced at 90 %, a chunk per block."""
    if settings.rehearsal:
        blocks, more = (32, 16), ("--sk-passes", "forward")
    else:
        blocks, more = BLOCKS_GPU, ()
    return [
        _rows(
            f"gate-{block}", "gpu-gate", ("--sk-blocks", str(block), *more), settings, _forced(settings), estimate_s=40
        )
        for block in blocks
    ]


def _full(settings: Settings) -> list[Chunk]:
    """As dispatched: all sparsities at the shape of the targets, a chunk per block; then the other shapes."""
    if settings.rehearsal:
        return [_rows("full-16", "gpu-full", ("--sk-blocks", "16"), settings, _forced(settings))]
    main = [
        _rows(
            f"full-{block}",
            "gpu-full",
            ("--sk-blocks", str(block), "--sk-shapes", LINEAR_GPU.name),
            settings,
            _chosen(settings),
            estimate_s=70,
        )
        for block in BLOCKS_GPU
    ]
    more = [
        _rows(
            f"shape-{shape.i}x{shape.o}",
            "gpu-full",
            ("--sk-shapes", shape.name),
            settings,
            _chosen(settings),
            estimate_s=60,
        )
        for shape in LINEAR_GPU_MORE
    ]
    forced = _rows(
        "forced",
        "gpu-full",
        ("--sk-shapes", LINEAR_GPU.name, "--sk-passes", "forward,step"),
        settings,
        _forced(settings),
        estimate_s=90,
    )
    return [*main, forced, *more]


def _peers(settings: Settings) -> list[Chunk]:
    blocks = (16,) if settings.rehearsal else (64, 32, 128, 16)
    env = _forced(settings) if settings.rehearsal else _chosen(settings)
    return [
        _rows(
            f"peers-{block}",
            "gpu-full",
            ("--sk-blocks", str(block)),
            settings,
            env,
            file="test_peers",
            timeout_s=420,
            estimate_s=120,
        )
        for block in blocks
    ]


def _convolutions(settings: Settings) -> list[Chunk]:
    if settings.rehearsal:
        return [_rows("conv2d", "gpu-full", (), settings, _forced(settings), file="test_conv2d", skip=settings.conv2d)]
    return [
        _rows(
            f"conv2d-{shape.c}",
            "gpu-full",
            ("--sk-shapes", shape.name),
            settings,
            _chosen(settings),
            file="test_conv2d",
            estimate_s=70,
            skip=settings.conv2d,
        )
        for shape in CONV_GPU
    ]
