"""The cuda backend without a GPU: which kernel is chosen and why, which plans there are, what the model says."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import element_mask, tuning
from sparsekern.backends import GPU, ConvGeometry, OpDesc, cuda, dense, native, triton
from sparsekern.backends.cuda import launch, model, plans, predicted
from sparsekern.backends.cuda.plan import Plan
from sparsekern.backends.gpu import chips, choose, families, passes, table
from sparsekern.backends.gpu.problem import Problem, conv_problem, layer_problem
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid, BlockLayout

from .support import random_layout

backends = importlib.import_module("sparsekern.backends")  # sparsekern.backends is a function
H200, A100 = chips.get("h200"), chips.get("a100")
PLAN, TILE = Plan("stationary", (64, 1, 1), 8, 2), Tile("gather", 128, 64, 1, 4, 3)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty user's cache and no remembered choices."""
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSEKERN_BACKEND", raising=False)
    remembered = (backends._select, backends._module, backends._families, passes._chosen)
    for function in remembered:
        function.cache_clear()
    table.reload()
    yield
    for function in remembered:
        function.cache_clear()
    table.reload()


def linear(step="forward", block=32, shape=(4096, 1024, 1024), dtype="bfloat16", density=0.1):
    block = (block, block) if isinstance(block, int) else block
    return Problem(f"linear_{step}", dtype, block, *shape, 1).at_density(density)


