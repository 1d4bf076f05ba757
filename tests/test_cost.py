"""The cost model and its tuned entries."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from sparsekern import cost
from sparsekern.backends import ConvGeometry, native
from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.choose import choose

LINEAR = cost.Case("linear", (1024, 1024), 1, (2048, 1024), 2048)
CONV = cost.Case("conv2d", (128, 128, 3, 3), 1, (128, 128, 16, 16), 128 * 256)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    if not native.available():
        pytest.skip("needs the native core")
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "_entries", None)


@pytest.mark.parametrize("case", [LINEAR, CONV])
def test_less_work_is_never_slower(case):
    blocks = case.weight_shape[0] * case.weight_shape[1] // 256
    speeds = [cost.predict(case, (16, 16), nnz)[0] for nnz in range(1, blocks, 97)]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_efficiency_lies_between_its_neighbours(isa, kind):
    for low, high in ((1, 2), (4, 8), (16, 32)):
        middle = cost.efficiency(kind, ((low + high + 1) // 2,) * 2, isa)
        ends = sorted(cost.efficiency(kind, (size, size), isa) for size in (low, high))
        assert ends[0] <= middle <= ends[1]
    thin, wide = (cost.efficiency(kind, (size, size), isa) for size in (1, 16))
    assert thin < cost.efficiency(kind, (1, 16), isa) < wide


def test_tiny_layers_stay_dense():
    tiny = cost.Case("linear", (16, 16), 1, (4, 16), 4)
    assert not cost.pays(*cost.predict(tiny, (4, 4), 1))
    assert cost.pays(*cost.predict(LINEAR, (16, 16), 410))
    assert not cost.pays(*cost.predict(LINEAR, (1, 1), 1024 * 900))


def test_auto_block_runs_near_the_best():
    for case in (LINEAR, CONV):
        block = cost.choose_block(case, 0.1)
        speed = {size: cost.predict(case, (size, size), 100)[0] for size in cost.AUTO_BLOCKS}
        assert block[0] == block[1]
        assert block[0] in speed


def test_no_kernel_never_pays():
    for change in ({"dtype": "float64"}, {"dtype": "float64", "device": "cuda"}):
        case = replace(LINEAR, **change)
        assert not cost.pays(*cost.predict(case, (16, 16), 4))


# -- GPUs: the choice of backend is stood in for, the figures are an H200's --------------------------------------------

WIDE = cost.Case("linear", (4096, 4096), 1, (8192, 4096), 8192, dtype="bfloat16", device="cuda")


@pytest.fixture
def on_gpu(monkeypatch):
    def stand_in(op, device, dtype, block):
        fits = dtype != torch.float64 and all(edge in (16, 32, 64, 128) for edge in block)
        return "triton" if fits else "dense"

    monkeypatch.setattr(cost, "choice", stand_in)
    monkeypatch.setattr(cost, "families", lambda desc: ("triton",))
    monkeypatch.setattr(chips, "current", lambda device=None: chips.get("h200"))  # also where there is another GPU


def slots(case, size, density):
    return round(density * math.prod(case.weight_shape) / size**2)


def test_gpu_layers_are_predicted_pass_by_pass(on_gpu):
    for density, low, high in ((0.05, 6.0, 9.5), (0.1, 4.5, 8.0), (0.2, 2.5, 4.2)):
        speedup, source = cost.predict(WIDE, (128, 128), slots(WIDE, 128, density))
        assert source == "model" and low < speedup < high
    problems = cost.gpu_problems(WIDE, (64, 32), 100)
    assert [p.op for p in problems] == ["linear_forward", "linear_dgrad", "linear_wgrad"]
    assert {(p.block, p.m, p.out_features, p.in_features, p.capacity, p.dtype) for p in problems} == {
        ((64, 32), 8192, 4096, 4096, 100, "bfloat16")
    }


def test_gpu_layers_below_break_even_cost_what_dense_costs(on_gpu):
    speedup, source = cost.predict(WIDE, (16, 16), slots(WIDE, 16, 0.5))
    assert 0.85 < speedup < 1.0
    assert not cost.pays(speedup, source)
    nnz = slots(WIDE, 32, 0.3)
    passes = [choose(p, chips.get("h200"), fallback=False) for p in cost.gpu_problems(WIDE, (32, 32), nnz)]
    faster = [p.seconds < p.fallback_seconds for p in passes]
    assert any(faster) and not all(faster)
    expected = sum(p.dense_seconds for p in passes) / sum(min(p.seconds, p.fallback_seconds) for p in passes)
    assert cost.predict(WIDE, (32, 32), nnz)[0] == pytest.approx(expected)


def test_gpu_speedups_grow_with_sparsity(on_gpu):
    for size in cost.GPU_BLOCKS:
        speeds = [cost.predict(WIDE, (size, size), slots(WIDE, size, d))[0] for d in (0.02, 0.05, 0.1, 0.3, 0.6, 1.0)]
        assert speeds == sorted(speeds, reverse=True)


def test_what_the_gpu_kernels_cannot_do_never_pays(on_gpu):
    conv = replace(CONV, device="cuda", dtype="float64")
    for case, block in ((conv, 32), (replace(WIDE, dtype="float64"), 32), (WIDE, 8)):
        assert cost.gpu_problems(case, (block, block), 4) is None
        assert not cost.pays(*cost.predict(case, (block, block), 4))
    assert cost.gpu_problems(replace(WIDE, device="cpu"), (32, 32), 4) is None


WRN_LAYERS = {  # 3x3 layers of WRN-28-10, a batch of 128
    channels: cost.Case(
        "conv2d",
        (channels, channels, 3, 3),
        1,
        (128, channels, edge, edge),
        128 * edge**2,
        channels_last=True,
        dtype="bfloat16",
        device="cuda",
        conv=ConvGeometry((1, 1), (1, 1, 1, 1), (1, 1)),
    )
    for channels, edge in ((160, 32), (320, 16), (640, 8))
}


@pytest.mark.parametrize("channels", WRN_LAYERS)
def test_gpu_convolutions_are_predicted_pass_by_pass(on_gpu, channels):
    case = WRN_LAYERS[channels]
    problems = cost.gpu_problems(case, (64, 32), 100)
    assert [p.op for p in problems] == ["conv2d_forward", "conv2d_dgrad", "conv2d_wgrad"]
    assert {(p.block, p.m, p.source, p.taps, p.capacity) for p in problems} == {
        ((64, 32), case.positions, case.positions, 9, 100)
    }
    for size in (32, 64):
        speeds = [cost.predict(case, (size, size), slots(case, size, d))[0] for d in (0.05, 0.1, 0.2, 0.5, 1.0)]
        assert speeds == sorted(speeds, reverse=True)
        assert 1.8 < speeds[1] < 6 and 1.2 < speeds[2] < 3.5 and speeds[-1] < 1.0
    assert cost.choose_block(case, 0.1)[0] >= 64
    assert cost.predict(case, (64, 64), slots(case, 64, 0.1))[1] == "model"


def test_gpu_convolutions_follow_their_geometry(on_gpu):
    case, block = WRN_LAYERS[320], (64, 64)
    strided = replace(case, conv=ConvGeometry((2, 2), (1, 1, 1, 1), (1, 1)), positions=128 * 64)
    nnz = slots(case, 64, 0.1)
    assert [p.m for p in cost.gpu_problems(strided, block, nnz)] == [128 * 64] * 3
    # dgrad multiplies four times what is stored.
    assert cost.predict(strided, block, nnz)[0] < cost.predict(case, block, nnz)[0]
    assert cost.gpu_problems(replace(case, conv=None), block, nnz) == cost.gpu_problems(case, block, nnz)
    pointwise = replace(
        case, weight_shape=(320, 320, 1, 1), conv=ConvGeometry((1, 1), (0, 0, 0, 0), (1, 1)), geometry="1x1"
    )
    assert [p.op for p in cost.gpu_problems(pointwise, block, 9)] == ["linear_forward", "linear_dgrad", "linear_wgrad"]
    grouped = replace(case, weight_shape=(320, 80, 3, 3), groups=4)
    assert {p.groups for p in cost.gpu_problems(grouped, block, 9)} == {4}


def test_a_forced_backend_that_cannot_is_no_kernel(monkeypatch):
    monkeypatch.setattr(cost, "choice", lambda *facts: (_ for _ in ()).throw(RuntimeError("forced")))
    assert cost.gpu_problems(WIDE, (32, 32), 4) is None


def test_auto_block_on_a_gpu_is_wide(on_gpu):
    assert cost.auto_blocks(WIDE) == (16, 32, 64, 128)
    assert cost.choose_block(WIDE, 0.2)[0] >= 64
    assert cost.auto_blocks(LINEAR) == cost.AUTO_BLOCKS


def test_tuned_entries_are_kept_per_device(on_gpu, tmp_path):
    cost.remember(WIDE, (32, 32), 0.1, 2.5)
    path = cost.save_tuned("cuda")
    assert path.name == "tuned-h200.json" and path.parent == tmp_path
    assert next(iter(json.loads(path.read_text()))).endswith("bfloat16 b32x32")
    assert not cost.cache_file().exists()
    cost._entries = None
    assert cost.predict(WIDE, (32, 32), slots(WIDE, 32, 0.1)) == (2.5, "tuned")
    assert cost.predict(replace(WIDE, device="cpu"), (32, 32), slots(WIDE, 32, 0.1))[1] == "model"


def test_tuned_entries_answer_near_their_density_and_survive_a_process():
    cost.remember(LINEAR, (16, 16), 0.1, 3.5)
    path = cost.save_tuned()
    assert json.loads(path.read_text())
    cost._entries = None
    assert cost.predict(LINEAR, (16, 16), 410) == (3.5, "tuned")
    assert cost.predict(LINEAR, (16, 16), 1000)[1] == "model"
    assert cost.predict(LINEAR, (8, 8), 1640)[1] == "model"
    path.write_text("{ torn")
    cost._entries = None
    assert cost.predict(LINEAR, (16, 16), 410)[1] == "model"
