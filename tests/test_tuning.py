"""Measuring: interleaved rounds, candidate tiles under a clock that the test winds, and where the results go."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import cost, tuning
from sparsekern.backends import ConvGeometry
from sparsekern.backends.gpu import chips, table
from sparsekern.backends.gpu.choose import choose
from sparsekern.backends.gpu.problem import Problem
from sparsekern.backends.triton import tiles
from sparsekern.layout import BlockGrid

H200 = chips.get("h200")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "_entries", None)
    table.reload()
    yield
    table.reload()


class WoundClock:
    """Calls add to ``now`` what they take; nothing else moves it."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self, call):
        start = self.now
        call()
        return self.now - start

    def takes(self, seconds, name, error=None):
        """A call that takes so long, or each of these times in turn."""
        times = iter(seconds) if isinstance(seconds, list) else None

        def call(*args):
            if error is not None:
                raise error
            self.log.append(name)
            self.now += next(times) if times else seconds

        return call


def problem(op="linear_forward", block=64):
    return Problem(op, "bfloat16", (block, block), 4096, 1024, 1024, 1).at_density(0.1)


def test_contenders_take_turns():
    clock = WoundClock()
    rounds = tuning._race([clock.takes(2.0, "a"), clock.takes(1.0, "b")], clock, 0.0)
    assert rounds == [(2.0, 1.0)] * tuning.LEAST_ROUNDS
    assert clock.log == ["a", "b"] * (1 + tuning.LEAST_ROUNDS)


def test_the_fastest_tile_by_the_median_is_the_best():
    clock, listed = WoundClock(), tiles.candidates(problem(), 90)
    warm = 2 * 9.0  # the first call compiles, the second is not counted either
    plans = {
        listed[0]: clock.takes([warm, warm, 3.0, 3.0, 3.0], 0),
        listed[1]: clock.takes([warm, warm, 9.0, 1.0, 1.0], 1),
        listed[2]: clock.takes([warm, warm, 2.0, 2.0, 0.1], 2),
    }
    times = tuning.measure_kernels(plans, lambda tile: plans[tile](), clock.takes(4.0, "dense"), clock, 0.0)
    assert times.best == listed[1]
    assert list(times.seconds.values()) == pytest.approx([3.0, 1.0, 2.0])
    assert times.dense_seconds == pytest.approx(4.0)
    assert times.skipped == {}


def test_tiles_that_cannot_run_are_skipped_with_the_reason():
    clock, listed = WoundClock(), tiles.candidates(problem(), 90)
    refuse = clock.takes(0.0, "refused", RuntimeError("out of resource: shared memory\nRequired: 300000"))

    def run(tile):
        return refuse() if tile != listed[-1] else clock.takes(1.0, "ran")()

    times = tuning.measure_kernels(listed, run, clock.takes(2.0, "dense"), clock, 0.0)
    assert times.best == listed[-1]
    assert set(times.skipped) == set(listed[:-1])
    assert set(times.skipped.values()) == {"RuntimeError: out of resource: shared memory"}
    nothing = tuning.measure_kernels(listed, lambda tile: refuse(), clock.takes(2.0, "dense"), clock, 0.0)
    assert nothing.best is None and len(nothing.skipped) == len(listed)


def test_best_tiles_are_remembered_for_each_pass():
    clock, problems = WoundClock(), [problem(op) for op in tiles.OPS[:3]]
    wanted = {p: tiles.candidates(p, 90)[-1] for p in problems}
    skipped = tiles.candidates(problems[0], 90)[0]

    def launch(p):
        def run(tile):
            error = RuntimeError("too large") if (p, tile) == (problems[0], skipped) else None
            clock.takes(5e-6 if tile == wanted[p] else 9e-6, p.op, error)()

        return run, clock.takes(50e-6, "dense")

    measured = tuning.tune_kernels(problems, launch, clock, H200, 0.0, ("triton",))
    assert list(measured) == problems
    for p in problems:
        chosen = choose(p, H200)
        assert (chosen.kernel, chosen.source) == (wanted[p], "tuned")
        assert (chosen.seconds, chosen.dense_seconds) == pytest.approx((5e-6, 50e-6))
    entries = json.loads(table.save("h200").read_text())["tiles"]
    assert entries[table.key(problems[0])]["skipped"] == {str(skipped): "RuntimeError: too large"}
    assert "skipped" not in entries[table.key(problems[1])]


def test_a_problem_that_nothing_ran_keeps_the_model():
    def launch(p):
        return WoundClock().takes(0.0, "", RuntimeError("no")), lambda: None

    measured = tuning.tune_kernels([problem()], launch, WoundClock(), H200, 0.0, ("triton",))
    assert measured[problem()].best is None
    assert choose(problem(), H200).source == "model"