def conv(step="forward", block=32, x=(32, 128, 28, 28), out=None, kernel=3, stride=1, groups=1, density=0.1, **more):
    block = (block, block) if isinstance(block, int) else block
    r, s = (kernel, kernel) if isinstance(kernel, int) else kernel
    out, dtype = out or x[1], more.pop("dtype", "bfloat16")
    grid = BlockGrid((out, x[1] // groups, r, s), block, groups)
    padding, dilation = more.pop("padding", (r // 2, r // 2, s // 2, s // 2)), more.pop("dilation", 1)
    geometry = ConvGeometry((stride, stride), padding, (dilation, dilation))
    return conv_problem(f"conv2d_{step}", dtype, grid, geometry, x, 1).at_density(density)


LAYERS = [
    linear(),
    linear(block=(16, 64), shape=(1000, 300, 700)),
    linear(block=128, shape=(8192, 4096, 4096)),
    linear(shape=(3, 40, 50)),
    conv(),
    conv(block=(64, 16), x=(5, 70, 9, 7), out=90),
    conv(block=16, x=(128, 160, 32, 32)),
    conv(x=(64, 512, 7, 7)),
    conv(block=64, x=(16, 256, 28, 28), stride=2),
    conv(x=(8, 64, 15, 14), kernel=5, stride=2, padding=(0, 1, 2, 3)),
    conv(x=(8, 256, 14, 14), groups=4),
    conv(x=(4, 64, 20, 20), dilation=2, padding=(2,) * 4),
]


def with_step(problem, step):
    return replace(problem, op=f"{problem.kind}_{step}")


EVERY = [with_step(problem, step) for problem in LAYERS for step in plans.STEPS]


def name_of(problem):
    return (
        f"{problem.op}-{problem.out_features}x{problem.in_features}-{problem.block[0]}x{problem.block[1]}-m{problem.m}"
    )


# -- who may run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Stands in for a GPU machine: what is built, which GPU, whether Triton is there; no kernel runs."""

    def be(archs="8.0 9.0a", capability=(9, 0), with_triton=True):
        core = SimpleNamespace(cuda=object()) if archs is not None else SimpleNamespace()
        monkeypatch.setattr(native, "available", lambda: True)
        monkeypatch.setattr(native, "load", lambda: core)
        monkeypatch.setattr(native, "build_info", lambda: {"cuda_archs": archs or ""})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(triton.common, "missing", lambda: None if with_triton else "Triton is not installed")
        monkeypatch.setattr(chips, "current", lambda device=None: H200)

    return be


def desc(op="linear", dtype=torch.bfloat16, block=(32, 32), device="cuda"):
    return OpDesc(op, device, dtype, block)


@pytest.fixture
def tf32():
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]

    def ask(matmul, convolution):
        for switch, wish in zip(switches, (matmul, convolution)):
            switch.fp32_precision = wish

    yield ask
    ask(*before)


def test_every_reason_against_it_is_told(machine, tf32):
    machine(archs=None)
    assert "SPARSEKERN_BUILD=cuda" in cuda.unsupported(desc())
    machine(capability=None)
    assert "no usable GPU" in cuda.unsupported(desc())
    machine(capability=(7, 5))
    assert "8.0 or later, got 7.5" in cuda.unsupported(desc())
    machine(archs="8.0 9.0a", capability=(10, 0))
    assert "TORCH_CUDA_ARCH_LIST=10.0" in cuda.unsupported(desc())
    machine()
    assert cuda.unsupported(desc()) is None
    assert "on a GPU, got cpu" in cuda.unsupported(desc(device="cpu"))
    assert "no kernel for pool" in cuda.unsupported(desc("pool"))
    assert "float64" in cuda.unsupported(desc(dtype=torch.float64))
    for block in ((8, 32), (32, 256), (16, 48)):
        assert "16, 32, 64, 128" in cuda.unsupported(desc(block=block))
    tf32("ieee", "tf32")
    assert "cuda.matmul.fp32_precision" in cuda.unsupported(desc(dtype=torch.float32))
    assert cuda.unsupported(desc("conv2d", torch.float32)) is None


def test_triton_stays_the_first_choice_and_cuda_stands_in(machine, monkeypatch):
    machine()
    assert backends.choice("linear", "cuda", torch.bfloat16, (32, 32)) == "triton"
    assert backends.families(desc()) == ("triton", "cuda")
    assert backends.backends()["cuda"] == "available"
    monkeypatch.setattr(triton.common, "missing", lambda: "Triton is not installed")
    backends._select.cache_clear(), backends._families.cache_clear()
    assert backends.choice("linear", "cuda", torch.bfloat16, (32, 32)) == "cuda"
    assert backends.families(desc()) == ("cuda",)
    assert backends._module(desc(), "auto") is passes


def test_forcing_it_raises_with_the_reason(machine, tf32, monkeypatch):
    machine()
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")
    tf32("ieee", "ieee")
    with pytest.raises(RuntimeError, match=r"SPARSEKERN_BACKEND=cuda: can't do linear .*fp32_precision"):
        backends.choice("linear", "cuda", torch.float32, (32, 32))
    assert backends.families(desc(dtype=torch.float32)) == ()
    tf32("tf32", "ieee")
    assert backends.choice("linear", "cuda", torch.float32, (32, 32)) == "cuda"
    assert backends.families(desc()) == ("cuda",)
    machine(archs=None)
    backends._select.cache_clear()
    with pytest.raises(RuntimeError, match=r"SPARSEKERN_BUILD=cuda"):
        backends.choice("linear", "cuda", torch.bfloat16, (32, 32))


def test_without_a_build_nothing_changes():
    """Here and now: the reason is in the list of backends, which the doctor repeats."""
    if torch.cuda.is_available() and cuda.unsupported(desc()) is None:
        pytest.skip("there is a build and a GPU")
    assert sk.backends()["cuda"] != "available"
    with pytest.raises(ValueError, match="expected one of cpu, triton, cuda, dense"):
        backends.get("cudnn")


def test_a_forced_cuda_backend_says_what_is_missing(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("on CPU tensors")
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")
    mask = torch.ones(32, 32, dtype=torch.bool)
    layer = sk.SparseLinear.from_dense(nn.Linear(32, 32), mask, block=16)
    with pytest.raises(RuntimeError, match="SPARSEKERN_BACKEND=cuda: can't do linear"):
        layer(torch.randn(2, 32))


# -- which kernel runs -------------------------------------------------------------------------------------------------


def test_the_model_alone_never_takes_cuda_before_triton():
    for problem in EVERY:
        for chip in (H200, A100):
            assert choose.choose(problem, chip, GPU, fallback=False).backend == "triton"
            alone = choose.choose(problem, chip, ("cuda",), fallback=False)
            assert (alone.backend, alone.source) == ("cuda", "model")
            assert alone.seconds == min(model.seconds(problem, p, chip) for p in plans.candidates(problem, chip))


def test_without_triton_the_model_decides_between_cuda_and_dense():
    sparse, full = linear(shape=(8192, 4096, 4096), density=0.05), linear(block=16, density=1.0)
    assert choose.choose(sparse, H200, ("cuda",)).backend == "cuda"
    assert choose.choose(full, H200, ("cuda",)).backend == "dense"


def test_a_measured_plan_runs_where_its_family_may():
    problem = linear()
    table.remember("h200", problem, PLAN, 10e-6, 100e-6)
    found = choose.choose(problem, H200)
    assert (found.kernel, found.source, found.backend) == (PLAN, "tuned", "cuda")
    assert found.seconds == pytest.approx(10e-6) and found.dense_seconds == pytest.approx(100e-6)
    assert choose.choose(problem, H200, ("triton",)).source == "model"
    table.remember("h200", problem, TILE, 12e-6, 100e-6)
    assert choose.choose(problem, H200).kernel == TILE
    assert choose.choose(problem, H200, ("cuda",), fallback=False).source == "model"


def test_a_measured_dense_op_can_win():
    table.remember("h200", linear(), PLAN, 100e-6, 20e-6)
    assert choose.choose(linear(), H200).backend == "dense"
    assert choose.choose(linear(), H200, ("cuda",), fallback=False).kernel == PLAN


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({TILE: 1.0, PLAN: 0.94}, PLAN),
        ({TILE: 1.05, PLAN: 1.0}, PLAN),
        ({TILE: 1.0, PLAN: 0.96}, TILE),
        ({TILE: 1.0, PLAN: 2.0}, TILE),
        ({PLAN: 3.0}, PLAN),
        ({PLAN: 3.0, replace(PLAN, stages=4): 2.0}, replace(PLAN, stages=4)),
        ({TILE: 3.0, replace(TILE, stages=4): 2.0}, replace(TILE, stages=4)),
        ({TILE: 1.0, replace(TILE, stages=4): 0.9, PLAN: 0.9}, replace(TILE, stages=4)),
        ({}, None),
    ],
)
def test_cuda_has_to_be_clearly_faster(seconds, expected):
    assert choose.MARGIN == 1.05
    assert choose.winner(seconds) == expected


def times(plan_time, tile_time=9e-6):
    """A launch whose kernels take these times on a clock of its own."""
    now = [0.0]

    def launch_of(problem):
        def run(kernel):
            now[0] += plan_time if isinstance(kernel, Plan) else tile_time

        return run, lambda: now.__setitem__(0, now[0] + 50e-6)

    def clock(call):
        before = now[0]
        call()
        return now[0] - before

    return launch_of, clock


@pytest.mark.parametrize("step", plans.STEPS)
@pytest.mark.parametrize(("plan_time", "backend"), [(5e-6, "cuda"), (8.7e-6, "triton"), (20e-6, "triton")])
def test_tuning_measures_both_families_and_remembers_the_winner(step, plan_time, backend):
    problem = conv(step)
    launch_of, clock = times(plan_time)
    found = tuning.tune_kernels([problem], launch_of, clock, H200, 0.0)[problem]
    measured = {families.name_of(kernel) for kernel in found.seconds}
    assert measured == {"triton", "cuda"} and not found.skipped
    table.save("h200")
    table.reload()
    chosen = choose.choose(problem, H200)
    assert (chosen.backend, chosen.source) == (backend, "tuned")
    assert chosen.seconds == pytest.approx(min(plan_time, 9e-6) if backend == "cuda" else 9e-6)


def test_tuning_measures_what_may_run():
    launch_of, clock = times(1e-6)
    found = tuning.tune_kernels([linear()], launch_of, clock, H200, 0.0, ("triton",))[linear()]
    assert {families.name_of(kernel) for kernel in found.seconds} == {"triton"}


@pytest.mark.parametrize("problem", [linear("wgrad"), conv("dgrad"), conv("wgrad", x=(8, 64, 15, 13))], ids=name_of)
def test_plans_survive_the_table(problem):
    plan = plans.candidates(problem, H200)[-1]
    table.remember("h200", problem, plan, 10e-6, 100e-6, {"other": "too large"})
    table.save("h200")
    table.reload()
    (found,) = table.lookup("h200", problem)
    assert (found.kernel, found.problem, found.source) == (plan, problem, "tuned")


def test_entries_lend_their_plan_to_near_shapes():
    problem, near = conv(), conv(x=(64, 128, 28, 28))
    plan = plans.candidates(problem, H200)[0]
    table.remember("h200", problem, plan, 40e-6, 400e-6)
    found = choose.choose(near, H200)
    assert found.kernel == plan and found.source == "tuned"
    ratio = model.seconds(near, plan, H200) / model.seconds(problem, plan, H200)
    assert found.seconds == pytest.approx(40e-6 * ratio)


def test_a_plan_that_does_not_fit_another_geometry_is_passed_over():
    """As many pixels, channels, taps and strides, but a halo that no longer fits."""
    problem = conv(x=(32, 256, 28, 28))
    tight = max(plans.candidates(problem, H200), key=lambda plan: plans.shared_bytes(problem, plan))
    table.remember("h200", problem, tight, 10e-6, 1e-3)
    wide = conv(x=(32, 256, 28, 28), dilation=4, padding=(4,) * 4)
    assert table.key(wide) == table.key(problem) and plans.why_not(wide, tight, H200) is not None
    assert choose.choose(problem, H200).backend == "cuda"
    assert choose.choose(wide, H200).backend == "triton"


@pytest.mark.parametrize(
    "damage",
    [
        {"family": 3},
        {"tile": [64, 1]},
        {"tile": "64"},
        {"warps": "8"},
        {"stages": 2.5},
        {"seconds": 0},
        {"window": None},
    ],
)
def test_entries_that_are_no_plan_are_passed_over(damage):
    problem = conv()
    table.remember("h200", problem, plans.candidates(problem, H200)[0], 1e-5, 1e-3)
    table.tuned("h200")[table.key(problem)].update(damage)
    assert choose.choose(problem, H200).source == "model"


def test_exported_plans_can_be_shipped(tmp_path, monkeypatch):
    problem = conv()
    plan = plans.candidates(problem, H200)[0]
    table.remember("h200", problem, plan, 1e-5, 1e-3)
    content = json.loads(table.export(tmp_path / "kernels.json", ("h200",)).read_text())
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "elsewhere"))
    table.reload()
    monkeypatch.setattr(table, "_shipped", content["gpus"])
    found = choose.choose(problem, H200)
    assert (found.kernel, found.source) == (plan, "table")


