"""Triton linear kernels against dense float64: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern import element_mask as bits
from sparsekern.layout import BlockGrid, BlockLayout, union_rows

from .support import BOUND, assert_within, linear_reference, random_layout

pytest.importorskip("triton")

from sparsekern.backends.triton.launch import block_scores, linear, linear_wgrad
from sparsekern.backends.triton.tile import Tile

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [pytest.mark.gpu] if GPU else []

EDGES = (16, 32, 64, 128)
BLOCKS = [(bo, bi) for bo in EDGES for bi in EDGES]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The output is rounded once (fp16 below its smallest normal number by an absolute step); the interpreter truncates to
# bf16, a GPU rounds.
BOUNDS = {torch.float32: BOUND, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def assert_close(actual, expected, magnitude, what):
    floor = torch.finfo(actual.dtype).smallest_normal
    assert_within(actual, expected, magnitude.clamp_min(floor), what, BOUNDS[actual.dtype])


def name(value):
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value).removeprefix("torch.")


def operands(layout, m, dtype, *, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    out, inp = layout.grid.weight_shape

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return randn(m, inp), layout.from_dense(randn(out, inp)), randn(out) if bias else None, randn(m, out)


def layout_of(shape, block, density, **how):
    layout = random_layout(BlockGrid(shape, block), density, **how)
    return BlockLayout(layout.grid, layout.index.to(DEVICE))


def check_product(layout, m, dtype, variant, bm, bk, *, bias=True, ctas=0, seed=0):
    """Forward and dgrad with tiles of one variant, where the block has it."""
    x, values, b, dy = operands(layout, m, dtype, seed=seed, bias=bias)
    w = layout.to_dense(values).double()
    zero = torch.zeros(layout.grid.weight_shape[0], device=DEVICE, dtype=torch.float64)
    wide = zero if b is None else b.double()
    expected = linear_reference(x.double(), w, wide, dy.double())
    magnitude = linear_reference(x.double().abs(), w.abs(), wide.abs(), dy.double().abs())
    bo, bi = layout.grid.block
    ran = 0
    for what, n, k in (("y", bo, bi), ("dx", bi, bo)):
        if variant == "union" and not union_rows(n):
            continue
        depth = bk if variant == "gather" else min(k, 64)
        tile = Tile(variant, bm, depth, union_rows(n) if variant == "union" else 1, 4, 3, ctas)
        if what == "y":
            got = linear.forward(x, values, layout.index, b, layout.grid, tile)
        else:
            got = linear.dgrad(dy, values, layout.index, layout.grid, tile)
        assert got.dtype == dtype
        assert_close(got, expected[what], magnitude[what], f"{what} {tile}")
        ran += 1
    return ran


@pytest.mark.parametrize("block", BLOCKS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gather_blocks(block, dtype):
    """Several blocks in one stage, one, or a part of one; ragged features on both sides."""
    layout = layout_of((150, 200), block, 0.4, seed=1, spare=2)
    for bk in (16, 64) if block != (16, 16) else (16, 32, 64, 128):
        assert check_product(layout, 37, dtype, "gather", 32, bk) == 2


@pytest.mark.parametrize("block", BLOCKS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_tma_blocks(block, dtype):
    """Descriptors clip ragged features (multiples of 8: the copy engine counts in 16 bytes) and tokens."""
    assert check_product(layout_of((152, 200), block, 0.4, seed=1, spare=2), 37, dtype, "tma", 32, 0) == 2


@pytest.mark.parametrize("block", [b for b in BLOCKS if min(b) <= 32], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_union_blocks(block, dtype, density):
    assert check_product(layout_of((150, 200), block, density, seed=1, spare=2), 37, dtype, "union", 32, 0)


@pytest.mark.parametrize("m", [0, 1, 2, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("variant", ["gather", "tma", "union"])
@pytest.mark.parametrize("ctas", [0, 1])
def test_tokens(m, variant, ctas):
    """Few, odd and no tokens, one program per tile and a persistent grid."""
    layout = layout_of((96, 160), (16, 32), 0.3, seed=m)
    check_product(layout, m, torch.float16, variant, 16, 32, ctas=ctas)


@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("variant", ["gather", "tma", "union"])
@pytest.mark.parametrize("bias", [True, False])
def test_empty_rows_and_full(density, variant, bias):
    """Rows and columns without blocks give the bias and zeros; a layout without any block does too."""
    layout = layout_of((160, 208), (32, 16), density, seed=3, spare=1)
    check_product(layout, 19, torch.float16, variant, 16, 64, bias=bias)
    check_product(layout_of((160, 208), (32, 16), 0.0), 19, torch.float16, variant, 16, 64, bias=bias)


@pytest.mark.parametrize("variant", ["gather", "tma", "union"])
@pytest.mark.parametrize("shape", [(16, 16), (5, 7), (1, 128), (128, 1)], ids=name)
def test_one_block(variant, shape):
    check_product(layout_of(shape, (16, 16), 1.0), 9, torch.float32, variant.replace("tma", "gather"), 16, 16)
    check_product(layout_of(shape, (128, 32), 1.0), 9, torch.float16, variant, 16, 32)


def test_tma_falls_back_where_the_copy_engine_cannot_address():
    """Rows that are no multiple of 16 bytes, or a base that is not: same result through pointers."""
    layout = layout_of((150, 203), (64, 64), 0.5)
    assert check_product(layout, 20, torch.float16, "tma", 16, 0) == 2
    layout = layout_of((64, 64), (64, 64), 1.0)
    x, values, _, _ = operands(layout, 9, torch.float16)
    odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    tile = Tile("tma", 16, 64, 1, 4, 3)
    even = linear.forward(x, values, layout.index, None, layout.grid, tile)
    assert torch.equal(linear.forward(odd, values, layout.index, None, layout.grid, tile), even)


def test_strides_and_what_is_not_read():
    """Sliced and transposed activations; features that no block reads may hold anything."""
    layout = layout_of((64, 96), (16, 16), 0.3, seed=5)
    x, values, _, _ = operands(layout, 21, torch.float32)
    tile = Tile("gather", 16, 64, 1, 4, 3)
    want = linear.forward(x, values, layout.index, None, layout.grid, tile)
    wide = torch.cat([x, x], 1)
    assert torch.equal(linear.forward(wide[:, :96], values, layout.index, None, layout.grid, tile), want)
    assert torch.equal(linear.forward(x.t().contiguous().t(), values, layout.index, None, layout.grid, tile), want)
    unread = ~layout.mask().any(0)
    if not unread.any():
        layout = layout_of((64, 96), (16, 16), 0.05, seed=6)
        unread = ~layout.mask().any(0)
        values = layout.from_dense(torch.randn(64, 96, device=DEVICE))
        want = linear.forward(x, values, layout.index, None, layout.grid, tile)
    x[:, unread] = torch.nan
    assert unread.any() and torch.equal(linear.forward(x, values, layout.index, None, layout.grid, tile), want)


# -- wgrad -------------------------------------------------------------------------------------------------------------


def check_wgrad(layout, m, dtype, bt, panel, splits, *, bias=True, holes=None, seed=0):
    x, _, _, dy = operands(layout, m, dtype, seed=seed)
    mask = None if holes is None else bits.pack(holes).to(DEVICE)
    tile = Tile("panel", bt, 0, panel, 4, 3)
    dvalues, dbias = linear_wgrad.wgrad(dy, x, layout.index, mask, bias, layout.grid, tile, splits)
    expected = layout.from_dense(dy.double().t() @ x.double())
    magnitude = layout.from_dense(dy.double().abs().t() @ x.double().abs())
    if holes is not None:
        expected = expected * holes.to(DEVICE)
    assert dvalues.dtype == dtype
    assert_close(dvalues, expected, magnitude, f"dvalues {tile} {splits}")
    assert not dvalues[layout.nnz :].any()
    if bias:
        assert_close(dbias, dy.double().sum(0), dy.double().abs().sum(0), "dbias")
    else:
        assert dbias.shape == (0,)


@pytest.mark.parametrize("block", BLOCKS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_wgrad_blocks(block, dtype):
    layout = layout_of((150, 200), block, 0.4, seed=1, spare=3)
    check_wgrad(layout, 37, dtype, 16, max(64 // block[1], 1), 1)
    check_wgrad(layout, 37, dtype, 16, max(64 // block[1], 1), 2, bias=False)


@pytest.mark.parametrize("m", [0, 1, 15, 16, 17, 50])
@pytest.mark.parametrize("panel", [1, 2, 8])
@pytest.mark.parametrize("splits", [1, 3, 7])
def test_wgrad_tokens_panels_splits(m, panel, splits):
    """Chunks of unequal size, more chunks asked for than there are tokens, panels wider than any row."""
    check_wgrad(layout_of((70, 90), (16, 16), 0.5, seed=m, spare=1), m, torch.float32, 16, panel, splits)


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("spare", [0, 5])
def test_wgrad_empty_rows_and_spare_slots(density, splits, spare):
    """Empty rows still have a bias; spare slots come out zero."""
    check_wgrad(layout_of((100, 70), (16, 32), density, seed=2, spare=spare), 20, torch.float32, 16, 2, splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("block", [(16, 16), (32, 16)], ids=name)
def test_wgrad_element_mask(splits, block):
    layout = layout_of((50, 60), block, 0.5, spare=1)
    holes = torch.rand(layout.capacity, *block, generator=torch.Generator().manual_seed(5)) < 0.5
    check_wgrad(layout, 21, torch.float32, 16, 2, splits, holes=holes)


def test_wgrad_is_deterministic():
    layout = layout_of((96, 96), (16, 16), 0.5)
    x, _, _, dy = operands(layout, 100, torch.float16)
    tile = Tile("panel", 16, 0, 4, 4, 3)
    runs = [linear_wgrad.wgrad(dy, x, layout.index, None, True, layout.grid, tile, 3) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


# -- block scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_block_scores(block, dtype):
    grid = BlockGrid((150, 200), block)
    x, dy = (torch.randn(37, n).to(DEVICE, dtype) for n in (200, 150))
    for panel in (128, 256):
        got = block_scores.scores(dy, x, grid, Tile("scores", 16, 0, panel, 4, 3))
        dw = dy.double().t() @ x.double()
        want = grid.to_blocks(dw).flatten(1).norm(dim=1).view(grid.shape[1], grid.shape[3])
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    even = BlockGrid((128, 256), block)
    x, dy = (torch.randn(16, n).to(DEVICE, dtype) for n in (256, 128))
    got = block_scores.scores(dy, x, even, Tile("scores", 16, 0, 128, 4, 3))
    want = even.to_blocks(dy.double().t() @ x.double()).flatten(1).norm(dim=1).view(even.shape[1], even.shape[3])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# -- through the public functions --------------------------------------------------------------------------------------


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_public_function_and_gradients(forced, dtype):
    layout = layout_of((150, 200), (32, 16), 0.3, seed=4, spare=1)
    x, values, b, dy = operands(layout, 35, dtype)
    leaves = [t.requires_grad_() for t in (x.view(5, 7, 200).detach(), values, b)]
    y = sk.sparse_linear(leaves[0], leaves[1], layout, leaves[2])
    y.backward(dy.view(5, 7, 150))
    w = layout.to_dense(values.detach()).double()
    expected = linear_reference(x.double(), w, b.detach().double(), dy.double())
    magnitude = linear_reference(x.double().abs(), w.abs(), b.detach().double().abs(), dy.double().abs())
    bound = BOUNDS[dtype]
    assert_within(y.detach().view(35, 150), expected["y"], magnitude["y"], "y", bound)
    assert_within(leaves[0].grad.view(35, 200), expected["dx"], magnitude["dx"], "dx", bound)
    assert_within(
        leaves[1].grad, layout.from_dense(expected["dw"]), layout.from_dense(magnitude["dw"]), "dvalues", bound
    )
    assert_within(leaves[2].grad, expected["dbias"], magnitude["dbias"], "dbias", bound)


def test_scores_op_marks_stored_blocks(forced):
    layout = layout_of((100, 70), (16, 32), 0.4, spare=2)
    x, dy = torch.randn(30, 70, device=DEVICE), torch.randn(30, 100, device=DEVICE)
    got = torch.ops.sparsekern.block_scores(dy, x, layout.index, 16, 32)
    want = layout.grid.to_blocks((dy.double().t() @ x.double()).float()).flatten(1).norm(dim=1).view(7, 3)
    stored = layout.block_mask().view(7, 3)
    assert stored.any() and torch.isneginf(got[stored]).all()
    torch.testing.assert_close(got[~stored], want[~stored], rtol=1e-4, atol=1e-4)


def test_forced_backend_says_what_it_cannot_do(forced):
    layout = layout_of((40, 40), (8, 8), 0.5)
    x, values, _, _ = operands(layout, 4, torch.float32)
    with pytest.raises(RuntimeError, match="expected block edges among 16, 32, 64, 128, got 8x8"):
        sk.sparse_linear(x, values, layout)
    layout = layout_of((40, 40), (16, 16), 0.5)
    with pytest.raises(RuntimeError, match=r"expected bfloat16, float16 or float32, got torch\.float64"):
        sk.sparse_linear(x.double(), layout.from_dense(torch.randn(40, 40, device=DEVICE).double()), layout)


def test_topology_update_in_place(forced):
    """The kernels read the layout at every call: same buffers, new blocks."""
    layout = layout_of((64, 64), (16, 16), 0.4)
    x, values, _, _ = operands(layout, 10, torch.float32)
    other = torch.zeros(16, dtype=torch.bool, device=DEVICE)
    other[torch.randperm(16)[: layout.nnz]] = True
    layout.update_(other)
    want = x @ layout.to_dense(values).t()
    torch.testing.assert_close(sk.sparse_linear(x, values, layout), want, rtol=1e-4, atol=1e-4)


@given(data=st.data())
@settings(
    max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # shrinking takes minutes
def test_anything(data):
    block = (data.draw(st.sampled_from(EDGES)), data.draw(st.sampled_from(EDGES)))
    shape = (data.draw(st.integers(1, 170)), data.draw(st.integers(1, 170)))
    layout = layout_of(
        shape, block, data.draw(st.floats(0, 1)), seed=data.draw(st.integers(0, 99)), spare=data.draw(st.integers(0, 2))
    )
    m, dtype = data.draw(st.integers(0, 50)), data.draw(st.sampled_from(DTYPES))
    variant = data.draw(st.sampled_from(["gather", "union"] + ["tma"] * (dtype != torch.float32)))
    bm, bk = data.draw(st.sampled_from([16, 32])), data.draw(st.sampled_from([16, 32, 64]))
    check_product(layout, m, dtype, variant, bm, bk, bias=data.draw(st.booleans()), ctas=data.draw(st.integers(0, 2)))
    check_wgrad(layout, m, dtype, 16, data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 3)))
