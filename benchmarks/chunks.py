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

from benchmarks.shapes import BLOCKS_GPU, CONV_GPU_SETS, LINEAR_GPU, LINEAR_GPU_MORE

# Test files in the order of doubt: kernels that no GPU has seen come first. Paths that do not exist are left out.
TESTS_FIRST = ("tests/test_triton_gpu.py", "tests/test_triton_linear.py", "tests/test_triton_conv2d.py", "tests/triton")
TESTS_CUDA = "tests/test_cuda_gpu.py"
CUDA_BUILD = "cuda-build"  # the chunk that other chunks of the CUDA kernels need
TESTS_REST = ("tests",)
OTHER_TILES = "other_tiles"  # tests of tiles that no default takes, by the thousand
TILE_TESTS = TESTS_FIRST[0]
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")
RESULT = "{result}"  # stands for the file a chunk writes
LOGS = "{logs}"  # stands for a folder for more output than one log


@dataclass(frozen=True)
class Chunk:
    """One subprocess.

    Attributes:
        command: arguments of Python; ``{result}`` stands for the file to write, ``{logs}`` for a folder of logs.
        result: name of that file in the output folder, "" for none.
        rows: whether it holds rows that the report reads.
        timeout_s: longest it may take.
        estimate_s: what it is assumed to take, to keep a budget; assumed until a run was seen.
        env: variables set for it; None removes one.
        skip: why it can't run here, or "".
        empty_ok: pytest finding no tests is no failure.
        needs: a chunk that has to have succeeded before, or "".
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
    needs: str = ""

    @property
    def digest(self) -> str:
        """Changes with what the chunk runs: a finished chunk of another digest is run again."""
        facts = asdict(self)
        for detail in ("timeout_s", "estimate_s", "skip", "needs"):
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
        workers: processes that share a chunk of tests, which mostly wait for compilers; 0 for no sharing.
        xdist: whether pytest-xdist shares them out, else ``benchmarks.shards``.
        data: folder of CIFAR-10 (or several, commas between), "" for none.
    """

    device: str = "cuda"
    triton: bool = True
    conv2d: str = ""
    tests: tuple[str, ...] = ()
    workers: int = 0
    xdist: bool = False
    data: str = ""
    root: Path = field(default_factory=lambda: Path(__file__).resolve().parent.parent)

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


def plan(settings: Settings) -> list[Chunk]:
    """All chunks, the most important first."""
    tests, last_tests = _test_chunks(settings)
    chunks = [
        _module("cuda-primitives", "benchmarks.cuda_primitives", settings, {}, timeout_s=180, estimate_s=40),
        _module(CUDA_BUILD, "benchmarks.cuda_build", settings, {}, timeout_s=420, estimate_s=120),
        _module("smoke", "benchmarks.smoke", settings, _forced(settings), timeout_s=240, estimate_s=90),
        *_cuda_smoke(settings),
        *tests,
        *_sanitizers(settings),
        *_probes(settings),
        *_gates(settings),
        *_conv_gates(settings),
        *_cuda_gates(settings),
        *_families(settings),
        *_nets(settings),
        _module("tune", "benchmarks.tune", settings, {}, timeout_s=360, estimate_s=250),
        *_full(settings),
        _module("overheads", "benchmarks.overheads", settings, _default(settings), timeout_s=240, estimate_s=60),
        *_accuracy(settings),
        *_peers(settings),
        *_convolutions(settings),
        *last_tests,
    ]
    if settings.rehearsal:
        return [replace(chunk, estimate_s=15.0, timeout_s=200.0) for chunk in chunks]
    return chunks


def _forced(settings: Settings) -> dict[str, str | None]:
    """The Triton kernels whatever the dispatch would do; a rehearsal always forces them, as a CPU has its own."""
    return {"SPARSEKERN_BACKEND": "triton"} if settings.triton else {}


def _chosen(settings: Settings) -> dict[str, str | None]:
    """The backend that sparsekern chooses."""
    return {"SPARSEKERN_BACKEND": None}


def _cuda(settings: Settings) -> dict[str, str | None]:
    """The CUDA kernels whatever the dispatch would do; they have no interpreter to rehearse on."""
    return {} if settings.rehearsal else {"SPARSEKERN_BACKEND": "cuda"}