def test_passes_run_the_kernel_that_was_measured(machine, monkeypatch):
    """From the operator's arguments to the family's function, with the table in between."""
    machine()
    grid, geometry = BlockGrid((64, 96, 3, 3), (32, 32)), ConvGeometry((1, 1), (1, 1, 1, 1), (1, 1))
    x_shape, capacity, calls = (4, 96, 14, 14), 20, []

    def stand_in(step):
        def call(*args):
            calls.append((step, args[-1]))
            return torch.empty(0), torch.empty(0)

        return call

    for step in plans.STEPS:
        problem = conv_problem(f"conv2d_{step}", "bfloat16", grid, geometry, x_shape, capacity)
        table.remember("h200", problem, plans.candidates(problem, H200)[0], 1e-6, 1e-3)
        monkeypatch.setattr(
            cuda, step, lambda *args, step=step: calls.append((step, args[-1])) or (torch.empty(0),) * 2
        )
    x = SimpleNamespace(shape=x_shape, dtype=torch.bfloat16, device=torch.device("cuda", 0))
    kernels = [passes._kernel(step, x, grid, geometry, x_shape, capacity) for step in plans.STEPS]
    assert all(isinstance(kernel, Plan) for kernel in kernels)
    told = passes.explain(torch.bfloat16, x.device, grid, capacity, x_shape, geometry)
    assert [line.split(" plan")[0] for line in told] == [
        "forward: cuda stationary",
        "dgrad: cuda stationary",
        "wgrad: cuda wgrad",
    ]
    assert all("tuned for h200: kernel 1 us, dense 1000 us" in line for line in told)
    index = torch.zeros(grid.index_size(capacity), dtype=torch.int32)
    passes.conv2d_wgrad(x, x, index, None, True, grid, geometry)
    assert calls == [("wgrad", kernels[2])]


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", EVERY, ids=name_of)
@pytest.mark.parametrize("dtype", plans.DTYPES[1:])
def test_candidates_can_run(problem, dtype):
    problem = replace(problem, dtype=dtype)
    for chip in (H200, A100):
        listed = plans.candidates(problem, chip)
        assert 2 <= len(listed) <= 40 and len(set(listed)) == len(listed)
        fastest = cuda.candidates(problem, chip)
        assert fastest[0] == min(listed, key=lambda plan: model.seconds(problem, plan, chip))
        assert set(fastest) <= set(listed) and len(fastest) == min(len(listed), cuda.MOST_PLANS)
        for plan in listed:
            assert plans.why_not(problem, plan, chip) is None
            assert plans.shared_bytes(problem, plan) <= chip.shared_per_block
            assert plans.resident(problem, plan, chip) * (plans.shared_bytes(problem, plan) + 1024) <= (
                chip.shared_per_sm + 1024
            )