def test_layers_are_measured_by_the_clock_given():
    dense, case = nn.Linear(32, 48), cost.Case("linear", (48, 32), 1, (8, 32), 8)
    grid = BlockGrid((48, 32), (16, 16))
    calls = []

    def clock(call):
        call()
        calls.append(call)
        return 3.0 if call.args[0].__class__ is nn.Linear else 2.0

    assert tuning.measure(dense, case, grid, 3, 0.0, clock) == pytest.approx(1.5)
    assert len(calls) == 2 * (1 + tuning.LEAST_ROUNDS)


def test_gpu_layers_tune_their_tiles_first(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    clock, order = WoundClock(), []
    # Stands in for a GPU: layers keep their CPU tensors, kernels are calls that take a while.
    monkeypatch.setattr(
        cost, "gpu_problems", lambda case, block, nnz: [problem("linear_forward"), problem("linear_wgrad")]
    )

    class Launch:
        def __init__(self, dense, case, grid, count):
            order.append(("tiles", case.weight_shape))

        def __call__(self, p):
            return clock.takes(1e-6, "tile"), clock.takes(2e-6, "dense")

    def measure(dense, case, grid, count, seconds, clock):
        order.append(("layer", case.weight_shape))
        assert choose(problem("linear_wgrad"), H200).source == "tuned"
        return 2.0

    monkeypatch.setattr(tuning, "LAUNCHES", {"linear": Launch})
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "clock_of", lambda device: clock)
    monkeypatch.setattr(tuning, "families", lambda desc: ("triton",))
    cfg = sk.SparsityConfig(sparsity=0.9, block=16, exclude=("4",), below_break_even="sparse")
    assert sk.tune(model, torch.randn(8, 64), cfg, seconds_per_layer=0.0) == {"0": 2.0, "2": 2.0}
    assert order == [
        ("tiles", (96, 64)),
        ("layer", (96, 64)),
        ("tiles", (96, 96)),
        ("layer", (96, 96)),
    ]


def test_launches_cover_the_kinds_with_kernels():
    assert set(tuning.LAUNCHES) == set(cost.GPU_KINDS)


def test_linear_launches_compute_the_layer():
    pytest.importorskip("triton")
    case, grid = cost.Case("linear", (48, 32), 1, (8, 32), 8), BlockGrid((48, 32), (16, 16))
    launch = tuning.LinearLaunch(nn.Linear(32, 48), case, grid, 3)
    assert launch.values.shape == (3, 16, 16)
    passes = [Problem(op, "float32", (16, 16), 8, 48, 32, 3) for op in tiles.OPS[:3]]
    y, dx, (dw, dbias) = (launch(p)[1]() for p in passes)
    assert (y.shape, dx.shape, dw.shape, dbias.shape) == ((8, 48), (8, 32), (48, 32), (48,))


@pytest.mark.parametrize(
    ("layer", "x_shape"),
    [
        (nn.Conv2d(32, 48, 3, padding="same"), (2, 32, 6, 5)),
        (nn.Conv2d(32, 48, 3, stride=2, padding=1, groups=2, bias=False), (2, 32, 7, 6)),
        (nn.Conv2d(32, 48, 1), (2, 32, 4, 4)),
        (nn.Conv2d(32, 48, (2, 4), padding="same"), (2, 32, 6, 5)),
    ],
)
def test_convolution_launches_compute_the_layer(layer, x_shape):
    pytest.importorskip("triton")
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    geometry = ConvGeometry(layer.stride, (top, bottom, left, right), layer.dilation)
    case = cost.Case("conv2d", tuple(layer.weight.shape), layer.groups, x_shape, 0, conv=geometry)
    grid = BlockGrid(case.weight_shape, (16, 16), layer.groups)
    launch = tuning.ConvLaunch(layer, case, grid, 3)
    y_shape = (x_shape[0], 48, *geometry.output_size(*x_shape[2:], layer.kernel_size))
    for p in cost.GPU_KINDS["conv2d"](case, (16, 16), 3):
        run, dense = launch(p)
        found, expected = run(tiles.candidates(p, 90)[-1]), dense()
        if p.step == "forward":
            assert found.shape == expected.shape == y_shape
        elif p.step == "dgrad":
            assert found.shape == x_shape and len(expected) == 1
        else:
            assert found[0].shape == (3, 16, 16)
            assert [g.shape for g in expected] == [p.shape for p in layer.parameters()]


@pytest.mark.gpu
def test_tuning_on_a_gpu():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)).to("cuda", torch.bfloat16)
    cfg = sk.SparsityConfig(sparsity=0.9, block=64, exclude=())
    x = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16)
    found = sk.tune(model, x, cfg, seconds_per_layer=0.2)
    assert found and all(speedup > 0 for speedup in found.values())
    gpu = chips.current("cuda").name
    assert len(table.tuned(gpu)) == 3 and chips.cache_file(gpu).exists()
