"""The cost model and its tuned entries."""

from __future__ import annotations

import json

import pytest

from sparsekern import cost
from sparsekern.backends import native

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
    for change in ({"dtype": "float64"}, {"device": "cuda"}):
        case = cost.Case("linear", (1024, 1024), 1, (2048, 1024), 2048, **change)
        assert not cost.pays(*cost.predict(case, (16, 16), 4))


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