def test_no_plans_outside_the_kernels():
    outside = [
        linear(dtype="float32"),
        linear(block=8),
        replace(linear(), op="block_scores"),
        replace(conv(), window=None),
        replace(linear(), dtype="float64"),
    ]
    for problem in outside:
        assert plans.candidates(problem, H200) == ()
        assert isinstance(plans.why_not(problem, PLAN, H200), str)
    with pytest.raises(ValueError, match="no cuda kernel for block"):
        choose.choose(linear(dtype="float32"), H200, ("cuda",), fallback=False)


@pytest.mark.parametrize(
    ("problem", "change", "reason"),
    [
        (linear(), {"family": "wgrad"}, "family"),
        (linear(), {"tile": (48, 1, 1)}, "32, 64 or 128"),
        (linear(), {"warps": 2}, "4, 8, 16"),
        (linear(), {"tile": (128, 1, 1), "warps": 16}, "4, 8"),
        (linear(), {"stages": 5}, "2 to 4"),
        (linear(), {"splits": 0}, "1 and more"),
        (linear(shape=(4096, 1024, 4096)), {}, "tile"),
        (linear(), {"family": "streamed"}, "32 pixels each"),
        (linear(), {"family": "streamed", "tile": (256, 1, 1), "splits": 2}, "splits"),
        (conv(kernel=(15, 16)), {"family": "streamed", "tile": (256, 1, 1)}, "30 rows and columns"),
        (linear("wgrad"), {"family": "wgrad"}, "window"),
        (linear("wgrad"), {"family": "wgrad", "rows": 1, "cols": 1, "tile": (8, 1, 1)}, "multiple of 16"),
        (linear("wgrad"), {"family": "wgrad", "rows": 64, "cols": 1}, "rows"),
        (linear("wgrad"), {"family": "wgrad", "rows": 2, "cols": 90}, "shared memory"),
    ],
)
def test_unfit_plans_say_why(problem, change, reason):
    assert reason in plans.why_not(problem, replace(PLAN, **change), H200)


def test_the_largest_filter_streams():
    assert plans.why_not(conv(kernel=(15, 15)), replace(PLAN, family="streamed", tile=(256, 1, 1)), H200) is None


def test_small_images_share_a_tile():
    tiles = {plan.tile for plan in plans.candidates(conv(x=(128, 64, 8, 8)), H200) if plan.family == "stationary"}
    assert (2, 8, 8) in tiles
    seven = conv(x=(128, 64, 7, 7))
    tiles = {plan.tile for plan in plans.candidates(seven, H200) if plan.family == "stationary"}
    assert (2, 8, 8) in tiles  # the least halo: 7x7 in 8x8
    assert plans.boxes(seven, 128)[0] == (128, 1, 1)  # no waste: a pixel of every image
    whole = conv("wgrad", x=(128, 64, 4, 6))
    assert any(plan.tile[1:] == (4, 6) and plan.bm % 16 == 0 for plan in plans.candidates(whole, H200))


