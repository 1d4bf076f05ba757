"""Registered operators: schema, fake kernels, autograd, autocast, FLOPs, compile, errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern import element_mask as bits
from sparsekern.layout import BlockGrid

from .support import random_layout

OPS = torch.ops.sparsekern


@pytest.fixture(params=["auto", "dense"])
def backend(request, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", request.param)


def linear_operands(dtype=torch.float32, lead=(3, 5)):
    layout = random_layout(BlockGrid((20, 33), (8, 4)), 0.4, spare=2)
    values = layout.from_dense(torch.randn(20, 33, dtype=dtype)).requires_grad_()
    x = torch.randn(*lead, 33, dtype=dtype, requires_grad=True)
    return layout, x, values, torch.randn(20, dtype=dtype, requires_grad=True)


def conv2d_operands(dtype=torch.float32, channels_last=False):
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    layout = random_layout(BlockGrid((12, 6, 3, 2), (4, 4), 2), 0.5, spare=2)
    values = layout.from_dense(torch.randn(12, 6, 3, 2, dtype=dtype)).requires_grad_()
    x = torch.randn(2, 12, 6, 7, dtype=dtype).contiguous(memory_format=fmt).requires_grad_()
    return layout, x, values, torch.randn(12, dtype=dtype, requires_grad=True)


CONV = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2), "groups": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_linear(backend, dtype):
    layout, x, values, bias = linear_operands(dtype)
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    opcheck(OPS.linear, (x, values, layout.index, bias, 20), **tolerance)
    opcheck(OPS.linear, (x, values, layout.index, None, 20), **tolerance)
    dy = torch.randn(3, 5, 20, dtype=dtype)
    detached, stored = x.detach(), values.detach()
    opcheck(OPS.linear_dgrad, (dy, stored, layout.index, 33), **tolerance)
    opcheck(OPS.linear_wgrad, (dy, detached, layout.index, *values.shape, True), **tolerance)
    opcheck(OPS.linear_wgrad, (dy, detached, layout.index, *values.shape, False), **tolerance)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_opcheck_conv2d(backend, channels_last):
    layout, x, values, bias = conv2d_operands(channels_last=channels_last)
    geometry = tuple(CONV.values())
    opcheck(OPS.conv2d, (x, values, layout.index, bias, 12, *geometry))
    dy = OPS.conv2d(x, values, layout.index, bias, 12, *geometry).detach()
    assert dy.is_contiguous(memory_format=torch.channels_last) == channels_last
    opcheck(OPS.conv2d_dgrad, (dy, values.detach(), layout.index, x.shape, channels_last, *geometry))
    opcheck(OPS.conv2d_wgrad, (dy, x.detach(), layout.index, *values.shape, *geometry, True))


def test_opcheck_element_mask(backend):
    layout, x, values, bias = linear_operands()
    mask = bits.pack(torch.rand(values.shape) < 0.5)
    opcheck(OPS.linear, (x, values, layout.index, bias, 20, mask), test_utils=("test_schema", "test_faketensor"))


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "dense")
    layout, x, values, bias = linear_operands(torch.float64)
    assert torch.autograd.gradcheck(lambda *a: sk.sparse_linear(a[0], a[1], layout, a[2]), (x, values, bias))
    layout, x, values, bias = conv2d_operands(torch.float64, channels_last=True)
    assert torch.autograd.gradcheck(
        lambda *a: sk.sparse_conv2d(a[0], a[1], layout, a[2], (2, 1), (1, 2), (1, 2), 2), (x, values, bias)
    )


@pytest.mark.parametrize("frozen", ["x", "values", "bias", "values bias", "x bias"])
def test_only_wanted_gradients(backend, frozen):
    for operands, call in (
        (linear_operands(), lambda o: sk.sparse_linear(o[1], o[2], o[0], o[3])),
        (conv2d_operands(), lambda o: sk.sparse_conv2d(o[1], o[2], o[0], o[3], (2, 1), (1, 2), (1, 2), 2)),
    ):
        named = dict(zip(("x", "values", "bias"), operands[1:], strict=True))
        call(operands).sum().backward()
        full = {name: t.grad.clone() for name, t in named.items()}
        for name, t in named.items():
            t.grad = None
            t.requires_grad_(name not in frozen.split())
        call(operands).sum().backward()
        for name, t in named.items():
            if name in frozen.split():
                assert t.grad is None
            else:
                torch.testing.assert_close(t.grad, full[name], rtol=1e-5, atol=1e-5)


def test_double_backward_raises(backend):
    layout, x, values, bias = linear_operands()
    (grad,) = torch.autograd.grad(sk.sparse_linear(x, values, layout, bias).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="densify_"):
        torch.autograd.grad(grad.sum(), values)
    layout, x, values, bias = conv2d_operands()
    y = sk.sparse_conv2d(x, values, layout, bias, 1, 1, 1, 2)
    (grad,) = torch.autograd.grad(y.sum(), values, create_graph=True)
    with pytest.raises(NotImplementedError, match="densify_"):
        torch.autograd.grad(grad.sum(), x)


def test_direct_and_registered_paths_agree(backend):
    layout, x, values, bias = conv2d_operands(channels_last=True)
    direct = sk.sparse_conv2d(x, values, layout, bias, (2, 1), (1, 2), (1, 2), 2)
    registered = OPS.conv2d(x, values, layout.index, bias, 12, (3, 2), (2, 1), (1, 1, 2, 2), (1, 2), 2)
    assert torch.equal(direct, registered)
    grads = [torch.autograd.grad(y.square().sum(), (x, values, bias)) for y in (direct, registered)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_flop_counter_sees_stored_blocks_only():
    layout, x, values, bias = linear_operands()
    with FlopCounterMode(display=False) as counter:
        sk.sparse_linear(x, values, layout, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 15 * values.numel()
    layout, x, values, bias = conv2d_operands()
    with FlopCounterMode(display=False) as counter:
        y = sk.sparse_conv2d(x, values, layout, bias, 1, 1, 1, 2)
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * y.shape[0] * y.shape[2] * y.shape[3] * values.numel()


def test_autocast():
    layer = sk.SparseLinear(64, 48, sparsity=0.5, block=8)
    x = torch.randn(10, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        inner = torch.autocast("cpu", enabled=False)
        with inner:
            assert layer(x).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.values.grad.dtype == layer.bias.grad.dtype == torch.float32
    full = layer(x.detach())
    torch.testing.assert_close(y.float(), full, rtol=5e-2, atol=5e-2)
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == torch.float16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_fullgraph_without_recompiles_over_updates():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        sk.SparseConv2d(8, 16, 3, padding=1, sparsity=0.5, block=4), torch.nn.ReLU(), torch.nn.Flatten(),
        sk.SparseLinear(16 * 36, 32, sparsity=0.8, block=8), torch.nn.ReLU(),
        sk.SparseLinear(32, 10, sparsity=0.5, block=2),
    )  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    counters = torch._dynamo.utils.counters
    graphs = None
    for _ in range(11):
        loss = compiled(x).square().mean()
        loss.backward()
        torch.testing.assert_close(loss, model(x).square().mean(), rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
        if graphs is None:
            graphs = dict(counters["stats"])
        for module in model:
            if isinstance(module, torch.nn.Module) and hasattr(module, "values"):
                layout = module.layout
                fresh = torch.zeros(layout.grid.blocks, dtype=torch.bool)
                fresh[torch.randperm(layout.grid.blocks)[: layout.nnz]] = True
                slot_map = layout.update_(fresh)
                kept = slot_map >= 0
                with torch.no_grad():
                    module.values.copy_(torch.where(kept.view(-1, 1, 1), module.values[slot_map.clamp_min(0)], 0.0))
    assert dict(counters["stats"]) == graphs, "recompiled"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_with_inductor():
    torch._dynamo.reset()
    layer = sk.SparseLinear(32, 16, sparsity=0.5, block=4)
    x = torch.randn(5, 32)
    compiled = torch.compile(lambda x: torch.relu(layer(x)).square().mean(), fullgraph=True)
    results = []
    for function in (compiled, lambda x: torch.relu(layer(x)).square().mean()):
        layer.zero_grad()
        loss = function(x)
        loss.backward()
        results.append((loss.detach(), layer.values.grad, layer.bias.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_masked_layers_compile_in_one_graph_without_a_warning(kind, holes):
    """Their layout is read inside the graph: nothing in it may be cached or be opaque to the tracer."""
    torch._dynamo.reset()
    if kind == "linear":
        dense, x = torch.nn.Linear(40, 48), torch.randn(5, 40)
        make = sk.SparseLinear.from_dense
    else:
        dense, x = torch.nn.Conv2d(16, 32, 3, padding=1, groups=2), torch.randn(2, 16, 5, 5)
        make = sk.SparseConv2d.from_dense
    mask = torch.rand(dense.weight.shape) < 0.5 if holes else torch.ones(dense.weight.shape, dtype=torch.bool)
    mask[:16] = False
    layer = make(dense, mask, 16)
    layer.masked = True
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    with torch.no_grad():
        dense.weight.mul_(mask)
    for function, weight in ((compiled, layer.values), (dense, dense.weight)):
        y = function(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), weight)
        results.append((y, gradient if weight is layer.values else layer.layout.from_dense(gradient * mask)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_export():
    layer = sk.SparseLinear(32, 16, sparsity=0.5, block=4)
    program = torch.export.export(layer, (torch.randn(5, 32),))
    x = torch.randn(5, 32)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda lay, x, v, b: sk.sparse_linear(x[..., :32], v, lay, b), ValueError, r"x \[\.\.\., 33\]"),
        (lambda lay, x, v, b: sk.sparse_linear(x.double(), v, lay, b), TypeError, "one dtype"),
        (lambda lay, x, v, b: sk.sparse_linear(x, v[:-1], lay, b), ValueError, "expected values"),
        (lambda lay, x, v, b: sk.sparse_linear(x, v, lay, b[:-1]), ValueError, r"bias \[20\]"),
        (lambda lay, x, v, b: sk.sparse_linear(x.to("meta"), v, lay, b), ValueError, "one device"),
        (lambda lay, x, v, b: sk.sparse_conv2d(x, v, lay, b), ValueError, r"\[O, C/g, R, S\]"),
    ],
)
def test_linear_errors(call, error, message):
    layout, x, values, bias = linear_operands()
    with pytest.raises(error, match=message):
        call(layout, x, values, bias)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"groups": 1}, "groups=2"),
        ({"groups": 2, "padding": "same", "stride": 2}, "stride 1"),
        ({"groups": 2, "padding": "full"}, "'valid', 'same'"),
        ({"groups": 2, "dilation": 9}, "positive output size"),
        ({"groups": 2, "stride": 0}, "positive stride"),
        ({"groups": 2, "stride": (1, 1, 1)}, "int or a pair"),
    ],
)
def test_conv2d_errors(kwargs, message):
    layout, x, values, bias = conv2d_operands()
    with pytest.raises(ValueError, match=message):
        sk.sparse_conv2d(x, values, layout, bias, **kwargs)
    with pytest.raises(ValueError, match=r"x \[N, 12, H, W\]"):
        sk.sparse_conv2d(x[:, :6], values, layout, bias, groups=2)


@pytest.mark.parametrize("first", ["sparsekern", "torch.utils.flop_counter"])
def test_flops_whichever_is_imported_first(first):
    script = f"""