NO_REHEARSAL = "the CUDA kernels need a GPU"


def _of_cuda(chunk: Chunk, settings: Settings) -> Chunk:
    """A chunk that runs the CUDA kernels."""
    return replace(chunk, needs=CUDA_BUILD, skip=NO_REHEARSAL if settings.rehearsal else chunk.skip)


def _cuda_smoke(settings: Settings) -> list[Chunk]:
    chunk = _module("cuda-smoke", "benchmarks.smoke", settings, _cuda(settings), timeout_s=180, estimate_s=40)
    return [_of_cuda(chunk, settings)]


def _sanitizers(settings: Settings) -> list[Chunk]:
    """Small layers under compute-sanitizer, where the machine has it; a rehearsal stops before the kernels."""
    estimates = {"memcheck": 150, "racecheck": 200}
    return [
        replace(
            _module(
                f"cuda-{tool}", "benchmarks.cuda_sanitize", settings, {}, (tool,), timeout_s=400, estimate_s=seconds
            ),
            needs=CUDA_BUILD,
        )
        for tool, seconds in estimates.items()
    ]


def _cuda_gates(settings: Settings) -> list[Chunk]:
    """The rows of the gates with the CUDA kernels forced, a chunk per block, to stand beside Triton's."""
    linear = [
        _rows(f"cuda-gate-{b}", "gpu-gate", ("--sk-blocks", str(b)), settings, _cuda(settings), estimate_s=40)
        for b in BLOCKS_GPU
    ]
    conv = [
        _rows(
            f"cuda-conv-gate-{b}",
            "gpu-gate",
            ("--sk-blocks", str(b)),
            settings,
            _cuda(settings),
            file="test_conv2d",
            estimate_s=90,
        )
        for b in (32, 64, 16)
    ]
    return [_of_cuda(chunk, settings) for chunk in (*linear, *conv)]


def _families(settings: Settings) -> list[Chunk]:
    """Both families, dense and peers side by side, each kernel beside its prediction; without a CUDA build Triton's."""
    env, seconds = _default(settings), ("--budget-s", "260")
    return [
        _module(
            f"families-{kind}", "benchmarks.families", settings, env, (kind, *seconds), timeout_s=360, estimate_s=280
        )
        for kind in ("linear", "conv2d")
    ]


def _default(settings: Settings) -> dict[str, str | None]:
    """As dispatched on a GPU; a rehearsal forces Triton."""
    return _forced(settings) if settings.rehearsal else _chosen(settings)


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


def _test_chunks(settings: Settings) -> tuple[list[Chunk], list[Chunk]]:
    """Tests to run first, and those that compile every tile, minutes of it, to run last."""
    options: tuple[str, ...] = ("-o", "faulthandler_timeout=120", "--maxfail=30")
    if settings.rehearsal:
        options = ("--collect-only",)

    def chunk(name: str, *paths: str, timeout_s: float, estimate_s: float) -> Chunk:
        command: tuple[str, ...] = (*PYTEST, *options, *paths)
        if settings.workers and not settings.rehearsal:
            workers = str(settings.workers)
            shared = ("-m", "benchmarks.shards", workers, LOGS, "--", *PYTEST[2:])
            command = (*PYTEST, "-n", workers, *options, *paths) if settings.xdist else (*shared, *options, *paths)
        return Chunk(name, command, timeout_s=timeout_s, estimate_s=estimate_s, empty_ok=True)

    if settings.tests:
        return [chunk("tests", *settings.tests, timeout_s=420, estimate_s=180)], []
    if settings.rehearsal:
        return [chunk("tests-gpu", *TESTS_REST, timeout_s=120, estimate_s=15)], []
    first = [path for path in TESTS_FIRST if (settings.root / path).exists()]
    cuda = _of_cuda(chunk("tests-cuda-gpu", TESTS_CUDA, timeout_s=420, estimate_s=120), settings)
    ignored = [f"--ignore={path}" for path in (TESTS_CUDA, *first)]
    rest = ["-m", "gpu", "--continue-on-collection-errors", *ignored, *TESTS_REST]
    names = [Path(path).stem.replace("test_", "tests-").replace("_", "-") for path in first]
    doubtful = [
        chunk(name, path, *(("-k", f"not {OTHER_TILES}") if path == TILE_TESTS else ()), timeout_s=420, estimate_s=120)
        for name, path in zip(names, first, strict=True)
    ]
    last = [chunk("tests-other-tiles", TILE_TESTS, "-k", OTHER_TILES, timeout_s=560, estimate_s=420)]
    last = last if TILE_TESTS in first else []
    return [cuda, *doubtful, chunk("tests-gpu", *rest, timeout_s=300, estimate_s=60)], last


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


