"""Block layouts: packing, round trips, in-place updates, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.layout import BlockGrid, BlockLayout, as_block, index_offsets, index_view, union_rows

from .support import random_layout

GRIDS = [
    ((20, 33), (8, 4), 1),
    ((5, 7), (1, 1), 1),
    ((130, 257), (128, 128), 1),
    ((64, 64), (16, 32), 1),
    ((16, 6, 3, 3), (4, 4), 2),
    ((9, 4, 1, 7), (2, 3), 3),
    ((8, 8, 1, 1), (8, 8), 1),
]


@pytest.mark.parametrize(("shape", "block", "groups"), GRIDS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_dense_round_trip(shape, block, groups, density):
    grid = BlockGrid(shape, block, groups)
    layout = random_layout(grid, density, spare=3)
    layout.validate()
    weight = torch.randn(shape)
    values = layout.from_dense(weight)
    assert values.shape == (layout.capacity, *block)
    assert torch.equal(layout.to_dense(values), weight * layout.mask())
    assert torch.equal(layout.from_dense(layout.to_dense(values)), values)
    assert not values[layout.nnz :].any()


@pytest.mark.parametrize(("shape", "block", "groups"), GRIDS)
def test_index_by_plain_loops(shape, block, groups):
    grid = BlockGrid(shape, block, groups)
    layout = random_layout(grid, 0.4, seed=1, spare=2)
    mask, v = layout.block_mask(), layout.view
    g_, ob, taps, ib = grid.shape
    rows = [
        [t * ib + j for t in range(taps) for j in range(ib) if mask[g, o, t, j]] for g in range(g_) for o in range(ob)
    ]
    assert [v.col[v.row_ptr[r] : v.row_ptr[r + 1]].tolist() for r in range(grid.rows)] == rows
    assert v.row[: layout.nnz].tolist() == [r for r, cols in enumerate(rows) for _ in cols]
    columns = [
        [(t * ob + o, g * ob + o, t * ib + j) for t in range(taps) for o in range(ob) if mask[g, o, t, j]]
        for g in range(g_)
        for j in range(ib)
    ]
    for r, entries in enumerate(columns):
        span = slice(int(v.t_ptr[r]), int(v.t_ptr[r + 1]))
        assert v.t_row[span].tolist() == [entry[0] for entry in entries]
        for slot, (_, row, col) in zip(v.t_perm[span].tolist(), entries, strict=True):
            assert (int(v.row[slot]), int(v.col[slot])) == (row, col)
    lengths = torch.tensor([len(cols) for cols in rows])
    assert lengths[v.row_order.long()].tolist() == sorted(lengths.tolist(), reverse=True)
    assert sorted(v.row_order.tolist()) == list(range(grid.rows))
    assert sorted(v.t_order.tolist()) == list(range(grid.t_rows))


@given(
    out=st.integers(1, 40),
    inp=st.integers(1, 40),
    bo=st.integers(1, 12),
    bi=st.integers(1, 12),
    taps=st.sampled_from([None, (1, 1), (3, 3), (2, 5)]),
    groups=st.integers(1, 3),
    seed=st.integers(0, 1000),
    spare=st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_update_in_place(out, inp, bo, bi, taps, groups, seed, spare):
    shape = (out, inp) if taps is None else (out * groups, inp, *taps)
    grid = BlockGrid(shape, (bo, bi), 1 if taps is None else groups)
    layout = random_layout(grid, 0.5, seed, spare)
    values = layout.from_dense(torch.rand(shape) + 1)
    before, address = layout.to_dense(values), layout.index.data_ptr()
    old_mask = layout.block_mask().clone()
    generator = torch.Generator().manual_seed(seed + 1)
    order = torch.randperm(grid.blocks, generator=generator)[: layout.nnz]
    new_mask = torch.zeros(grid.blocks, dtype=torch.bool)
    new_mask[order] = True
    slot_map = layout.update_(new_mask)
    layout.validate()
    assert layout.index.data_ptr() == address
    assert torch.equal(layout.block_mask().flatten(), new_mask)
    moved = torch.where((slot_map >= 0).view(-1, 1, 1), values[slot_map.clamp_min(0)], 0.0)
    both = BlockLayout.from_block_mask(grid, old_mask.flatten() & new_mask).mask()
    assert torch.equal(layout.to_dense(moved), before * both)
    survivors = slot_map[slot_map >= 0]
    assert survivors.unique().numel() == survivors.numel() == int((old_mask.flatten() & new_mask).sum())


def test_from_mask_keeps_any_block_with_a_survivor():
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[9, 9] = mask[0, 4] = True
    layout = BlockLayout.from_mask(mask, 4)
    assert layout.nnz == 2
    assert layout.block_mask().squeeze().nonzero().tolist() == [[0, 1], [2, 2]]


def test_from_rows_round_trip_and_digest():
    layout = random_layout(BlockGrid((12, 6, 3, 3), (4, 2)), 0.4, spare=2)
    view = layout.view
    again = BlockLayout.from_rows(layout.grid, view.row_ptr, view.col)
    assert torch.equal(again.index, layout.index)
    assert again.digest() == layout.digest()
    other = copy.deepcopy(layout)
    other.update_(
        ~layout.block_mask() if layout.grid.blocks - layout.nnz <= layout.capacity else layout.block_mask() * 0
    )
    assert other.digest() != layout.digest()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: as_block(0), "1..128"),
        (lambda: as_block((4, 129)), "1..128"),
        (lambda: as_block((4, 4, 4)), "1..128"),
        (lambda: BlockGrid((4,), (1, 1)), "weight shape"),
        (lambda: BlockGrid((4, 4), (1, 1), 2), "1 group"),
        (lambda: BlockGrid((4, 4, 3, 3), (1, 1), 3), "divisor"),
        (lambda: BlockLayout.from_mask(torch.ones(4, 4), 2, capacity=3), "at least the 4 blocks"),
        (lambda: BlockLayout.from_mask(torch.ones(4, 4), 2).update_(torch.ones(5)), "block mask: expected shape"),
        (lambda: random_layout(BlockGrid((8, 8), (2, 2)), 0.2).update_(torch.ones(16)), "at most"),
        (lambda: random_layout(BlockGrid((8, 8), (2, 2)), 0.2).from_dense(torch.ones(8, 9)), r"\[8, 8\], got \[8, 9\]"),
        (lambda: BlockLayout(BlockGrid((8, 8), (2, 2)), torch.zeros(3, dtype=torch.int32)), "no packed layout"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["row_ptr", "col", "row", "t_ptr", "t_row", "t_perm", "row_order", "t_order"])
def test_validate_finds_every_corrupt_array(name):
    layout = random_layout(BlockGrid((16, 16), (4, 4)), 0.5)
    layout.validate()
    array = getattr(index_view(layout.grid, layout.index), name)
    array[0] += 1
    with pytest.raises(ValueError, match="corrupt layout"):
        layout.validate()


def test_validate_finds_a_column_out_of_range():
    layout = random_layout(BlockGrid((16, 16), (4, 4)), 0.9)
    layout.view.col[0] = 77
    with pytest.raises(ValueError, match=r"0\.\.3"):
        layout.validate()


@pytest.mark.parametrize(
    ("shape", "block", "groups"),
    [((150, 200), (16, 16), 1), ((150, 200), (32, 64), 1), ((150, 200), (64, 32), 1), ((96, 40, 3, 3), (16, 32), 2)],
)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_unions_by_plain_loops(shape, block, groups, density):
    """Panels of neighbouring rows of a group list each column that any of them has, once, with the rows as bits."""
    grid = BlockGrid(shape, block, groups)
    layout = random_layout(grid, density, seed=2, spare=1)
    mask, v = layout.block_mask(), layout.view
    _, ob, taps, ib = grid.shape
    forward = mask.flatten(2).reshape(groups, ob, taps * ib)
    transposed = mask.permute(0, 3, 2, 1).reshape(groups, ib, taps * ob)
    for edge, rows, ptr, union in (
        (block[0], forward, v.union_ptr, v.union),
        (block[1], transposed, v.t_union_ptr, v.t_union),
    ):
        panel = union_rows(edge)
        if edge not in (16, 32):
            assert panel == 0 and len(ptr) == len(union) == 0
            continue
        assert panel * edge == 128
        lists = [
            [
                (column << panel) + sum(1 << r for r in range(len(chunk)) if chunk[r, column])
                for column in range(chunk.shape[1])
                if chunk[:, column].any()
            ]
            for group in rows
            for chunk in group.split(panel)
        ]
        assert [union[ptr[p] : ptr[p + 1]].tolist() for p in range(len(lists))] == lists
        assert len(ptr) == len(lists) + 1 and not union[ptr[-1] :].any()


@pytest.mark.parametrize("block", [(8, 8), (16, 64), (32, 16)])
def test_offsets_end_where_the_buffer_does(block):
    grid = BlockGrid((150, 200), block)
    for capacity in (0, 1, 17):
        assert index_offsets(grid, capacity).end == grid.index_size(capacity)


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_metadata_is_small_beside_the_values(density):
    """Under 2 % of the values' bytes at block 32 even in a 16-bit dtype, unions included."""
    grid = BlockGrid((4096, 4096), (32, 32))
    capacity = round(grid.blocks * density)
    assert 4 * grid.index_size(capacity) < 0.02 * 2 * capacity * 32 * 32
