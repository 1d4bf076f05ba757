"""Masks: which blocks of every layer are stored.

Block masks are bool [G, Ob, T, Ib], the shape of :attr:`BlockGrid.shape`; element masks have the weight's shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .layout import BlockGrid

PATTERNS = ("random", "balanced", "butterfly", "fan_in")

# Rounds of row-pair trades after which a balanced mask counts as mixed. Each row takes part in every round;
# Strona et al. 2014 find 5 trades per row enough.
_TRADE_ROUNDS = 10


def make_block_masks(
    grids: Mapping[str, BlockGrid],
    counts: Mapping[str, int],
    pattern: str = "random",
    seed: int = 0,
    *,
    min_per_row: int = 0,
    min_per_col: int = 0,
) -> dict[str, Tensor]:
    """Block masks with exactly ``counts[name]`` blocks each, on the CPU.

    Every layer has a random stream of its own, seeded by a hash of ``seed`` and the layer's name: equal in every
    process, different between layers.

    * ``random``: uniform over all masks of this count.
    * ``balanced``: counts of two block rows differ by at most one, and so do those of two block columns (over all
      groups and taps); within a group also those of two (tap, column) pairs. Random among such masks.
    * ``butterfly``: flat block butterfly (Pixelated Butterfly, Dao et al. 2022): the diagonal and the pairs
      ``(i, i xor s)`` for strides s = 1, 2, 4, ... while a whole stride fits, then random blocks up to the count. A
      grid that is not a square of a power of two takes the pattern of the next such square, scaled down to it.
      All taps and all groups share the pattern. Of a diagonal that does not fit, a random part is taken.
    * ``fan_in``: constant fan-in (Lasby et al. 2023): counts of two block rows differ by at most one; uniform over all
      such masks.

    Args:
        grids: ``{name: BlockGrid}``.
        counts: ``{name: blocks to store}``, within 1..blocks.
        pattern: one of :data:`PATTERNS`.
        seed: any int.
        min_per_row: for random, blocks that each block row gets at least, as far as the count allows (a row without
            blocks is an output that learns its bias only).
        min_per_col: the same for block columns (inputs that nothing reads).

    Returns:
        ``{name: bool [G, Ob, T, Ib]}`` in the order of ``counts``.

    Raises:
        ValueError: unknown pattern, a count out of range, or a layer without a grid.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}")
    if min_per_row < 0 or min_per_col < 0:
        raise ValueError(f"min_per_row, min_per_col: expected 0 and more, got {min_per_row} and {min_per_col}")
    if (min_per_row or min_per_col) and pattern != "random":
        raise ValueError(f"min_per_row, min_per_col: these go with pattern 'random', got {pattern!r}; leave them at 0")
    masks = {}
    for name, count in counts.items():
        if name not in grids:
            raise ValueError(f"grids: no block grid for {name!r}; give one for each layer")
        grid = grids[name]
        if not 1 <= count <= grid.blocks:
            raise ValueError(f"counts: expected 1..{grid.blocks} blocks for {name!r}, got {count}")
        generator = layer_generator(seed, name)
        if pattern == "balanced":
            masks[name] = _balanced(grid, count, generator)
        elif pattern == "fan_in":
            masks[name] = _fan_in(grid, count, generator)
        else:
            if pattern == "butterfly":
                first = _butterfly(grid, count, generator)
            elif min_per_row or min_per_col:
                first = _cover(grid, count, min_per_row, min_per_col, generator)
            else:
                first = torch.zeros(grid.shape, dtype=torch.bool)
            masks[name] = _complete(first, count, generator)
    return masks


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one layer: the same in every process for the same seed and name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def from_prune(model: nn.Module) -> dict[str, Tensor]:
    """Element masks of a model pruned with ``torch.nn.utils.prune``: ``{module name: bool, the weight's shape}``.

    Reads the ``weight_mask`` buffers, so it has to come before ``prune.remove``. Bias masks are left out.

    Raises:
        ValueError: no weight is pruned.
    """
    masks = {
        name.rpartition(".")[0]: buffer.detach() != 0
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] == "weight_mask"
    }
    if not masks:
        raise ValueError("model: expected weight_mask buffers, got none; call from_prune before prune.remove")
    return masks


def fill(mask: Tensor, grid: BlockGrid) -> float:
    """Kept elements over elements inside stored blocks, padding not counted; 0 for an empty mask.

    1 means that the mask is made of whole blocks; the density of the mask means that blocks save nothing.

    Args:
        mask: bool, the weight's shape.
        grid: the block grid of that weight.
    """
    kept = (mask != 0).to(torch.float32)
    stored = grid.to_blocks(kept).flatten(1).any(1)
    inside = grid.to_blocks(torch.ones_like(kept))[stored].sum(dtype=torch.float64)
    return float(kept.sum(dtype=torch.float64) / inside) if bool(stored.any()) else 0.0


