"""What only a GPU can show of the CUDA kernels: every plan at every block, dtype and geometry against float64, streams,
graphs, equal bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.backends import OpDesc, cuda
from sparsekern.backends.cuda import plans
from sparsekern.backends.gpu import table

from .cuda_checks import GEOMETRIES, check_conv, check_linear, chip, listed, random_bits
from .gpu_support import BOUNDS, capture, draw, long_layer, memory_of_a_step, on_gpu, other_blocks, training_layer
from .support import assert_within

MISSING = cuda.unsupported(OpDesc("linear", "cuda", torch.bfloat16, (32, 32))) if torch.cuda.is_available() else None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

BLOCKS = [(bo, bi) for bo in plans.EDGES for bi in plans.EDGES]
SQUARE = [(edge, edge) for edge in plans.EDGES]


def name(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def precise(ask, dtype):
    ask("tf32" if dtype == "tf32" else "ieee")


@pytest.mark.parametrize("dtype", plans.DTYPES)
@pytest.mark.parametrize("block", BLOCKS, ids=name)
def test_linear_plans(block, dtype, cuda_precision):
    """Every plan at ragged sizes of several tiles, features in multiples of 16 bytes."""
    precise(cuda_precision, dtype)
    check_linear(on_gpu((520, 648), block, 0.3, seed=1, spare=2), 300, dtype)


@pytest.mark.parametrize("dtype", plans.DTYPES)
@pytest.mark.parametrize("shape", [(517, 643), (90, 41), (16, 700), (333, 17)], ids=name)
def test_linear_rows_off_16_bytes(shape, dtype, cuda_precision):
    precise(cuda_precision, dtype)
    for block in ((16, 32), (64, 16)):
        check_linear(on_gpu(shape, block, 0.4, seed=2), 131, dtype, bias=False)


@pytest.mark.parametrize("dtype", plans.DTYPES)
@pytest.mark.parametrize("m", [0, 1, 15, 64, 257])
def test_linear_token_counts(m, dtype, cuda_precision):
    precise(cuda_precision, dtype)
    check_linear(on_gpu((96, 160), (32, 16), 0.5, seed=3), m, dtype)


@pytest.mark.parametrize("density", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("block", SQUARE, ids=name)
def test_empty_rows_and_no_blocks_and_all(block, density, cuda_precision):
    precise(cuda_precision, "bfloat16")
    check_linear(on_gpu((400, 272), block, density, seed=4, spare=1), 200, "bfloat16")


@pytest.mark.parametrize("dtype", plans.DTYPES)
@pytest.mark.parametrize("block", [*SQUARE, (16, 64), (128, 32)], ids=name)
def test_element_masks(block, dtype, cuda_precision):
    precise(cuda_precision, dtype)
    layout = on_gpu((264, 200), block, 0.4, seed=5, spare=2)
    check_linear(layout, 150, dtype, bits=random_bits(layout))


def test_rows_of_a_wider_matrix_are_read_in_place():
    layout, wide = on_gpu((96, 160), (32, 32), 0.5), draw(200, 320, dtype=torch.bfloat16)
    for x in (wide[:, 64:224], wide[:, 3:163], wide[::2, 64:224]):
        check_linear(layout, x.shape[0], "bfloat16", x=x)


@pytest.mark.parametrize("dtype", plans.DTYPES)
@pytest.mark.parametrize("block", [*SQUARE, (32, 64)], ids=name)
@pytest.mark.parametrize("which", GEOMETRIES)
def test_convolution_plans(which, block, dtype, cuda_precision):
    precise(cuda_precision, dtype)
    weight, x_shape, geometry, groups = GEOMETRIES[which]
    layout = on_gpu(weight, block, 0.3, groups, seed=1, spare=2)
    check_conv(layout, x_shape, geometry, dtype, bias=which != "groups")


def test_convolutions_with_element_masks():
    weight, x_shape, geometry, _ = GEOMETRIES["3x3, stride 2"]
    layout = on_gpu(weight, (32, 16), 0.3, seed=6)
    check_conv(layout, x_shape, geometry, "bfloat16", bits=random_bits(layout))


def all_passes(layout, x, dy, bias):
    """A call for every plan of every pass, which returns its results as a list."""
    w, index, grid, out = (
        layout.from_dense(draw(*layout.grid.weight_shape, dtype=x.dtype)),
        layout.index,
        layout.grid,
        [],
    )
    for plan in listed("forward", x.dtype, layout, None, x.shape):
        out.append(lambda plan=plan: [cuda.forward(x, w, index, bias, grid, None, plan)])
    for plan in listed("dgrad", x.dtype, layout, None, x.shape):
        out.append(lambda plan=plan: [cuda.dgrad(dy, w, index, tuple(x.shape), grid, None, plan)])
    for plan in listed("wgrad", x.dtype, layout, None, x.shape):
        out.append(lambda plan=plan: list(cuda.wgrad(dy, x, index, None, True, grid, None, plan)))
    return out


def busy(seconds=0.02):
    """Keeps the current stream busy, so that work queued elsewhere would overtake it."""
    torch.cuda._sleep(int(seconds * 1e9))


@pytest.fixture
def operands():
    layout = on_gpu((512, 768), (32, 32), 0.2)
    return (
        layout,
        draw(900, 768, dtype=torch.bfloat16),
        draw(900, 512, dtype=torch.bfloat16),
        draw(512, dtype=torch.bfloat16),
    )


def test_equal_bits_twice(operands):
    """No result depends on timing: also while another stream competes for the GPU."""
    calls, other = all_passes(*operands), torch.cuda.Stream()
    for call in calls:
        first = call()
        with torch.cuda.stream(other):
            noise = torch.randn(2048, 2048, device="cuda") @ torch.randn(2048, 2048, device="cuda")
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
    del noise


def test_work_goes_to_the_current_stream(operands):
    """Inputs are written late on a side stream: a kernel on any other stream would read what was there before."""
    layout, x, dy, bias = operands
    calls, side = all_passes(layout, x, dy, bias), torch.cuda.Stream()
    new = [torch.randn_like(t) for t in (x, dy, bias)]
    for call in calls:
        before = [t.clone() for t in (x, dy, bias)]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            busy()
            for tensor, value in zip((x, dy, bias), new, strict=True):
                tensor.copy_(value)
            late = call()
        side.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(late, call(), strict=True))
        for tensor, value in zip((x, dy, bias), before, strict=True):
            tensor.copy_(value)


def test_calls_are_captured(operands):
    for call in all_passes(*operands):
        eager = call()
        graph, captured = capture(call)
        for tensor in captured:
            tensor.fill_(7)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


@pytest.fixture
def forced(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    table.reload()
    yield
    table.reload()


def step_of(layer, x, dy):
    leaves = [x, layer.values, layer.bias]

    def step():
        y = layer(x)
        return (y, *torch.autograd.grad(y, leaves, dy))

    return step


def test_a_captured_step_survives_a_topology_update(forced):
    layer, x, dy = training_layer(), draw(256, 512, dtype=torch.bfloat16), draw(256, 768, dtype=torch.bfloat16)
    step = step_of(layer, x.requires_grad_(), dy)
    graph, captured = capture(step)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
        layer.layout.update_(other_blocks(layer), check=False)


def test_no_host_sync(forced):
    layer, x, dy = training_layer(), draw(256, 512, dtype=torch.bfloat16), draw(256, 768, dtype=torch.bfloat16)
    step = step_of(layer, x.requires_grad_(), dy)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_layers_train_as_their_dense_twins(forced):
    dense = nn.Conv2d(64, 96, 3, padding=1, device="cuda").to(memory_format=torch.channels_last)
    layout = on_gpu((96, 64, 3, 3), (32, 32), 0.4)
    sparse = sk.SparseConv2d.from_dense(dense, layout.mask(), block=32)
    twin, x = sparse.to_dense(), draw(8, 64, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for module in (sparse, twin):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = module(x)
        weight = module.values if module is sparse else module.weight
        results.append((y, *torch.autograd.grad(y.float().square().mean(), [x, weight])))
    (y, dx, dvalues), (y_dense, dx_dense, dw) = results
    torch.testing.assert_close(y, y_dense, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(dx, dx_dense, rtol=5e-2, atol=1e-4)
    torch.testing.assert_close(layout.to_dense(dvalues), dw * sparse.mask, rtol=5e-2, atol=1e-3)


def test_block_scores_come_from_another_backend(forced):
    layer, x, dy = training_layer(), draw(256, 512, dtype=torch.bfloat16), draw(256, 768, dtype=torch.bfloat16)
    found = torch.ops.sparsekern.block_scores(dy, x, layer.layout.index, 32, 32)
    want = layer.layout.grid.to_blocks(dy.double().t() @ x.double()).flatten(1).norm(dim=1).view(found.shape)
    absent = found > -torch.inf
    torch.testing.assert_close(found[absent].double(), want[absent], rtol=1e-2, atol=1e-3)


def test_ieee_float32_is_refused(forced, cuda_precision):
    cuda_precision("ieee")
    layer = training_layer(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"can't do linear .*fp32_precision"):
        layer(draw(8, 512))
    cuda_precision("tf32")
    assert layer(draw(8, 512)).shape == (8, 768)


def test_compiled_layers_run_the_kernels(forced):
    torch._dynamo.reset()
    layer, x = training_layer(), draw(256, 512, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)
            layer.layout.update_(other_blocks(layer), check=False)


def test_nothing_dense_is_allocated(forced):
    """At 98 % a training step of a 4096 x 4096 layer stays under a quarter of the dense weight in extra memory."""
    assert memory_of_a_step() < 4096 * 4096 * 2 / 4


def test_large_offsets(forced):
    """Activations beyond 2^31 elements: row offsets are 64 bits wide."""
    layout, values, x = long_layer()
    w, tail = layout.to_dense(values).double(), x[-64:].double()
    for plan in listed("forward", x.dtype, layout, None, x.shape):
        y = cuda.forward(x, values, layout.index, None, layout.grid, None, plan)
        assert_within(y[-64:], tail @ w.t(), tail.abs() @ w.abs().t(), f"y {plan}", BOUNDS["bfloat16"])


def test_what_a_gpu_cannot_do_is_an_error_in_words(operands):
    layout, x, _, bias = operands
    values = layout.from_dense(draw(512, 768, dtype=torch.bfloat16))
    large = plans.Plan("stationary", (128, 1, 1), 4, 2)
    wide = on_gpu((64, 4096), (32, 32), 0.2)
    with pytest.raises(ValueError, match=r"shared memory|tile"):
        cuda.forward(draw(8, 4096, dtype=x.dtype), values, wide.index, None, wide.grid, None, large)
    with pytest.raises(ValueError, match="warps"):
        cuda.forward(x, values, layout.index, bias, layout.grid, None, replace(large, warps=3))


def test_tuning_measures_the_plans(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    table.reload()
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)).to("cuda", torch.bfloat16)
    cfg = sk.SparsityConfig(sparsity=0.9, block=32, exclude=())
    assert sk.tune(model, draw(2048, 1024, dtype=torch.bfloat16), cfg, seconds_per_layer=0.2)
    entries = table.tuned(chip().name)
    assert len(entries) == 3 and {entry["family"] for entry in entries.values()} <= {"stationary", "streamed", "wgrad"}
    assert not any(entry.get("skipped") for entry in entries.values())
    table.reload()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu(forced):
    """Tensors on a device that is not the current one."""
    layer, x = training_layer().to("cuda:1"), torch.randn(64, 512, device="cuda:1", dtype=torch.bfloat16)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert y.device == x.grad.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    torch.testing.assert_close(y, layer.to_dense()(x), rtol=2e-2, atol=2e-2)