def brute_force_box(window, transposed, tile):
    """Distinct source rows and columns that a tile of the first of each phase reads, from the definition of a tap."""
    sides = []
    for axis, count in zip((0, 1), tile[1:]):
        stride, dilation, pad = window.stride[axis], window.dilation[axis], window.padding[axis]
        spans = []
        for phase in range(stride if transposed else 1):
            read = []
            for i, tap in itertools.product(range(count), range(window.kernel[axis])):
                if not transposed:
                    read.append(i * stride - pad + tap * dilation)
                elif (i * stride + phase + pad - tap * dilation) % stride == 0:
                    read.append((i * stride + phase + pad - tap * dilation) // stride)
            spans.append(max(read) - min(read) + 1 if read else 0)
        sides.append(max(spans))
    return tile[0] * math.prod(sides)


@pytest.mark.parametrize("step", ["forward", "dgrad"])
def test_tiles_hold_every_pixel_that_a_tap_reads(step):
    draw = random.Random(0)
    for _ in range(200):
        kernel, stride = draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3))
        padding, dilation = tuple(draw.randrange(3) for _ in range(4)), draw.choice((1, 2, 3))
        problem = conv(step, x=(3, 32, 31, 33), kernel=kernel, stride=stride, padding=padding, dilation=dilation)
        if problem.kind == "linear":
            continue
        tile = (draw.choice((1, 2)), draw.choice((1, 2, 4, 8)), draw.choice((1, 4, 8)))
        assert plans.pixels_of_box(problem, tile) == brute_force_box(problem.window, step == "dgrad", tile)


def test_windows_fill_the_accumulators():
    """Before rounding to whole windows: three quarters of what the warps hold, within a factor of two."""
    for block, density in itertools.product((16, 32, 64), (0.05, 0.1, 0.3)):
        problem = linear("wgrad", block, (8192, 4096, 4096), density=density)
        for plan in plans.candidates(problem, H200):
            stored = plan.rows * plan.cols * density * block * block
            assert 0.35 <= stored / (plan.warps * plans.WARP_ACCUMULATORS) <= 1.0


def test_splits_fill_the_chip():
    few = linear("wgrad", 32, (65536, 256, 256))
    best = min(plans.candidates(few, H200), key=lambda plan: model.seconds(few, plan, H200))
    assert best.splits > 8
    assert plans.wgrad_windows(few, best) * best.splits >= H200.sms / 2
    narrow = linear(shape=(256, 4096, 512))
    assert any(plan.splits > 4 for plan in plans.candidates(narrow, H200) if plan.family == "stationary")


def test_partial_sums_stay_within_the_workspace():
    for width in (1024, 4096, 8192):
        problem = linear("wgrad", 64, (2**20, width, width), density=0.2)
        for plan in plans.candidates(problem, H200):
            assert plan.splits == 1 or 4 * plan.splits * problem.capacity * 64 * 64 <= plans.WORKSPACE


def extension():
    """The built module ``_C.cuda``, or None."""
    try:
        return getattr(importlib.import_module("sparsekern._C"), "cuda", None)
    except ImportError:
        return None


@pytest.mark.skipif(extension() is None, reason="needs a build with CUDA kernels")
def test_shared_memory_is_counted_as_the_kernels_do():
    """Plans at random, fit and unfit: both sides agree on which can run, and on the bytes of those that can."""
    module, draw, agreed = extension(), random.Random(0), 0
    for _ in range(3000):
        problem = replace(draw.choice(EVERY), dtype=draw.choice(plans.DTYPES), block=(draw.choice(plans.EDGES),) * 2)
        family = "wgrad" if problem.step == "wgrad" else draw.choice(("stationary", "streamed"))
        tile = (2 ** draw.randrange(7), 2 ** draw.randrange(4), 2 ** draw.randrange(4))
        window = (draw.randrange(1, 6), draw.randrange(1, 6)) if family == "wgrad" else (0, 0)
        cut = (draw.choice((2, 4, 8, 16)), draw.randrange(1, 6), draw.choice((1, 1, 2)))
        plan = Plan(family, tile, *cut, *window)
        facts = [launch.problem_object(problem), launch.plan_object(plan)]
        if family != "wgrad":
            facts.insert(1, getattr(module.Step, problem.step))
        try:
            counted = getattr(module, f"{family}_shared_bytes")(*facts)
        except ValueError:
            assert plans.why_not(problem, plan, H200) is not None, (problem, plan)
            continue
        assert counted == plans.shared_bytes(problem, plan), (problem, plan)
        assert (plans.why_not(problem, plan, H200) is None) == (counted <= H200.shared_per_block), (problem, plan)
        agreed += 1
    assert agreed > 100


# -- the model ---------------------------------------------------------------------------------------------------------


def stationary(problem, bm=64):
    return Plan("stationary", (bm, 1, 1), 8, 2)


def test_stationary_traffic_is_worked_out_by_hand():
    """1024 tokens of 512 -> 256 in blocks of 32, 64 blocks stored, tiles of 64 tokens, in bf16."""
    problem = Problem("linear_forward", "bfloat16", (32, 32), 1024, 256, 512, 64)
    work = model.work(problem, stationary(problem))
    assert work.blocks == 16
    assert work.l2_bytes == 16 * 64 * 32 * 32 * 2 + 1024 * 512 * 2
    assert work.flops == problem.stored_flops == 2 * 1024 * 64 * 32 * 32
    steps = 16 * 64 * 2  # tiles x blocks x depths of 16
    assert work.shared_bytes == steps * (64 + 32) * 32 + work.l2_bytes
    assert work.hbm_bytes == (1024 * (512 + 256) + 64 * 32 * 32) * 2


