"""Every operator against dense float64: forward and all gradients, through the public functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern import element_mask as bits
from sparsekern.layout import BlockGrid, BlockLayout

from .support import assert_within, conv2d_reference, linear_reference, random_layout

BLOCKS = [
    (1, 1), (2, 2), (3, 5), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (128, 128), (1, 16), (16, 1), (8, 1), (1, 8),
    (7, 3), (12, 20), (24, 16), (32, 8), (8, 32), (48, 48), (100, 7), (128, 16), (17, 33),
]  # fmt: skip


@pytest.fixture(params=["cpu", "dense"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", request.param)
    return request.param


def check_linear(layout, m, *, bias=True, lead=(), x_slice=0, seed=0, holes=None):
    generator = torch.Generator().manual_seed(seed)
    out, inp = layout.grid.weight_shape

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x = randn(*lead, m, inp + x_slice)[..., :inp].requires_grad_()
    values = layout.from_dense(randn(out, inp))
    element_mask = None
    if holes is not None:
        values, element_mask = values * holes, bits.pack(holes)
    values.requires_grad_()
    b = randn(out).requires_grad_() if bias else None
    dy = randn(*lead, m, out + x_slice)[..., :out]
    y = sk.sparse_linear(x, values, layout, b, element_mask=element_mask)
    y.backward(dy)

    w = layout.to_dense(values.detach())
    wide = [None if t is None else t.detach().double() for t in (x, w, b, dy)]
    expected = linear_reference(*wide)
    magnitude = linear_reference(*[None if t is None else t.abs() for t in wide])
    assert_within(y.detach(), expected["y"], magnitude["y"], "y")
    assert_within(x.grad, expected["dx"], magnitude["dx"], "dx")
    stored = layout.from_dense(expected["dw"])
    stored = stored if holes is None else stored * holes
    assert_within(values.grad, stored, layout.from_dense(magnitude["dw"]), "dvalues")
    assert not values.grad[layout.nnz :].any()
    if b is not None:
        assert_within(b.grad, expected["dbias"], magnitude["dbias"], "dbias")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize(("m", "out", "inp"), [(33, 150, 200), (64, 128, 128), (7, 131, 77)])
def test_linear_blocks(block, m, out, inp):
    check_linear(random_layout(BlockGrid((out, inp), block), 0.3, seed=m, spare=2), m)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 15, 16, 17, 63, 129, 300])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 16), (32, 32)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_linear_rows(m, block):
    check_linear(random_layout(BlockGrid((96, 160), block), 0.25, seed=m), m)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("block", [(1, 1), (3, 5), (8, 8), (16, 16), (32, 64)], ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("bias", [True, False])
def test_linear_empty_rows_and_full(density, block, bias):
    check_linear(random_layout(BlockGrid((70, 90), block), density, seed=3, spare=1), 20, bias=bias)


def test_linear_leading_dimensions_and_strides():
    layout = random_layout(BlockGrid((40, 48), (8, 8)), 0.4)
    check_linear(layout, 5, lead=(2, 3))
    check_linear(layout, 5, lead=(2,), x_slice=7)
    x = torch.randn(48, 9).t()  # features not contiguous
    values = layout.from_dense(torch.randn(40, 48))
    assert_within(
        sk.sparse_linear(x, values, layout),
        x.double() @ layout.to_dense(values).double().t(),
        x.double().abs() @ layout.to_dense(values).double().abs().t(),
        "y",
    )
    y = sk.sparse_linear(torch.randn(48), values, layout)
    assert y.shape == (40,)


def test_expanded_gradient():
    layout = random_layout(BlockGrid((40, 48), (8, 8)), 0.4)
    values = layout.from_dense(torch.randn(40, 48)).requires_grad_()
    x = torch.randn(6, 48, requires_grad=True)
    sk.sparse_linear(x, values, layout).sum().backward()  # its gradient has stride 0
    w = layout.to_dense(values.detach())
    torch.testing.assert_close(x.grad, w.sum(0).expand(6, 48), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [(4, 4), (16, 16), (3, 5)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_element_mask_stops_learning(block):
    layout = random_layout(BlockGrid((50, 60), block), 0.5, spare=1)
    holes = torch.rand(layout.capacity, *block, generator=torch.Generator().manual_seed(5)) < 0.5
    holes[layout.nnz :] = True
    check_linear(layout, 21, holes=holes)


def check_conv2d(layout, n, h, w, *, stride=1, padding=0, dilation=1, channels_last=False, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    grid = layout.grid
    out, groups = grid.weight_shape[0], grid.groups
    x = torch.randn(n, grid.weight_shape[1] * groups, h, w, generator=generator).contiguous(memory_format=fmt)
    x.requires_grad_()
    values = layout.from_dense(torch.randn(grid.weight_shape, generator=generator)).requires_grad_()
    b = torch.randn(out, generator=generator).requires_grad_() if bias else None
    y = sk.sparse_conv2d(x, values, layout, b, stride, padding, dilation, groups)
    dy = torch.randn(y.shape, generator=generator).contiguous(memory_format=fmt)
    y.backward(dy)

    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    wide = [None if t is None else t.detach().double() for t in (x, layout.to_dense(values), b, dy)]
    expected = conv2d_reference(*wide, **geometry)
    magnitude = conv2d_reference(*[None if t is None else t.abs() for t in wide], **geometry)
    assert_within(y.detach(), expected["y"], magnitude["y"], "y")
    assert_within(x.grad, expected["dx"], magnitude["dx"], "dx")
    assert_within(values.grad, layout.from_dense(expected["dw"]), layout.from_dense(magnitude["dw"]), "dvalues")
    assert not values.grad[layout.nnz :].any()
    if b is not None:
        assert_within(b.grad, expected["dbias"], magnitude["dbias"], "dbias")
    if n and min(y.shape[1:]) > 1 and min(x.shape[1:]) > 1:
        assert y.is_contiguous(memory_format=fmt)
        assert x.grad.is_contiguous(memory_format=fmt)


FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
@FORMATS
def test_conv2d_blocks(block, channels_last):
    layout = random_layout(BlockGrid((40, 36, 3, 3), block), 0.3, seed=1, spare=2)
    check_conv2d(layout, 2, 9, 11, padding=1, channels_last=channels_last)


# Even kernels with padding="same": the dense reference warns about its own copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CONV_CASES = [
    # weight, groups, h, w, stride, padding, dilation
    ((24, 16, 1, 1), 1, 7, 9, 1, 0, 1),
    ((24, 16, 1, 1), 1, 8, 9, 2, 0, 1),
    ((16, 16, 3, 3), 1, 8, 8, 1, 1, 1),
    ((16, 16, 3, 3), 1, 16, 16, 2, 1, 1),
    ((16, 16, 3, 3), 1, 7, 14, (2, 1), (1, 0), 1),
    ((16, 8, 5, 5), 1, 11, 13, 1, 2, 1),
    ((16, 8, 5, 3), 1, 11, 13, 3, (2, 1), 1),
    ((16, 8, 3, 3), 1, 12, 12, 1, 2, 2),
    ((16, 8, 3, 3), 1, 15, 10, 2, (4, 3), (3, 2)),
    ((16, 8, 1, 7), 1, 6, 18, 1, (0, 3), 1),
    ((16, 8, 2, 2), 1, 9, 9, 2, 0, 1),
    ((16, 8, 3, 3), 1, 3, 3, 1, 0, 1),
    ((16, 8, 3, 3), 1, 1, 1, 1, 1, 1),
    ((16, 8, 3, 3), 1, 4, 4, 1, 5, 1),
    ((24, 6, 3, 3), 4, 8, 10, 1, 1, 1),
    ((24, 12, 3, 3), 2, 9, 9, 2, 1, 1),
    ((20, 10, 3, 3), 1, 32, 32, 1, 1, 1),
    ((10, 5, 3, 3), 1, 14, 7, 1, 1, 1),
    ((130, 66, 3, 3), 1, 5, 6, 1, 1, 1),
    ((16, 8, 3, 3), 1, 40, 50, 1, "same", 2),
    ((16, 8, 2, 4), 1, 10, 11, 1, "same", 1),
    ((16, 8, 3, 3), 1, 10, 11, 2, "valid", 1),
]


@pytest.mark.parametrize("case", CONV_CASES, ids=lambda c: "-".join(str(part).replace(" ", "") for part in c))
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 16), (5, 3)], ids=lambda b: f"{b[0]}x{b[1]}")
@FORMATS
def test_conv2d_geometry(case, block, channels_last):
    weight, groups, h, w, stride, padding, dilation = case
    layout = random_layout(BlockGrid(weight, block, groups), 0.35, seed=2, spare=1)
    check_conv2d(layout, 3, h, w, stride=stride, padding=padding, dilation=dilation, channels_last=channels_last)


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
@FORMATS
def test_conv2d_empty_rows_and_full(density, channels_last):
    layout = random_layout(BlockGrid((32, 32, 3, 3), (8, 8)), density, seed=4, spare=1)
    check_conv2d(layout, 2, 8, 8, padding=1, channels_last=channels_last, bias=density != 1.0)


@FORMATS
def test_conv2d_no_images(channels_last):
    layout = random_layout(BlockGrid((8, 8, 3, 3), (4, 4)), 0.5)
    check_conv2d(layout, 0, 8, 8, padding=1, channels_last=channels_last)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_linear_anything(data):
    block = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    grid = BlockGrid((data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))), block)
    layout = random_layout(
        grid, data.draw(st.floats(0, 1)), seed=data.draw(st.integers(0, 99)), spare=data.draw(st.integers(0, 2))
    )
    check_linear(
        layout, data.draw(st.integers(0, 70)), bias=data.draw(st.booleans()), x_slice=data.draw(st.integers(0, 3))
    )


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_conv2d_anything(data):
    groups = data.draw(st.integers(1, 3))
    r, s = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    weight = (groups * data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)), r, s)
    block = (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation = data.draw(pair), data.draw(pair)
    padding = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    h = data.draw(st.integers(max(1, dilation[0] * (r - 1) + 1 - 2 * padding[0]), 18))
    w = data.draw(st.integers(max(1, dilation[1] * (s - 1) + 1 - 2 * padding[1]), 18))
    layout = random_layout(
        BlockGrid(weight, block, groups), data.draw(st.floats(0, 1)), seed=data.draw(st.integers(0, 99))
    )
    check_conv2d(
        layout,
        data.draw(st.integers(0, 3)),
        h,
        w,
        stride=stride,
        padding=padding,
        dilation=dilation,
        channels_last=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block", [(1, 1), (8, 8), (32, 32)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_deterministic(threads, block, backend):
    layout = random_layout(BlockGrid((256, 192), block), 0.2)
    values = layout.from_dense(torch.randn(256, 192))
    x, dy = torch.randn(500, 192), torch.randn(500, 256)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [
            (
                sk.sparse_linear(x, values, layout),
                *torch.ops.sparsekern.linear_wgrad(dy, x, layout.index, *values.shape, True),
            )
            for _ in range(3)
        ]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Low precision inputs round once: the error is that of the output's own rounding."""
    layout = random_layout(BlockGrid((64, 96), (16, 16)), 0.4)
    values, x = layout.from_dense(torch.randn(64, 96)).to(dtype), torch.randn(20, 96).to(dtype)
    w = layout.to_dense(values).double()
    magnitude = x.double().abs() @ w.abs().t()
    y = sk.sparse_linear(x, values, layout)
    assert y.dtype == dtype
    assert_within(y, x.double() @ w.t(), magnitude, "y", bound=torch.finfo(dtype).eps)


