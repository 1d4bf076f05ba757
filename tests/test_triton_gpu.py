"""What only a GPU can show: every shipped tile compiled and run, CUDA graphs, compile, no host syncs, memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.backends import ConvGeometry

from .gpu_support import (
    BOUNDS,
    DTYPES,
    capture,
    draw,
    long_layer,
    memory_of_a_step,
    on_gpu,
    other_blocks,
    training_layer,
)
from .support import assert_within, conv2d_reference

pytest.importorskip("triton")

from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.problem import Problem
from sparsekern.backends.triton import model, tiles

pytestmark = pytest.mark.gpu


def shipped(main):
    """Tiles of bf16 and square blocks (``main``), or all others: over a thousand, each compiled by its first test."""
    arch = chips.current("cuda").arch if torch.cuda.is_available() else 80
    every = tiles.shipped(arch)
    return [(p, tile) for p, tile in every if (p.dtype == "bfloat16" and p.block[0] == p.block[1]) == main]


def tile_id(case):
    problem, tile = case
    bo, bi = problem.block
    return (
        f"{problem.op}-{problem.dtype}-{bo}x{bi}-{tile.variant}-{tile.bm}x{tile.bk}x{tile.panel}-"
        f"w{tile.warps}s{tile.stages}c{tile.ctas}"
    )


@pytest.mark.parametrize("case", shipped(main=True), ids=tile_id)
def test_main_tiles(case, cuda_precision):
    """Each tile at a ragged shape of several programs; the memory behind the outputs starts as NaN."""
    check_tile(*case, cuda_precision)


@pytest.mark.parametrize("case", shipped(main=False), ids=tile_id)
def test_other_tiles(case, cuda_precision):
    check_tile(*case, cuda_precision)


def check_tile(problem, tile, ask):
    ask("tf32" if problem.dtype == "tf32" else "ieee")
    if problem.op.startswith("conv2d"):
        for stride in (1, 2):
            check_conv2d_tile(problem, tile, stride)
    else:
        check_linear_tile(problem, tile)


def check_linear_tile(problem, tile):
    from sparsekern.backends.triton.launch import block_scores, linear, linear_wgrad

    dtype, bound = DTYPES[problem.dtype], BOUNDS[problem.dtype]
    layout = on_gpu((520, 648), problem.block, 0.3, seed=1, spare=2)
    x, dy, bias = draw(300, 648, dtype=dtype), draw(300, 520, dtype=dtype), draw(520, dtype=dtype)
    values = layout.from_dense(draw(520, 648, dtype=dtype))
    w = layout.to_dense(values).double()
    if problem.op == "linear_forward":
        y = linear.forward(x, values, layout.index, bias, layout.grid, tile)
        magnitude = x.double().abs() @ w.abs().t() + bias.double().abs()
        assert_within(y, x.double() @ w.t() + bias.double(), magnitude, "y", bound)
    elif problem.op == "linear_dgrad":
        dx = linear.dgrad(dy, values, layout.index, layout.grid, tile)
        assert_within(dx, dy.double() @ w, dy.double().abs() @ w.abs(), "dx", bound)
    elif problem.op == "linear_wgrad":
        want = layout.from_dense(dy.double().t() @ x.double())
        magnitude = layout.from_dense(dy.double().abs().t() @ x.double().abs())
        for splits in (1, 3):
            dvalues, dbias = linear_wgrad.wgrad(dy, x, layout.index, None, True, layout.grid, tile, splits)
            assert_within(dvalues, want, magnitude, "dvalues", bound)
            assert_within(dbias, dy.double().sum(0), dy.double().abs().sum(0), "dbias", bound)
            assert not dvalues[layout.nnz :].any()
    else:
        got = block_scores.scores(dy, x, layout.grid, tile)
        want = layout.grid.to_blocks(dy.double().t() @ x.double()).flatten(1).norm(dim=1).view(got.shape)
        torch.testing.assert_close(got.double(), want, rtol=1e-2 if problem.dtype == "tf32" else 1e-4, atol=1e-3)


def check_conv2d_tile(problem, tile, stride):
    from sparsekern.backends.triton.launch import block_scores, conv2d, conv2d_wgrad

    dtype, bound = DTYPES[problem.dtype], BOUNDS[problem.dtype]
    weight, geometry = (136, 168, 3, 3), ConvGeometry((stride, stride), (1, 1, 1, 1), (1, 1))
    layout = on_gpu(weight, problem.block, 0.3, seed=1, spare=2)
    p, q = geometry.output_size(14, 13, (3, 3))

    def image(*shape):
        return draw(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    x, dy, bias = image(5, 168, 14, 13), image(5, 136, p, q), draw(136, dtype=dtype)
    values = layout.from_dense(draw(*weight, dtype=dtype))
    wide = [t.double().contiguous() for t in (x, layout.to_dense(values), bias, dy)]
    expected = conv2d_reference(*wide, stride=stride, padding=1)
    magnitude = conv2d_reference(*[t.abs() for t in wide], stride=stride, padding=1)
    if problem.op == "conv2d_forward":
        y = conv2d.forward(x, values, layout.index, bias, layout.grid, geometry, tile)
        assert_within(y, expected["y"], magnitude["y"], "y", bound)
    elif problem.op == "conv2d_dgrad":
        dx = conv2d.dgrad(dy, values, layout.index, tuple(x.shape), layout.grid, geometry, tile)
        assert_within(dx, expected["dx"], magnitude["dx"], "dx", bound)
    elif problem.op == "conv2d_wgrad":
        want, most = layout.from_dense(expected["dw"]), layout.from_dense(magnitude["dw"])
        for splits in (1, 3):
            dvalues, dbias = conv2d_wgrad.wgrad(dy, x, layout.index, None, True, layout.grid, geometry, tile, splits)
            assert_within(dvalues, want, most, "dvalues", bound)
            assert_within(dbias, expected["dbias"], magnitude["dbias"], "dbias", bound)
            assert not dvalues[layout.nnz :].any()
    else:
        got = block_scores.conv2d_scores(dy, x, layout.grid, geometry, tile)
        want = layout.grid.to_blocks(expected["dw"]).flatten(1).norm(dim=1).view(got.shape)
        torch.testing.assert_close(got.double(), want, rtol=1e-2 if problem.dtype == "tf32" else 1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_no_host_sync(backend, monkeypatch):
    """A step, a topology update and a score pass leave the host free."""
    monkeypatch.setenv("SPARSEKERN_BACKEND", backend)
    layer, x, dy = training_layer(), draw(256, 512, dtype=torch.bfloat16), draw(256, 768, dtype=torch.bfloat16)
    x.requires_grad_()
    layer(x).backward(dy)  # compiles
    torch.ops.sparsekern.block_scores(dy, x.detach(), layer.layout.index, 32, 32)
    mask = other_blocks(layer)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(dy)
        torch.ops.sparsekern.block_scores(dy, x.detach(), layer.layout.index, 32, 32)
        layer.layout.update_(mask, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_survives_a_topology_update(monkeypatch):
    """A captured step reads the layout's buffers: after an update in place its replay uses the new blocks."""
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")
    layer, x, dy = training_layer(), draw(256, 512, dtype=torch.bfloat16), draw(256, 768, dtype=torch.bfloat16)
    x.requires_grad_()
    parameters = [x, layer.values, layer.bias]

    def step():
        y = layer(x)
        return (y, *torch.autograd.grad(y, parameters, dy))

    graph, captured = capture(step)
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
        layer.layout.update_(other_blocks(layer), check=False)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_compile_once():
    """Full graph, and no recompilation after a topology update."""
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, x = training_layer(), draw(256, 512, dtype=torch.bfloat16).requires_grad_()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(3):
        y = compiled(x)
        y.float().square().mean().backward()
        torch.testing.assert_close(y, layer(x), rtol=2e-2, atol=2e-2)
        layer.layout.update_(other_blocks(layer), check=False)
    assert counter.frame_count == 1