def test_weights_of_a_stationary_tile_do_2_bm_flop_per_byte():
    for block, bm in itertools.product((16, 32, 128), (32, 64, 128)):
        problem = linear(block=block, shape=(8192, 512, 512))
        work = model.work(problem, stationary(problem, bm))
        weights = work.l2_bytes - 8192 * 512 * 2
        assert work.flops / weights == pytest.approx(bm)  # 2 FLOP per element of 2 bytes


def test_streamed_loads_are_those_of_unions():
    problem = linear(block=16, shape=(8192, 4096, 4096), density=0.2)
    work = model.work(problem, Plan("streamed", (128, 1, 1), 4, 3))
    union = 1 - (1 - problem.density) ** 8
    expected = 64 * (32 * 256 * union * 128 * 16 + problem.capacity * 256) * 2  # tiles x (panels x columns ..)
    assert work.l2_bytes == pytest.approx(expected)
    assert work.flops == problem.stored_flops


def test_wgrad_reads_each_pixel_once_per_window():
    problem = linear("wgrad", 32, (4096, 1024, 1024), density=0.05)
    plan = Plan("wgrad", (64, 1, 1), 16, 2, 1, 8, 16)
    work = model.work(problem, plan)
    passes_ = model.expected_passes(problem.capacity / 8, 32)
    assert work.blocks == 4 * 2
    assert work.l2_bytes == pytest.approx(8 * passes_ * 4096 * (8 + 16) * 32 * 2)
    assert work.flops == problem.stored_flops and work.workspace == 0
    split = model.work(problem, replace(plan, splits=4))
    assert split.workspace == 4 * 4 * problem.capacity * 32 * 32 and split.l2_bytes == work.l2_bytes


@pytest.mark.parametrize(("mean", "room"), [(0.1, 8), (5.6, 8), (20, 8), (1000, 100)])
def test_passes_are_the_mean_of_a_poisson_number(mean, room):
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.full((200_000,), float(mean)), generator=generator)
    simulated = (counts / room).ceil().clamp_min(1).mean().item()
    assert model.expected_passes(mean, room) == pytest.approx(simulated, rel=0.1)


def test_strided_dgrad_multiplies_each_tap_in_one_phase_only():
    plain, strided = conv("dgrad", x=(16, 128, 28, 28)), conv("dgrad", x=(16, 128, 28, 28), stride=2)
    for plan in plans.candidates(strided, H200):
        computed = plans.tiles_of(strided, plan.tile) * plan.bm
        assert model.work(strided, plan).flops == pytest.approx(2 * computed / 4 * strided.capacity * 32 * 32)
    assert plain.stored_flops == 4 * strided.stored_flops


@pytest.mark.parametrize("problem", EVERY, ids=name_of)
@pytest.mark.parametrize("chip", ["h200", "a100", "b200"])
def test_predictions_respect_the_limits(problem, chip):
    """Never faster than memory or the tensor cores allow for what must be moved and multiplied at least."""
    chip = chips.get(chip)
    for plan in plans.candidates(problem, chip):
        found = model.predict(problem, plan, chip)
        least = max(problem.stored_flops / chip.rate(problem.dtype) / chip.mma_sync, 0)
        assert found.seconds > max(found.limits.values()) + chip.launch
        assert found.limits["mma"] >= least * (1 - 1e-9)
        assert found.bound in (*model.LIMITS, "launch")
        assert model.work(problem, plan).flops >= problem.stored_flops * (1 - 1e-9)


@pytest.mark.parametrize("step", plans.STEPS)
@pytest.mark.parametrize("make", [linear, conv])
def test_more_blocks_never_take_less(step, make):
    for block in (16, 32, 128):
        for plan in plans.candidates(make(step, block), H200):
            times = [model.seconds(make(step, block, density=d), plan, H200) for d in (0.02, 0.1, 0.3, 0.8, 1.0)]
            assert times == sorted(times)


def test_empty_calls_have_a_prediction():
    for change in ({"m": 0}, {"capacity": 0}):
        for step in plans.STEPS:
            problem = replace(linear(step), **change)
            assert 0 < choose.choose(problem, H200, ("cuda",), fallback=False).seconds < 1
    assert 0 < choose.choose(conv("wgrad", x=(0, 64, 8, 8)), H200, ("cuda",), fallback=False).seconds < 1


def test_predicted_pages_say_what_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predicted, "SPARSITIES", (90,))
    monkeypatch.setattr(predicted, "BLOCKS", (32,))
    predicted.main(["--chip", "h200", "--out", str(tmp_path)])
    assert "h200.md: 36 rows" in capsys.readouterr().out
    page, content = (tmp_path / "h200.md").read_text(), json.loads((tmp_path / "h200.json").read_text())
    assert "No CUDA kernel has run on a GPU yet" in page and page.count("## ") == 12
    assert content["sources"]["mma_sync"] == "assumed" and len(content["rows"]) == 36
    for row in content["rows"]:
        assert row["cuda"] > 0 and row["triton"] > 0 and row["dense"] > 0
        assert row["cuda"] > row["roofline"]


