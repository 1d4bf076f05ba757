"""What the CPU computes with numpy is what the calls that a GPU needs compute: layouts, and what is chosen."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekern.layout import BlockGrid, BlockLayout, _stable_order
from sparsekern.topology import select
from sparsekern.topology.streams import Stream

DRAW = random.Random(0)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    ("shape", "block", "groups"),
    [
        ((37, 53), (1, 1), 1),
        ((2, 70000), (1, 1), 1),  # transposed rows past 16 bits
        ((70, 130), (16, 4), 1),
        ((64, 96), (32, 16), 1),
        ((12, 5, 3, 2), (2, 3), 2),
        ((48, 40, 3, 3), (16, 32), 1),
    ],
)
def test_both_ways_write_the_same_layout(
    shape: tuple[int, ...], block: tuple[int, int], groups: int, density: float, rng: torch.Generator
) -> None:
    grid = BlockGrid(shape, block, groups)
    mask = torch.rand(grid.shape, generator=rng) < density
    fast = BlockLayout.from_block_mask(grid, mask, capacity=int(mask.sum()) + 3)
    general = BlockLayout(grid, torch.full_like(fast.index, -1))
    general._write_whole(mask)
    general._write_unions(mask)
    assert torch.equal(fast.index, general.index)


def test_stable_order_of_wide_keys() -> None:
    keys = np.random.default_rng(0).integers(0, 1 << 20, 5000).astype(np.int32)
    keys[::3] = keys[0]
    assert np.array_equal(_stable_order(keys), np.argsort(keys, kind="stable"))


def _scores(count: int) -> Tensor:
    scores = torch.randn(count, dtype=DRAW.choice([torch.float32, torch.float64]))
    if DRAW.random() < 0.5:
        scores = (1.5 * scores).round()  # ties
    for value in SPECIAL:
        if DRAW.random() < 0.4:
            scores[torch.rand(count) < DRAW.random()] = value
    return scores


def test_both_ways_choose_the_same_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    for trial in range(300):
        scores = _scores(DRAW.randint(1, 40))
        count = DRAW.randint(0, scores.numel())
        for choose in (select.lowest, select.highest):
            fast = choose(scores, count, Stream(trial, "layer", 0, "ties"))
            with monkeypatch.context() as patch:
                patch.setattr(select, "_on_cpu", lambda tensor: False)
                general = choose(scores, count, Stream(trial, "layer", 0, "ties"))
            assert torch.equal(fast, general) and int(fast.sum()) == count
            # As in the docstrings: NaN is the highest of `lowest`, and the lowest of `highest`.
            low = choose is select.lowest
            order = scores.where(~scores.isnan(), torch.inf) if low else -scores.where(~scores.isnan(), -torch.inf)
            if 0 < count < scores.numel():
                assert order[fast].max() <= order[~fast].min()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_positions_are_those_of_the_true_entries(share: float, rng: torch.Generator) -> None:
    mask = torch.rand(500, generator=rng) < share
    where = mask.nonzero().flatten()
    assert torch.equal(select.positions(mask, len(where)), where)
    for count in (0, len(where) // 3, len(where)):
        picked = Stream(1, "layer", 2, "grow").subset(len(where), count)
        taken = (~mask).nonzero().flatten()
        found = select.random_free(taken, len(mask), count, Stream(1, "layer", 2, "grow"))
        assert torch.equal(found, where[torch.from_numpy(picked)])


@pytest.mark.parametrize("kind", ["normal", "sorted", "mostly equal", "nan"])
def test_many_scores(kind: str, rng: torch.Generator) -> None:
    """Enough of them that a sample guesses the threshold, rightly or wrongly."""
    scores = torch.randn(100_000, generator=rng)
    if kind == "sorted":
        scores = scores.sort().values
    elif kind == "mostly equal":
        scores = scores.clamp(min=0.5)
    elif kind == "nan":
        scores[::3] = torch.nan
    ranked = scores.sort().values
    for count in (1, 30, 1000, 40_000, 66_000, 100_000):
        chosen = select.lowest(scores, count, Stream(0, "layer", 0, "ties"))
        assert int(chosen.sum()) == count
        torch.testing.assert_close(scores[chosen].sort().values, ranked[:count], rtol=0, atol=0, equal_nan=True)


def test_stable_order_is_that_of_a_stable_sort(rng: torch.Generator) -> None:
    for size in (0, 1, 7, 1000):
        scores = torch.randint(-3, 4, (size,), generator=rng).float() * 1e-40
        scores *= torch.where(torch.rand(size, generator=rng) < 0.1, -0.0, 1e30)
        scores[torch.rand(size, generator=rng) < 0.1] = torch.nan
        scores[1:2], scores[2:4] = torch.inf, -torch.inf
        assert torch.equal(select.stable_order(scores), torch.argsort(scores, stable=True))