def test_float64_is_exact_enough(backend, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "auto")
    layout = random_layout(BlockGrid((64, 96), (16, 16)), 0.4)
    values, x = layout.from_dense(torch.randn(64, 96).double()), torch.randn(20, 96).double()
    torch.testing.assert_close(sk.sparse_linear(x, values, layout), x @ layout.to_dense(values).t())


def test_forced_backend_refuses_what_it_cannot_do(backend):
    layout = random_layout(BlockGrid((64, 96), (16, 16)), 0.4)
    values, x = layout.from_dense(torch.randn(64, 96).double()), torch.randn(20, 96).double()
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
            sk.sparse_linear(x, values, layout)
    else:
        assert sk.sparse_linear(x, values, layout).dtype == torch.float64


def test_layout_of_another_block_mask_uses_the_same_values():
    """After an update in place the kernels read the new layout."""
    layout = random_layout(BlockGrid((64, 64), (8, 8)), 0.3)
    values = layout.from_dense(torch.randn(64, 64))
    x = torch.randn(10, 64)
    other = torch.zeros(64, dtype=torch.bool)
    other[torch.randperm(64)[: layout.nnz]] = True
    layout.update_(other)
    expected = x @ BlockLayout(layout.grid, layout.index).to_dense(values).t()
    torch.testing.assert_close(sk.sparse_linear(x, values, layout), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (8, 8)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_large_outputs(block):
    """A million elements and more are stored past the caches: forward and dgrad, with bias and a partial last block."""
    check_linear(random_layout(BlockGrid((1000, 1024), block), 0.05), 1051)
    for weight, groups in (((32, 48, 3, 3), 1), ((64, 16, 3, 3), 2)):
        layout = random_layout(BlockGrid(weight, block, groups), 0.2)
        check_conv2d(layout, 15, 48, 49, padding=1, channels_last=True)