import torch, {first}
import sparsekern as sk
from torch.utils.flop_counter import FlopCounterMode
layer = sk.SparseLinear.from_dense(torch.nn.Linear(32, 32), torch.eye(32).bool(), block=8)
with FlopCounterMode(display=False) as counter:
    layer(torch.randn(5, 32))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * 5 * 4 * 8 * 8


def test_flops_of_block_scores():
    layout = random_layout(BlockGrid((12, 6, 3, 2), (4, 4), 2), 0.5)
    x, dy = torch.randn(2, 12, 6, 7), torch.randn(2, 12, 3, 8)
    with FlopCounterMode(display=False) as counter:
        OPS.conv2d_block_scores(dy, x, layout.index, 4, 4, *CONV.values())
    assert counter.get_total_flops() == 2 * 2 * 12 * 3 * 8 * 6 * 3 * 2
    layout = random_layout(BlockGrid((20, 33), (8, 4)), 0.4)
    with FlopCounterMode(display=False) as counter:
        OPS.block_scores(torch.randn(3, 5, 20), torch.randn(3, 5, 33), layout.index, 8, 4)
    assert counter.get_total_flops() == 2 * 15 * 20 * 33


def test_opcheck_block_scores(backend):
    layout = random_layout(BlockGrid((20, 33), (8, 4)), 0.4)
    opcheck(OPS.block_scores, (torch.randn(3, 5, 20), torch.randn(3, 5, 33), layout.index, 8, 4))
    layout = random_layout(BlockGrid((12, 6, 3, 2), (4, 4), 2), 0.5)
    opcheck(
        OPS.conv2d_block_scores,
        (torch.randn(2, 12, 3, 8), torch.randn(2, 12, 6, 7), layout.index, 4, 4, *CONV.values()),
    )


