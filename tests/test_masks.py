"""Mask patterns: exact counts, margins, independence of layers, foreign masks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsekern.layout
from sparsekern.layout import BlockGrid, BlockLayout
from sparsekern.masks import PATTERNS, fill, from_prune, layer_generator, make_block_masks


@st.composite
def grids(draw) -> BlockGrid:
    block = draw(st.sampled_from([(1, 1), (2, 2), (4, 8)]))
    if draw(st.booleans()):
        return BlockGrid((draw(st.integers(1, 40)), draw(st.integers(1, 40))), block)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 5)]))
    return BlockGrid((groups * draw(st.integers(1, 14)), draw(st.integers(1, 14)), *kernel), block, groups)


def one(grid: BlockGrid, count: int, pattern: str = "random", seed: int = 0, **options: int) -> Tensor:
    return make_block_masks({"layer": grid}, {"layer": count}, pattern, seed, **options)["layer"]


def rows_of(mask: Tensor) -> Tensor:
    return mask.sum((2, 3)).flatten()


def cols_of(mask: Tensor) -> Tensor:
    return mask.sum((1, 2)).flatten()


def spread(counts: Tensor) -> int:
    return int(counts.max() - counts.min())


@given(grids(), st.floats(0, 1), st.sampled_from(PATTERNS), st.integers(-(2**70), 2**70))
def test_counts_are_exact(grid, density, pattern, seed):
    count = max(1, round(density * grid.blocks))
    mask = one(grid, count, pattern, seed)
    assert mask.dtype == torch.bool and tuple(mask.shape) == grid.shape and mask.is_contiguous()
    assert int(mask.sum()) == count
    assert BlockLayout.from_block_mask(grid, mask).nnz == count
    assert torch.equal(mask, one(grid, count, pattern, seed))


@given(grids(), st.floats(0, 1), st.integers(0, 1000))
def test_balanced_margins(grid, density, seed):
    mask = one(grid, max(1, round(density * grid.blocks)), "balanced", seed)
    assert spread(rows_of(mask)) <= 1
    assert spread(cols_of(mask)) <= 1
    for group in mask:
        assert spread(group.sum(0)) <= 1  # every (tap, column) pair


def test_balanced_is_random():
    """Over many seeds each block is stored equally often, and pairs of blocks in a row are independent of distance."""
    grid, draws = BlockGrid((12, 12), 1), 250
    masks = torch.stack([one(grid, 48, "balanced", seed) for seed in range(draws)]).float().view(draws, 12, 12)
    often = masks.mean(0)
    sd = (1 / 3 * 2 / 3 / draws) ** 0.5
    assert (often - 1 / 3).abs().max() < 5 * sd
    # 4 of 12 in every row: two different columns are both stored with probability 4/12 * 3/11. A staircase without
    # trades would store neighbours together far more often.
    for distance in range(1, 6):
        together = (masks * masks.roll(distance, 2)).mean()
        assert abs(float(together) - 1 / 11) < 0.012
    # Two rows share 4 * 4 / 12 columns on average, and not only 0 or 4 of them.
    shared = (masks[:, 0] * masks[:, 1]).sum(1)
    assert set(shared.tolist()) >= {0.0, 1.0, 2.0, 3.0}


def test_random_is_uniform():
    grid, draws = BlockGrid((8, 8), 1), 1000
    often = torch.stack([one(grid, 16, seed=seed) for seed in range(draws)]).float().mean(0)
    assert (often - 0.25).abs().max() < 5 * (0.25 * 0.75 / draws) ** 0.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_layers_seeds_and_names(pattern):
    grid = BlockGrid((64, 64), 2)
    same = {"a": grid, "b": grid}
    masks = make_block_masks(same, {"a": 300, "b": 300}, pattern)
    assert not torch.equal(masks["a"], masks["b"])  # one stream per layer
    # ... and two masks of this density overlap as unrelated ones do, apart from the butterfly's fixed part.
    if pattern != "butterfly":
        assert int((masks["a"] & masks["b"]).sum()) == pytest.approx(300 * 300 / 1024, abs=40)
    assert not torch.equal(masks["a"], make_block_masks(same, {"a": 300}, pattern, seed=1)["a"])
    # A layer's mask does not depend on its neighbours in the dict.
    assert torch.equal(masks["b"], make_block_masks(same, {"b": 300, "a": 5}, pattern)["b"])
    assert list(make_block_masks(same, {"b": 3, "a": 5}, pattern)) == ["b", "a"]


def test_masks_are_the_same_in_every_process():
    """The seed comes from no salted hash(), and the global random state plays no part."""
    code = (
        "import torch; torch.seed()\n"
        "from sparsekern.layout import BlockGrid\n"
        "from sparsekern.masks import make_block_masks\n"
        "m = make_block_masks({'x': BlockGrid((16, 16), 2)}, {'x': 20}, 'balanced', 3)['x']\n"
        "print(m.flatten().nonzero().flatten().tolist())\n"
    )
    env = {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(sparsekern.layout.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env).stdout
    here = make_block_masks({"x": BlockGrid((16, 16), 2)}, {"x": 20}, "balanced", 3)["x"]
    assert out.strip() == str(here.flatten().nonzero().flatten().tolist())


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    for pattern in PATTERNS:
        one(BlockGrid((64, 64, 3, 3), 16), 20, pattern)
    one(BlockGrid((64, 64, 3, 3), 16), 20, min_per_row=1)
    assert torch.equal(before, torch.get_rng_state())
    assert layer_generator(0, "a").initial_seed() != layer_generator(0, "b").initial_seed()


@given(grids(), st.floats(0, 1), st.integers(0, 3), st.integers(0, 3))
def test_minimum_per_row_and_column(grid, density, min_row, min_col):
    count = max(1, round(density * grid.blocks))
    mask = one(grid, count, min_per_row=min_row, min_per_col=min_col)
    assert int(mask.sum()) == count
    groups, rows, taps, cols = grid.shape
    needed = groups * min(max(min_row * rows, min_col * cols), rows * cols * taps)
    if count >= needed:
        assert int(rows_of(mask).min()) >= min(min_row, taps * cols)
        assert int(cols_of(mask).min()) >= min(min_col, taps * rows)


@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (9, 6), (4, 4, 1, 3)])
def test_minimum_of_three_with_no_block_to_spare(shape):
    grid = BlockGrid(shape, 1)
    for seed in range(5):
        mask = one(grid, 3 * max(shape[:2]), seed=seed, min_per_row=3, min_per_col=3)
        assert int(rows_of(mask).min()) >= 3 and int(cols_of(mask).min()) >= 3


def test_minimum_with_too_few_blocks_reaches_as_many_rows_as_it_can():
    grid = BlockGrid((10, 6), 1)
    mask = one(grid, 5, min_per_row=1, min_per_col=1)
    assert int((rows_of(mask) > 0).sum()) == 5 and int((cols_of(mask) > 0).sum()) == 5
    mask = one(grid, 8, min_per_row=1, min_per_col=1)
    assert int((rows_of(mask) > 0).sum()) == 8 and int((cols_of(mask) > 0).sum()) == 6
    # Without the option, empty rows are common at this density.
    assert any(int(rows_of(one(grid, 10, seed=seed)).min()) == 0 for seed in range(5))


def test_butterfly_of_a_square_power_of_two():
    """The strides that fit in whole: 8 blocks each for the diagonal and strides 1, 2, 4."""
    grid = BlockGrid((128, 128), 16)
    i = torch.arange(8)
    for strides in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 4]):
        expected = torch.zeros(8, 8, dtype=torch.bool)
        for s in strides:
            expected[i, i ^ s] = True
        exact = one(grid, 8 * len(strides), "butterfly")
        assert torch.equal(exact.view(8, 8), expected)
        more = one(grid, 8 * len(strides) + 5, "butterfly")
        assert bool(more.view(8, 8)[expected].all()) and int(more.sum()) == 8 * len(strides) + 5
    few = one(grid, 5, "butterfly").view(8, 8)
    assert int(few.sum()) == 5 and bool(torch.equal(few, few & torch.eye(8, dtype=torch.bool)))


def test_butterfly_shares_taps_and_groups_and_scales():
    grid = BlockGrid((2 * 64, 32, 3, 3), 16, groups=2)  # [2, 4, 9, 2] blocks
    mask = one(grid, 2 * 9 * 4, "butterfly")
    assert torch.equal(mask, mask[:1, :, :1].expand_as(mask))
    # 4 x 4 scaled to 4 x 2: row i holds column i // 2.
    assert mask[0, :, 0].tolist() == [[True, False], [True, False], [False, True], [False, True]]
    wide = one(BlockGrid((48, 160), 16), 10, "butterfly").view(3, 10)
    assert int(rows_of(wide.view(1, 3, 1, 10)).min()) >= 1 and int(wide.any(0).sum()) >= 8


def test_errors():
    grid = BlockGrid((64, 64), 16)
    with pytest.raises(ValueError, match="random, balanced, butterfly, fan_in, got 'rnd'"):
        one(grid, 4, "rnd")
    with pytest.raises(ValueError, match=r"1\.\.16 blocks for 'layer', got 17"):
        one(grid, 17)
    with pytest.raises(ValueError, match="got 0"):
        one(grid, 0)
    with pytest.raises(ValueError, match="no block grid for 'other'"):
        make_block_masks({"layer": grid}, {"other": 4})
    with pytest.raises(ValueError, match="pattern 'random'"):
        one(grid, 4, "balanced", min_per_row=1)
    with pytest.raises(ValueError, match="0 and more"):
        one(grid, 4, min_per_row=-1)


# -- foreign masks ----------------------------------------------------------------------------------------------------


def test_from_prune():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"prune\.remove"):
        from_prune(model)
    prune.random_unstructured(model[0], "weight", amount=0.5)
    prune.ln_structured(model[1][0], "weight", amount=0.25, n=2, dim=0)
    prune.random_unstructured(model[1][1], "bias", amount=1)
    masks = from_prune(model)
    assert list(masks) == ["0", "1.0"]
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert torch.equal(masks["0"], model[0].weight_mask == 1) and int(masks["0"].sum()) == 108
    assert int(masks["1.0"].any(1).sum()) == 3


def test_from_prune_of_a_lone_layer():
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", amount=3)
    assert int(from_prune(layer)[""].sum()) == 13


def test_fill():
    grid = BlockGrid((10, 6), (4, 4))  # 3 x 2 blocks, ragged at both edges
    mask = torch.zeros(10, 6, dtype=torch.bool)
    assert fill(mask, grid) == 0.0
    mask[0, 0] = mask[1, 1] = True
    assert fill(mask, grid) == 2 / 16
    mask[9, 5] = True  # the corner block has 2 x 2 elements of the weight
    assert fill(mask, grid) == 3 / 20
    layout = BlockLayout.from_block_mask(grid, one(grid, 4))
    assert fill(layout.mask(), grid) == 1.0
    assert fill(torch.rand(10, 6) < 2, grid) == 1.0