def _complete(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``mask`` with random blocks added up to ``count``."""
    flat = mask.flatten()
    free = (~flat).nonzero().flatten()
    picked = torch.randperm(free.numel(), generator=generator)[: count - int(flat.count_nonzero())]
    flat[free[picked]] = True
    return flat.view(mask.shape)


def _take(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A random part of ``mask`` with ``count`` blocks."""
    kept = mask.flatten().nonzero().flatten()
    out = torch.zeros(mask.numel(), dtype=torch.bool)
    out[kept[torch.randperm(kept.numel(), generator=generator)[:count]]] = True
    return out.view(mask.shape)


def _cover(grid: BlockGrid, count: int, min_row: int, min_col: int, generator: torch.Generator) -> Tensor:
    """Few blocks that give every row and column its minimum: a walk through randomly ordered rows and columns.

    Step s lies at ``(s mod rows, s mod cols)``, so that m * rows steps meet each row m times and m * cols steps each
    column m times. The walk returns to its start after lcm steps and then shifts by one column, and after all
    pairs takes another tap: no block is hit twice. With too small a count it ends early, having met a new row
    and a new column at each step as long as there were any.
    """
    groups, rows, taps, cols = grid.shape
    mask = torch.zeros(grid.shape, dtype=torch.bool)
    steps = min(max(min_row * rows, min_col * cols), rows * cols * taps)
    s = torch.arange(steps).repeat_interleave(groups)[:count]
    group = torch.arange(groups).repeat(steps)[:count]
    row_order = torch.rand(groups, rows, generator=generator).argsort(-1)
    col_order = torch.rand(groups, cols, generator=generator).argsort(-1)
    row = row_order[group, s % rows]
    col = col_order[group, (s + s // math.lcm(rows, cols)) % cols]
    first_tap = torch.randint(taps, (groups, rows, cols), generator=generator)
    tap = (first_tap[group, row, col] + s // (rows * cols)) % taps
    mask[group, row, tap, col] = True
    return mask


def _butterfly(grid: BlockGrid, count: int, generator: torch.Generator) -> Tensor:
    groups, rows, taps, cols = grid.shape
    n = 1 << (max(rows, cols) - 1).bit_length()
    i = torch.arange(n)
    plane = torch.zeros(rows, cols, dtype=torch.bool)
    for stride in [0, *(1 << k for k in range(n.bit_length() - 1))]:
        wider = plane.clone()
        wider[i * rows // n, (i ^ stride) * cols // n] = True
        if int(wider.count_nonzero()) * groups * taps > count:
            if stride == 0:
                return _take(_all_taps(wider, grid), count, generator)
            break
        plane = wider
    return _all_taps(plane, grid)


def _all_taps(plane: Tensor, grid: BlockGrid) -> Tensor:
    rows, cols = plane.shape
    return plane.view(1, rows, 1, cols).expand(grid.shape).clone()


def _fan_in(grid: BlockGrid, count: int, generator: torch.Generator) -> Tensor:
    row_counts = _split(torch.tensor([count]), grid.rows, generator)[0]
    place = torch.rand(grid.rows, grid.blocks // grid.rows, generator=generator).argsort(1)
    return (place < row_counts[:, None]).view(grid.shape)


def _balanced(grid: BlockGrid, count: int, generator: torch.Generator) -> Tensor:
    groups, rows, taps, cols = grid.shape
    mask = torch.empty(grid.shape, dtype=torch.bool)
    for g, total in enumerate(_split(torch.tensor([count]), groups, generator)[0].tolist()):
        row_counts = _split(torch.tensor([total]), rows, generator)[0]
        col_counts = _split(torch.tensor([total]), cols, generator)[0]
        tap_col_counts = _split(col_counts, taps, generator).T.flatten()
        plane = _staircase(row_counts, tap_col_counts, generator)
        for _ in range(_TRADE_ROUNDS if rows > 1 else 0):
            _trade(plane, generator)
        mask[g] = plane.view(rows, taps, cols)
    return mask


def _split(totals: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    """Each total [n] as ``parts`` counts that differ by at most one, the larger ones at random places: [n, parts]."""
    place = torch.rand(totals.numel(), parts, generator=generator).argsort(1)
    return (totals // parts)[:, None] + (place < (totals % parts)[:, None])


def _staircase(row_counts: Tensor, col_counts: Tensor, generator: torch.Generator) -> Tensor:
    """bool [rows, cols] with these margins, each of which has two values at most, one apart.

    Rows in turn take the next columns of one cyclic order. The columns with one block more stand first in it, so
    they are those that the last, unfinished round still reaches.
    """
    rows, cols = row_counts.numel(), col_counts.numel()
    mixed = torch.randperm(cols, generator=generator)
    order = mixed[torch.argsort(col_counts[mixed], descending=True, stable=True)]
    row_order = torch.randperm(rows, generator=generator)
    row = torch.repeat_interleave(row_order, row_counts[row_order])
    plane = torch.zeros(rows, cols, dtype=torch.bool)
    plane[row, order[torch.arange(row.numel()) % cols]] = True
    return plane


def _trade(plane: Tensor, generator: torch.Generator) -> None:
    """One round of curveball trades (Strona et al. 2014), in place: rows meet in random pairs and deal the columns
    that only one of the two holds anew. Row and column counts stay."""
    rows = plane.shape[0]
    order = torch.randperm(rows, generator=generator)
    first, second = order[: rows // 2], order[rows // 2 : rows // 2 * 2]
    a, b = plane[first], plane[second]
    pair, col = (a ^ b).nonzero(as_tuple=True)
    # Half a unit of noise: a sum that rounds up to the next pair would deal a column to the wrong rows.
    shuffled = torch.argsort(pair + 0.5 * torch.rand(pair.numel(), generator=generator, dtype=torch.float64))
    pair, col = pair[shuffled], col[shuffled]
    size = torch.bincount(pair, minlength=first.numel())
    rank = torch.arange(pair.numel()) - (size.cumsum(0) - size)[pair]
    to_first = rank < (a & ~b).sum(1)[pair]
    plane[first[pair], col] = to_first
    plane[second[pair], col] = ~to_first