def test_block_scores_are_norms_of_absent_blocks(backend, monkeypatch):
    """In panels of a few rows as in one piece: norms of the dense gradient's blocks, -inf where a block is stored."""
    from sparsekern.backends import dense

    for elements in (1 << 22, 1):
        monkeypatch.setattr(dense, "_PANEL_ELEMENTS", elements)
        layout = random_layout(BlockGrid((20, 33), (8, 4)), 0.4, spare=1)
        x, dy = torch.randn(15, 33), torch.randn(15, 20)
        want = layout.grid.to_blocks(dy.t() @ x).flatten(1).norm(dim=1).view(3, 9)
        got = OPS.block_scores(dy, x, layout.index, 8, 4)
        stored = layout.block_mask().view(3, 9)
        torch.testing.assert_close(got, want.masked_fill(stored, -torch.inf))
        layout = random_layout(BlockGrid((12, 6, 3, 2), (4, 4), 2), 0.5)
        x, dy = torch.randn(2, 12, 6, 7, requires_grad=True), torch.randn(2, 12, 3, 8)
        w = torch.zeros(12, 6, 3, 2, requires_grad=True)
        padded = torch.nn.functional.pad(x, (2, 1, 1, 0))
        torch.nn.functional.conv2d(padded, w, None, (2, 1), 0, (1, 2), 2).backward(dy)
        want = layout.grid.to_blocks(w.grad).flatten(1).norm(dim=1).view(layout.grid.shape)
        got = OPS.conv2d_block_scores(dy, x.detach(), layout.index, 4, 4, *CONV.values())
        torch.testing.assert_close(got, want.masked_fill(layout.block_mask(), -torch.inf), rtol=1e-4, atol=1e-5)


def test_block_scores_of_half_precision_do_not_overflow(backend):
    layout = random_layout(BlockGrid((16, 16), (8, 8)), 0.0)
    x, dy = torch.full((2, 16), 300.0, dtype=torch.float16), torch.full((2, 16), 300.0, dtype=torch.float16)
    assert torch.equal(OPS.block_scores(dy, x, layout.index, 8, 8), torch.full((2, 2), 8 * 2 * 9e4))
    layout = random_layout(BlockGrid((8, 8, 1, 1), (8, 8)), 0.0)
    x, dy = (torch.full((2, 8, 1, 1), 300.0, dtype=torch.float16) for _ in range(2))
    geometry = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    got = OPS.conv2d_block_scores(dy, x, layout.index, 8, 8, *geometry)
    torch.testing.assert_close(got, torch.full((1, 1, 1, 1), 8 * 2 * 9e4))