def _conv_rows(
    name: str, settings: Settings, suite: str, env: dict[str, str | None], estimate_s: float, *arguments: str
) -> Chunk:
    return _rows(name, suite, arguments, settings, env, file="test_conv2d", estimate_s=estimate_s, skip=settings.conv2d)


def _conv_gates(settings: Settings) -> list[Chunk]:
    """Kernels forced on the 3x3 layers of WRN-28-10, a chunk per block."""
    if settings.rehearsal:
        return [_conv_rows("conv-gate", settings, "gpu-gate", _forced(settings), 0, "--sk-passes", "forward,wgrad")]
    return [
        _conv_rows(f"conv-gate-{block}", settings, "gpu-gate", _forced(settings), 90, "--sk-blocks", str(block))
        for block in (64, 32)
    ]


def _convolutions(settings: Settings) -> list[Chunk]:
    """As dispatched: WRN-28-10 by blocks; then where its stages change, ResNet-50, VGG; the other blocks last."""
    if settings.rehearsal:
        return [_conv_rows("conv-full", settings, "gpu-full", _forced(settings), 0, "--sk-passes", "step")]
    names = {kind: ",".join(shape.name for shape in shapes) for kind, shapes in CONV_GPU_SETS.items()}

    def rows(name: str, kind: str, blocks: str, estimate_s: float, *arguments: str) -> Chunk:
        chosen = ("--sk-shapes", names[kind], "--sk-blocks", blocks, *arguments)
        return _conv_rows(name, settings, "gpu-full", _chosen(settings), estimate_s, *chosen)

    passes = ("--sk-passes", "forward,step")
    return [
        *(rows(f"conv-wrn-{block}", "wrn", str(block), 90) for block in (64, 32)),
        rows("conv-changes", "changes", "64,32", 100, *passes),
        rows("conv-resnet", "resnet", "64,32", 120, *passes),
        rows("conv-vgg", "vgg", "64,32", 110, *passes),
        *(rows(f"conv-wrn-{block}", "wrn", str(block), 90) for block in (128, 16)),
        *(
            rows(f"conv-{kind}-more", kind, "128,16", 60, "--sk-passes", "step", "--sk-sparsities", "90")
            for kind in ("changes", "resnet", "vgg")
        ),
    ]


def _nets(settings: Settings) -> list[Chunk]:
    """Whole nets as dispatched, a chunk per net and mode; compiled nets take longest."""
    estimates = {"eager": 170, "graph": 110, "compile": 230}
    if settings.rehearsal:
        nets: tuple[str, ...] = ("toy",)
    else:
        nets = ("wrn-28-10", "resnet50", "vgg16-wide")
    return [
        _module(
            f"net-{net}-{mode}",
            "benchmarks.nets",
            settings,
            _chosen(settings),
            ("--net", net, "--mode", mode),
            timeout_s=300,
            estimate_s=estimate,
        )
        for net in nets
        for mode, estimate in estimates.items()
    ]


def _accuracy(settings: Settings) -> list[Chunk]:
    """A dense and a sparse net trained for equally many epochs; the dense one is timed and planned first."""
    data = ("--data", settings.data) if settings.data else ()
    skip = "" if data or settings.rehearsal else "no data: give the folder of CIFAR-10 with --data"
    return [
        replace(
            _module(
                f"cifar-{contender}",
                "benchmarks.accuracy",
                settings,
                _chosen(settings),
                ("--contender", contender, *data),
                timeout_s=420,
                estimate_s=300 if contender == "dense" else 240,
            ),
            skip=skip,
        )
        for contender in ("dense", "sparse")
    ]