def test_compile_with_cuda_graphs():
    """``mode="reduce-overhead"`` replays graphs that read the layout anew."""
    layer, x = training_layer(), draw(256, 512, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x).clone(), layer(x), rtol=2e-2, atol=2e-2)
            layer.layout.update_(other_blocks(layer), check=False)


def test_nothing_dense_is_allocated(monkeypatch):
    """At 98 % a training step of a 4096 x 4096 layer stays under a quarter of the dense weight in extra memory."""
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")
    assert memory_of_a_step() < 4096 * 4096 * 2 / 4


def test_large_offsets():
    """Activations beyond 2^31 elements: row offsets are 64 bits wide."""
    layout, values, x = long_layer()
    y = sk.sparse_linear(x, values, layout)
    w = layout.to_dense(values).double()
    tail = x[-64:].double()
    assert_within(y[-64:], tail @ w.t(), tail.abs() @ w.abs().t(), "y", 2**-8)


def test_split_count_is_positive_everywhere():
    chip = chips.current("cuda")
    for problem, tile in tiles.shipped(chip.arch):
        if problem.op == "linear_wgrad":
            for m in (1, 100, 100_000):
                asked = Problem(problem.op, problem.dtype, problem.block, m, 520, 648, 10)
                assert model.splits(asked, tile, chip) >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolution_trains_under_autocast_in_a_graph(dtype, monkeypatch):
    """AMP, channels_last, a captured step: equal to the eager step, and near the dense twin."""
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")
    dense = nn.Conv2d(64, 96, 3, padding=1, device="cuda").to(memory_format=torch.channels_last)
    layout = on_gpu((96, 64, 3, 3), (32, 32), 0.4)
    sparse = sk.SparseConv2d.from_dense(dense, layout.mask(), block=32)
    twin = sparse.to_dense()
    x = draw(8, 64, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()

    def step(module, leaves):
        with torch.autocast("cuda", dtype=dtype):
            y = module(x)
        return (y, *torch.autograd.grad(y.float().square().mean(), leaves))

    for _ in range(3):
        step(sparse, [x, sparse.values])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(sparse, [x, sparse.values])
    graph.replay()
    eager = step(sparse, [x, sparse.values])
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    y, dx, dw = step(twin, [x, twin.weight])
    torch.testing.assert_close(eager[0], y, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(eager[1], dx, rtol=5e-2, atol=1e-4)
    torch.testing.assert_close(sparse.layout.to_dense(eager[2]), dw * sparse.mask, rtol=5e-2, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu():
    """Tensors on a device that is not the current one."""
    layer, x = training_layer().to("cuda:1"), torch.randn(64, 512, device="cuda:1", dtype=torch.bfloat16)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert y.device == x.grad.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    torch.testing.assert_close(y, layer.to_dense()(x), rtol=2e-2, atol=2e-2)
