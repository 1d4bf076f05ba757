"""Triton convolution kernels against dense float64: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern import element_mask as bits
from sparsekern import ops
from sparsekern.backends import ConvGeometry
from sparsekern.layout import BlockGrid, BlockLayout
from sparsekern.ops import _padding4, _pair

from .support import conv2d_reference, random_layout

pytest.importorskip("triton")

from sparsekern.backends.triton.launch import block_scores, conv2d, conv2d_wgrad
from sparsekern.backends.triton.tile import Tile

from .test_triton_linear import BLOCKS, DEVICE, DTYPES, EDGES, assert_close, name, pytestmark  # noqa: F401


def layout_of(shape, block, density, groups=1, **how):
    layout = random_layout(BlockGrid(shape, block, groups), density, **how)
    return BlockLayout(layout.grid, layout.index.to(DEVICE))


def check(
    layout, n, h, w, dtype=torch.float32, *, stride=1, padding=0, dilation=1, bias=True, ctas=0,
    variant="gather", bm=32, bk=32, panel=2, splits=1, holes=None, seed=0,
):  # fmt: skip
    """Forward, dgrad and wgrad of one layer with given tiles."""
    grid = layout.grid
    out, groups = grid.weight_shape[0], grid.groups
    steps, spread = _pair(stride, "stride"), _pair(dilation, "dilation")
    geometry = ConvGeometry(steps, _padding4(padding, grid.kernel_size, steps, spread), spread)
    p, q = geometry.output_size(h, w, grid.kernel_size)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    def image(*shape):
        return randn(*shape).contiguous(memory_format=torch.channels_last)

    x, dy = image(n, grid.weight_shape[1] * groups, h, w), image(n, out, p, q)
    values, b = layout.from_dense(randn(*grid.weight_shape)), randn(out) if bias else None
    tiles = [Tile(variant, bm, min(edge, bk) if variant == "tma" else bk, 1, 4, 3, ctas) for edge in grid.block]
    y = conv2d.forward(x, values, layout.index, b, grid, geometry, tiles[1])
    dx = conv2d.dgrad(dy, values, layout.index, tuple(x.shape), grid, geometry, tiles[0])
    mask = None if holes is None else bits.pack(holes).to(DEVICE)
    dvalues, dbias = conv2d_wgrad.wgrad(
        dy, x, layout.index, mask, bias, grid, geometry, Tile("panel", 16, 0, panel, 4, 3), splits
    )
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)

    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    wide = [None if t is None else t.double().contiguous() for t in (x, layout.to_dense(values), b, dy)]
    expected = conv2d_reference(*wide, **options)
    magnitude = conv2d_reference(*[None if t is None else t.abs() for t in wide], **options)
    assert_close(y, expected["y"], magnitude["y"], "y")
    assert_close(dx, expected["dx"], magnitude["dx"], "dx")
    keep = torch.ones_like(dvalues) if holes is None else holes.to(DEVICE)
    assert_close(dvalues, layout.from_dense(expected["dw"]) * keep, layout.from_dense(magnitude["dw"]), "dvalues")
    assert not dvalues[layout.nnz :].any()
    if bias:
        assert_close(dbias, expected["dbias"], magnitude["dbias"], "dbias")


# Even kernels with padding="same": the dense reference warns about its own copy.
warns_of_copy = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("block", BLOCKS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_blocks(block, dtype):
    """Ragged channels on both sides; several blocks in one stage, one, or a part of one."""
    layout = layout_of((40, 72, 3, 3), block, 0.3, seed=1, spare=2)
    for bk in (16, 64):
        check(layout, 2, 5, 6, dtype, padding=1, bk=bk, panel=max(32 // block[1], 1))


CASES = [
    # weight, groups, h, w, stride, padding, dilation
    ((24, 16, 1, 1), 1, 7, 9, 1, 0, 1),
    ((24, 16, 1, 1), 1, 7, 9, 1, 1, 1),
    ((24, 16, 1, 1), 1, 8, 9, 2, 0, 1),
    ((16, 16, 3, 3), 1, 8, 8, 1, 1, 1),
    ((16, 16, 3, 3), 1, 9, 8, 2, 1, 1),
    ((16, 16, 3, 3), 1, 7, 14, (2, 1), (1, 0), 1),
    ((16, 8, 5, 5), 1, 7, 9, 1, 2, 1),
    ((16, 8, 5, 3), 1, 11, 13, 3, (2, 1), 1),
    ((16, 8, 3, 3), 1, 8, 8, 1, 2, 2),
    ((16, 8, 3, 3), 1, 13, 10, 2, (4, 3), (3, 2)),
    ((16, 8, 1, 7), 1, 4, 12, 1, (0, 3), 1),
    ((16, 8, 2, 2), 1, 9, 9, 2, 0, 1),
    ((16, 8, 3, 3), 1, 3, 3, 1, 0, 1),
    ((16, 8, 3, 3), 1, 1, 1, 1, 1, 1),
    ((16, 8, 3, 3), 1, 4, 4, 1, 5, 1),
    ((16, 8, 3, 3), 1, 5, 5, 4, 1, 1),
    ((96, 24, 3, 3), 3, 5, 6, 1, 1, 1),
    ((80, 20, 3, 3), 2, 5, 5, 2, 1, 1),
    ((64, 32, 1, 1), 2, 5, 5, 1, 0, 1),
    ((16, 8, 3, 3), 1, 9, 10, 1, "same", 2),
    ((16, 8, 2, 4), 1, 6, 7, 1, "same", 1),
    ((16, 8, 3, 3), 1, 6, 7, 2, "valid", 1),
]


@warns_of_copy
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(part).replace(" ", "") for part in c))
@pytest.mark.parametrize("bk", [16, 32])
def test_geometry(case, bk):
    weight, groups, h, w, stride, padding, dilation = case
    layout = layout_of(weight, (16, 16), 0.5, groups, seed=2, spare=1)
    check(layout, 2, h, w, stride=stride, padding=padding, dilation=dilation, bk=bk)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_empty_rows_and_full(density, bias):
    check(layout_of((48, 48, 3, 3), (16, 16), density, seed=4, spare=1), 1, 4, 5, padding=1, bias=bias)


@pytest.mark.parametrize("ctas", [0, 1])
@pytest.mark.parametrize("splits", [1, 3])
def test_many_programs(ctas, splits):
    """Persistent grids, several pixel tiles per image and phase, chunks of images."""
    layout = layout_of((48, 32, 3, 3), (16, 16), 0.4, seed=5)
    check(layout, 3, 7, 6, stride=2, padding=1, ctas=ctas, splits=splits, bm=16, panel=4)


def test_no_images():
    check(layout_of((32, 32, 3, 3), (16, 16), 0.5), 0, 8, 8, padding=1)
    check(layout_of((32, 32, 1, 1), (16, 16), 0.5), 0, 8, 8)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_element_mask(splits, kernel):
    layout = layout_of((40, 24, kernel, kernel), (16, 16), 0.5, spare=1)
    holes = torch.rand(layout.capacity, 16, 16, generator=torch.Generator().manual_seed(5)) < 0.5
    check(layout, 2, 4, 5, padding=kernel // 2, splits=splits, holes=holes)


@pytest.fixture
def by_copy_engine(monkeypatch):
    """Counts the launches that went through descriptors."""
    launches = []
    described = conv2d._described
    monkeypatch.setattr(conv2d, "_described", lambda image, box: launches.append(box) or described(image, box))
    return launches


@pytest.mark.parametrize("block", [b for b in BLOCKS if min(b) >= 32], ids=name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_tma_blocks(block, dtype, by_copy_engine):
    check(layout_of((40, 72, 3, 3), block, 0.4, seed=1, spare=1), 3, 5, 6, dtype, padding=1, variant="tma", bk=64)
    assert len(by_copy_engine) == 4  # x and y, forward and dgrad


@pytest.mark.parametrize(
    ("weight", "groups", "n", "h", "w", "padding", "dilation"),
    [
        ((32, 32, 1, 1), 1, 3, 4, 4, 1, 1),
        ((32, 32, 3, 3), 1, 1, 1, 1, 1, 1),
        ((32, 32, 5, 3), 1, 2, 7, 9, (2, 0), 1),
        ((32, 40, 3, 3), 1, 2, 9, 8, 2, 2),
        ((32, 40, 3, 3), 1, 33, 3, 3, 0, 1),
        ((32, 32, 2, 2), 1, 2, 6, 6, 4, 1),
        ((64, 32, 3, 3), 2, 2, 5, 5, 1, 1),
    ],
)
@pytest.mark.parametrize("ctas", [0, 1])
def test_tma_geometry(weight, groups, n, h, w, padding, dilation, ctas, by_copy_engine):
    """Boxes that hang over the image on every side, more images than a box holds, groups of whole blocks."""
    layout = layout_of(weight, (32, 32), 0.6, groups, seed=3, spare=1)
    check(layout, n, h, w, torch.float16, padding=padding, dilation=dilation, variant="tma", ctas=ctas)
    assert len(by_copy_engine) == 4


@pytest.mark.parametrize(
    ("weight", "groups", "stride"), [((32, 36, 3, 3), 1, 1), ((32, 32, 3, 3), 1, 2), ((48, 24, 3, 3), 2, 1)]
)
def test_tma_falls_back_where_the_copy_engine_cannot(weight, groups, stride, by_copy_engine):
    """Channels that are no multiple of 16 bytes, strides, groups of partial blocks."""
    layout = layout_of(weight, (32, 32), 0.6, groups, seed=3)
    check(layout, 2, 6, 6, torch.float16, padding=1, stride=stride, variant="tma")
    assert not by_copy_engine


@pytest.mark.parametrize("pixels", [16, 128])
@pytest.mark.parametrize("shape", [(128, 32, 32), (256, 14, 14), (256, 7, 7), (1, 1, 1), (3, 5, 9)], ids=str)
def test_box_covers_with_the_least_waste(pixels, shape):
    images, h, w = conv2d.box(*shape, pixels)
    assert images * h * w == pixels

    def computed(*of):
        return torch.tensor([-(-size // side) * side for size, side in zip(shape, of, strict=True)]).prod().item()

    sides = [2**i for i in range(8) if 2**i <= pixels]
    assert computed(images, h, w) == min(
        computed(a, b, pixels // a // b) for a in sides for b in sides if a * b <= pixels
    )


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 32)], ids=name)
@pytest.mark.parametrize(("shape", "groups"), [((40, 24, 3, 3), 1), ((64, 20, 2, 3), 2), ((128, 128, 1, 1), 1)])
def test_block_scores(block, shape, groups):
    grid = BlockGrid(shape, block, groups)
    geometry = ConvGeometry((2, 1), (1, 0, 2, 1), (1, 2))
    p, q = geometry.output_size(6, 7, grid.kernel_size)
    x, dy = torch.randn(2, shape[1] * groups, 6, 7, device=DEVICE), torch.randn(2, shape[0], p, q, device=DEVICE)
    got = block_scores.conv2d_scores(dy, x, grid, geometry, Tile("scores", 16, 0, 128, 4, 3))
    padded = torch.nn.functional.pad(x, (2, 1, 1, 0)).double()
    dw = torch.nn.grad.conv2d_weight(padded, shape, dy.double(), (2, 1), 0, (1, 2), groups)
    want = grid.to_blocks(dw).flatten(1).norm(dim=1).view(grid.shape)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@given(data=st.data())
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_anything(data):
    groups = data.draw(st.integers(1, 2))
    r, s = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    weight = (groups * data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)), r, s)
    block = (data.draw(st.sampled_from(EDGES[:3])), data.draw(st.sampled_from(EDGES[:3])))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation = data.draw(pair), data.draw(pair)
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    h = data.draw(st.integers(max(1, dilation[0] * (r - 1) + 1 - 2 * padding[0]), 10))
    w = data.draw(st.integers(max(1, dilation[1] * (s - 1) + 1 - 2 * padding[1]), 10))
    layout = layout_of(weight, block, data.draw(st.floats(0, 1)), groups, seed=data.draw(st.integers(0, 99)))
    check(
        layout,
        data.draw(st.integers(0, 2)),
        h,
        w,
        data.draw(st.sampled_from(DTYPES)),
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=data.draw(st.booleans()),
        bk=data.draw(st.sampled_from([16, 32, 64])),
        panel=data.draw(st.sampled_from([1, 2])),
        splits=data.draw(st.integers(1, 3)),
    )


# -- through the public functions --------------------------------------------------------------------------------------


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")
    ops._warn_of_conversion.cache_clear()


CONV_OPTIONS = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
def test_public_function_and_gradients(forced, dtype, channels_last):
    layout = layout_of((64, 24, 3, 3), (32, 16), 0.4, 2, seed=4, spare=1)
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 48, 6, 7, device=DEVICE).to(dtype).contiguous(memory_format=fmt).requires_grad_()
    values = layout.from_dense(torch.randn(64, 24, 3, 3, device=DEVICE).to(dtype)).requires_grad_()
    b = torch.randn(64, device=DEVICE).to(dtype).requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = sk.sparse_conv2d(x, values, layout, b, **CONV_OPTIONS)
    told = [str(w.message) for w in caught if "channels_last" in str(w.message)]
    assert len(told) == (0 if channels_last else 1)
    assert all("model.to(memory_format=torch.channels_last)" in text for text in told)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad.is_contiguous(memory_format=fmt)
    wide = [t.detach().double().contiguous() for t in (x, layout.to_dense(values.detach()), b, dy)]
    expected = conv2d_reference(*wide, **CONV_OPTIONS)
    magnitude = conv2d_reference(*[t.abs() for t in wide], **CONV_OPTIONS)
    assert_close(y.detach(), expected["y"], magnitude["y"], "y")
    assert_close(x.grad, expected["dx"], magnitude["dx"], "dx")
    assert_close(values.grad, layout.from_dense(expected["dw"]), layout.from_dense(magnitude["dw"]), "dvalues")
    assert_close(b.grad, expected["dbias"], magnitude["dbias"], "dbias")


def test_scores_op_marks_stored_blocks(forced):
    layout = layout_of((64, 24, 3, 3), (32, 16), 0.4, 2, seed=4, spare=1)
    x, dy = torch.randn(2, 48, 6, 7, device=DEVICE), torch.randn(2, 64, 6, 7, device=DEVICE)
    geometry = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2)
    got = torch.ops.sparsekern.conv2d_block_scores(dy, x, layout.index, 32, 16, *geometry)
    dw = torch.nn.grad.conv2d_weight(x.double(), (64, 24, 3, 3), dy.double(), 1, 1, 1, 2)
    want = layout.grid.to_blocks(dw).flatten(1).norm(dim=1).view(layout.grid.shape)
    stored = layout.block_mask()
    assert stored.any() and torch.isneginf(got[stored]).all()
    torch.testing.assert_close(got[~stored].double(), want[~stored], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {}], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
def test_module(forced, options, channels_last):
    """A module trains one step like its dense twin: string padding, other padding modes, an unbatched image."""
    torch.manual_seed(0)
    dense = torch.nn.Conv2d(32, 48, 3, device=DEVICE, **options)
    layout = layout_of((48, 32, 3, 3), (16, 16), 0.5)
    sparse = sk.SparseConv2d.from_dense(dense, layout.mask(), block=16)
    twin = sk.SparseConv2d.from_dense(dense, layout.mask(), block=16).to_dense()
    x = torch.randn(2, 32, 6, 7, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, want = sparse(x), twin(x)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sparse(x[0]), twin(x[0]), rtol=1e-4, atol=1e-4)
        (y.square().sum() + want.square().sum()).backward()
    torch.testing.assert_close(
        sparse.layout.to_dense(sparse.values.grad), twin.weight.grad * layout.mask(), rtol=1e-3, atol=1e-3
    )


def test_compiles_as_one_graph(forced):
    """The conversion of an NCHW image is inside the graph; the choice of backend is a constant of it."""
    layout = layout_of((32, 32, 3, 3), (16, 16), 0.5)
    values = layout.from_dense(torch.randn(32, 32, 3, 3, device=DEVICE))
    x = torch.randn(2, 32, 6, 7, device=DEVICE)
    compiled = torch.compile(
        lambda image: sk.sparse_conv2d(image, values, layout, None, 1, 1), fullgraph=True, backend="aot_eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x), sk.sparse_conv2d(x, values, layout, None, 1, 1))


def test_explain_tells_the_tile_of_each_pass(forced):
    """With an example input: every pass of every layer, unbatched images and leading dimensions too."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(32, 64, 3, padding="same", device=DEVICE)
    linear = torch.nn.Linear(64, 48, device=DEVICE)
    layout, flat = layout_of((64, 32, 3, 3), (32, 32), 0.3), layout_of((48, 64), (16, 32), 0.3)
    model = torch.nn.Sequential(
        sk.SparseConv2d.from_dense(conv, layout.mask(), block=32),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        sk.SparseLinear.from_dense(linear, flat.mask(), block=(16, 32)),
    )
    x = torch.randn(2, 32, 6, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    text = sk.explain(model, x)
    assert text.count("triton: chosen") == 2
    for step in ("forward", "dgrad", "wgrad"):
        assert len(re.findall(rf"{step}: triton \w+ tile .* \(model for \w+: kernel \d+ us, dense \d+ us\)", text)) == 2
    assert "tile" not in sk.explain(model)
    assert "forward: " in sk.explain(model[0], x[0])