# -- calls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "copied", "ld"),
    [
        (lambda: torch.randn(5, 8), False, 8),
        (lambda: torch.randn(5, 20)[:, 4:12], False, 20),
        (lambda: torch.randn(8, 5).t(), True, 8),
        (lambda: torch.randn(1, 8).expand(5, 8), True, 8),
        (lambda: torch.randn(40)[:8].view(1, 8), False, 8),
        (lambda: torch.randn(0, 8), False, 8),
        (lambda: torch.randn(2, 8, 3, 4).contiguous(memory_format=torch.channels_last), False, 8),
        (lambda: torch.randn(2, 8, 3, 4), True, 8),
    ],
)
def test_activations_are_copied_only_where_strides_need_it(make, copied, ld):
    tensor = make()
    source, found = launch._pixels(tensor)
    assert found == ld and torch.equal(source, tensor)
    assert (source.data_ptr() != tensor.data_ptr()) == copied


def test_operands_of_another_kind_are_refused():
    like = torch.empty(2, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bias: expected torch"):
        launch._dense(torch.empty(2), like, "bias")
    with pytest.raises(ValueError, match="index: expected int32"):
        launch._index(torch.empty(2, dtype=torch.int64), like)
    odd = torch.empty(64, dtype=torch.bfloat16)[1:33]
    assert launch._dense(odd, like, "values").data_ptr() % launch.ALIGNMENT == 0


class Addresses:
    """Stands in for ``_C.cuda``: computes from addresses and facts what the kernels promise, on CPU tensors."""

    Step = SimpleNamespace(forward="forward", dgrad="dgrad")

    def __init__(self):
        self.plans = []

    @staticmethod
    def Problem(*facts):
        names = "dtype groups bo bi capacity n c h w o p q r s sh sw top left dh dw"
        return SimpleNamespace(**dict(zip(names.split(), facts, strict=True)))

    @staticmethod
    def ProductPlan(bm, images, height, width, warps, stages, splits):
        assert bm == images * height * width
        return ("product", warps, stages, splits)

    @staticmethod
    def WgradPlan(rows, cols, *cut):
        return ("wgrad", rows, cols, *cut)

    @staticmethod
    def wgrad_workspace_bytes(problem, plan, with_bias):
        return 4 * plan[-1] * (problem.capacity + with_bias) if plan[-1] > 1 else 0

    @staticmethod
    def at(address, dtype, *shape, strides=None):
        numbers = math.prod(shape) if strides is None else 1 + sum((n - 1) * s for n, s in zip(shape, strides))
        if numbers == 0 or 0 in shape:
            return torch.empty(shape, dtype=dtype)
        size = torch.empty(0, dtype=dtype).element_size()
        flat = torch.frombuffer((ctypes.c_char * (numbers * size)).from_address(address), dtype=dtype)
        return flat.view(shape) if strides is None else flat.as_strided(shape, strides)

    def image(self, address, p, channels, height, width, ld):
        strides = (height * width * ld, 1, width * ld, ld)
        return self.at(address, torch.bfloat16, p.n, channels, height, width, strides=strides)

    def operands(self, p, index):
        grid = BlockGrid((p.o, p.c // p.groups, p.r, p.s), (p.bo, p.bi), p.groups)
        layout = BlockLayout(grid, self.at(index, torch.int32, grid.index_size(p.capacity)))
        layout.validate()
        bottom = (p.p - 1) * p.sh + (p.r - 1) * p.dh + 1 - p.h - p.top  # what the output size implies
        right = (p.q - 1) * p.sw + (p.s - 1) * p.dw + 1 - p.w - p.left
        return grid, layout, ConvGeometry((p.sh, p.sw), (p.top, max(bottom, 0), p.left, max(right, 0)), (p.dh, p.dw))

    def stationary(self, p, step, plan, source, ld, values, index, bias, result, device, stream):
        assert (p.dtype, device, stream) == ("bfloat16", None, 77)
        grid, layout, geometry = self.operands(p, index)
        stored = self.at(values, torch.bfloat16, p.capacity, p.bo, p.bi)
        if step == "forward":
            b = self.at(bias, torch.bfloat16, p.o) if bias else None
            y = dense.conv2d_forward(self.image(source, p, p.c, p.h, p.w, ld), stored, layout.index, b, grid, geometry)
            self.image(result, p, p.o, p.p, p.q, p.o).copy_(y[:, :, : p.p, : p.q])
        else:
            dy, shape = self.image(source, p, p.o, p.p, p.q, ld), (p.n, p.c, p.h, p.w)
            dx = dense.conv2d_dgrad(dy, stored, layout.index, shape, True, grid, geometry)
            self.image(result, p, p.c, p.h, p.w, p.c).copy_(dx)
        self.plans.append(plan)

    streamed = stationary

    def wgrad(self, p, plan, dy, dy_ld, x, x_ld, index, mask, workspace, dvalues, dbias, device, stream):
        assert (workspace != 0) == (plan[-1] > 1) and (device, stream) == (None, 77)
        grid, layout, geometry = self.operands(p, index)
        bits = self.at(mask, torch.uint8, p.capacity, p.bo * p.bi // 8) if mask else None
        images = self.image(dy, p, p.o, p.p, p.q, dy_ld), self.image(x, p, p.c, p.h, p.w, x_ld)
        found, bias = dense.conv2d_wgrad(*images, layout.index, bits, dbias != 0, grid, geometry)
        self.at(dvalues, torch.bfloat16, p.capacity, p.bo, p.bi).copy_(found)
        if dbias:
            self.at(dbias, torch.bfloat16, p.o).copy_(bias)
        self.plans.append(plan)


@pytest.fixture
def addresses(monkeypatch):
    module = Addresses()
    for function in (launch._product, launch._gradient, launch.problem_object, launch.plan_object):
        function.cache_clear()
    monkeypatch.setattr(launch, "kernels", lambda: module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    yield module
    for function in (launch._product, launch._gradient, launch.problem_object, launch.plan_object):
        function.cache_clear()


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("weight", "groups", "stride", "padding", "dilation"),
    [
        ((40, 56, 3, 3), 1, (1, 1), (1, 1, 1, 1), (1, 1)),
        ((48, 32, 3, 2), 2, (2, 1), (0, 2, 1, 0), (1, 2)),
        ((40, 56, 1, 1), 1, (1, 1), (0, 0, 0, 0), (1, 1)),
        ((40, 56, 1, 1), 1, (2, 2), (0, 0, 0, 0), (1, 1)),
    ],
)
def test_convolutions_hand_over_what_the_kernels_expect(addresses, weight, groups, stride, padding, dilation, masked):
    grid, geometry = BlockGrid(weight, (16, 32), groups), ConvGeometry(stride, padding, dilation)
    layout = random_layout(grid, 0.5, spare=2)

    def draw(*shape):
        image = torch.randn(*shape).bfloat16()
        return image.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else image

    x_shape = (3, weight[1] * groups, 9, 8)
    x, dy = draw(*x_shape), draw(3, weight[0], *geometry.output_size(9, 8, grid.kernel_size))
    values, bias = layout.from_dense(torch.randn(weight).bfloat16()), draw(weight[0])
    bits = element_mask.pack(torch.rand(layout.capacity, 16, 32) < 0.5) if masked else None
    for step in plans.STEPS:
        problem = layer_problem(step, x.dtype, grid, geometry, x_shape, layout.capacity)
        for plan in plans.candidates(problem, H200)[::5]:
            if step == "forward":
                y = cuda.forward(x, values, layout.index, bias, grid, geometry, plan)
                near(y, dense.conv2d_forward(x, values, layout.index, bias, grid, geometry))
                assert y.is_contiguous(memory_format=torch.channels_last)
            elif step == "dgrad":
                dx = cuda.dgrad(dy, values, layout.index, x_shape, grid, geometry, plan)
                near(dx, dense.conv2d_dgrad(dy, values, layout.index, x_shape, True, grid, geometry))
            else:
                found = cuda.wgrad(dy, x, layout.index, bits, True, grid, geometry, plan)
                for one, other in zip(found, dense.conv2d_wgrad(dy, x, layout.index, bits, True, grid, geometry)):
                    near(one, other)
            assert addresses.plans[-1][-1] == plan.splits


def test_linear_layers_hand_over_what_the_kernels_expect(addresses):
    grid = BlockGrid((40, 56), (16, 32))
    layout = random_layout(grid, 0.5, spare=1)
    wide, dy = torch.randn(30, 80).bfloat16(), torch.randn(40, 30).bfloat16().t()
    x, values = wide[:, 8:64], layout.from_dense(torch.randn(40, 56).bfloat16())
    index, facts = layout.index, (x.dtype, grid, None, x.shape, layout.capacity)
    for plan in plans.candidates(layer_problem("forward", *facts), H200)[::4]:
        near(cuda.forward(x, values, index, None, grid, None, plan), dense.linear_forward(x, values, index, None, grid))
    for plan in plans.candidates(layer_problem("dgrad", *facts), H200)[::4]:
        near(cuda.dgrad(dy, values, index, (30, 56), grid, None, plan), dense.linear_dgrad(dy, values, index, grid))
    for plan in plans.candidates(layer_problem("wgrad", *facts), H200)[::4]:
        for with_bias in (True, False):
            found = cuda.wgrad(dy, x, index, None, with_bias, grid, None, plan)
            for one, other in zip(found, dense.linear_wgrad(dy, x, index, None, with_bias, grid)):
                near(one, other)


def test_float32_is_handed_over_as_tf32_or_not_at_all(addresses, tf32):
    grid = BlockGrid((32, 32), (16, 16))
    layout = random_layout(grid, 0.5)
    tf32("ieee", "ieee")
    with pytest.raises(ValueError, match="dtype: expected bfloat16, float16 or TF32"):
        cuda.forward(torch.randn(4, 32), layout.from_dense(torch.randn(32, 32)), layout.index, None, grid, None, PLAN)
    tf32("tf32", "ieee")
    assert launch.problem_object(layer_problem("forward", torch.float32, grid, None, (4, 32), 2)).dtype == "tf32"
