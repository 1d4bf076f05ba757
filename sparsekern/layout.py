"""Block-sparse layouts: which blocks of a weight are stored, and where.

A weight is cut into blocks of ``bo x bi``. The block grid has four axes ``[G, Ob, T, Ib]``: groups, block
rows of one group, filter taps (``R * S``; 1 for a linear weight), block columns of one group. No block
crosses a tap or a group, and edge blocks are padded with zeros.

Everything a kernel needs lies in one packed int32 buffer (see :class:`IndexView`), so that an operator takes
one tensor, a topology update rewrites contents only, and ``module.to(...)`` moves it like any buffer.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MAX_BLOCK = 128
UNION_WIDTH = 128  # features of one union panel; wider ones spill the accumulators of a 256-token tile
UNION_EDGES = (16, 32)  # from 64 on, neighbouring rows rarely share enough columns to pay at the densities that matter


def union_rows(edge: int) -> int:
    """Block rows of one union panel for blocks of this edge; 0 where the layout keeps no unions."""
    return UNION_WIDTH // edge if edge in UNION_EDGES else 0


def as_block(block: int | Sequence[int]) -> tuple[int, int]:
    """Return ``(bo, bi)`` from an int or a pair; raises ``ValueError`` outside 1..128."""
    pair = (block, block) if isinstance(block, int) else tuple(int(b) for b in block)
    if len(pair) != 2 or not all(1 <= b <= MAX_BLOCK for b in pair):
        raise ValueError(f"block: expected an int or (bo, bi) within 1..{MAX_BLOCK}, got {block!r}")
    return pair[0], pair[1]


@dataclass(frozen=True)
class BlockGrid:
    """The block grid of one weight; static for the life of a layer.

    Attributes:
        weight_shape: ``(O, I)`` of a linear weight or ``(O, C/g, R, S)`` of a convolution weight.
        block: ``(bo, bi)``, output by input features of one block.
        groups: convolution groups, 1 for a linear weight.
        kernel_size: ``(R, S)``; ``(1, 1)`` for a linear weight.
        shape: ``(G, Ob, T, Ib)``.
        rows: block rows over all groups.
        t_rows: rows of the transposed layout: block columns over all groups.
        blocks: blocks of the full grid, stored or not.
        unions: panels of neighbouring block rows of one group, see :attr:`IndexView.union`; 0 if the layout keeps none.
        t_unions: the same for the transpose.
    """

    weight_shape: tuple[int, ...]
    block: tuple[int, int]
    groups: int = 1
    # Derived once: every call of an operator reads them.
    kernel_size: tuple[int, int] = field(init=False, repr=False, compare=False)
    shape: tuple[int, int, int, int] = field(init=False, repr=False, compare=False)
    rows: int = field(init=False, repr=False, compare=False)
    t_rows: int = field(init=False, repr=False, compare=False)
    blocks: int = field(init=False, repr=False, compare=False)
    unions: int = field(init=False, repr=False, compare=False)
    t_unions: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        weight, (bo, bi) = tuple(int(n) for n in self.weight_shape), as_block(self.block)
        if len(weight) not in (2, 4) or min(weight) < 1:
            raise ValueError(
                f"weight shape: expected [O, I] or [O, C/g, R, S], sizes 1 and more, got {list(self.weight_shape)}"
            )
        if self.groups < 1 or weight[0] % self.groups:
            raise ValueError(f"groups: expected a divisor of {weight[0]} output channels, got {self.groups}")
        if len(weight) == 2 and self.groups != 1:
            raise ValueError(f"groups: a linear weight has 1 group, got {self.groups}")
        taps = (weight[2], weight[3]) if len(weight) == 4 else (1, 1)
        ob, ib = -(-weight[0] // self.groups // bo), -(-weight[1] // bi)
        panel, t_panel = union_rows(bo), union_rows(bi)
        for name, value in (
            ("weight_shape", weight),
            ("block", (bo, bi)),
            ("kernel_size", taps),
            ("shape", (self.groups, ob, taps[0] * taps[1], ib)),
            ("rows", self.groups * ob),
            ("t_rows", self.groups * ib),
            ("blocks", self.groups * ob * taps[0] * taps[1] * ib),
            ("unions", self.groups * -(-ob // panel) if panel else 0),
            ("t_unions", self.groups * -(-ib // t_panel) if t_panel else 0),
        ):
            object.__setattr__(self, name, value)

    @property
    def out_per_group(self) -> int:
        return self.weight_shape[0] // self.groups

    @property
    def in_per_group(self) -> int:
        return self.weight_shape[1]

    def index_size(self, capacity: int) -> int:
        """Elements of the packed buffer for ``capacity`` block slots."""
        unions = (self.unions + 1 if self.unions else 0) + (self.t_unions + 1 if self.t_unions else 0)
        return 2 * self.rows + 2 * self.t_rows + 2 + unions + self.index_per_slot * capacity

    @property
    def index_per_slot(self) -> int:
        """Elements of the packed buffer per block slot."""
        return 4 + bool(self.unions) + bool(self.t_unions)

    def to_blocks(self, weight: Tensor) -> Tensor:
        """Cut ``weight`` [O, C/g(, R, S)] into its zero-padded blocks [blocks, bo, bi]."""
        self.check_weight(weight)
        g, ob, t, ib = self.shape
        bo, bi = self.block
        w = weight.reshape(g, self.out_per_group, self.in_per_group, t)
        w = F.pad(w, (0, 0, 0, ib * bi - self.in_per_group, 0, ob * bo - self.out_per_group))
        return w.reshape(g, ob, bo, ib, bi, t).permute(0, 1, 5, 3, 2, 4).reshape(-1, bo, bi)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """Inverse of :meth:`to_blocks`: [blocks, bo, bi] to the weight's shape."""
        g, ob, t, ib = self.shape
        bo, bi = self.block
        w = blocks.reshape(g, ob, t, ib, bo, bi).permute(0, 1, 4, 3, 5, 2).reshape(g, ob * bo, ib * bi, t)
        return w[:, : self.out_per_group, : self.in_per_group].reshape(self.weight_shape)

    def check_weight(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(f"weight or mask: expected shape {list(self.weight_shape)}, got {list(weight.shape)}")


@dataclass(frozen=True)
class IndexView:
    """Named views over the packed int32 buffer, in buffer order.

    Attributes:
        row_ptr: [rows + 1] first slot of each block row; ``row_ptr[-1]`` is nnz.
        col: [capacity] ``tap * Ib + column`` of each slot, ascending within a row.
        row: [capacity] block row of each slot, over all groups.
        t_ptr: [t_rows + 1] the same for the transpose, whose rows are block columns over all groups.
        t_row: [capacity] ``tap * Ob + row within the group``, ascending within a transposed row.
        t_perm: [capacity] slot in ``values`` of each transposed entry.
        row_order: [rows] block rows by descending length, ties by index.
        t_order: [t_rows] the same for the transpose.
        union_ptr: [unions + 1] first entry of each panel of ``union_rows(bo)`` neighbouring block rows of a group.
        union: [capacity] columns that any row of the panel has, ascending: ``col << union_rows(bo)``, and bit ``r``
            set where the panel's row ``r`` has it.
        t_union_ptr: [t_unions + 1], t_union: [capacity] the same for the transpose.

    Entries of spare slots (``nnz <= k < capacity``) are 0. Unions are empty ([0]) where the block's edge keeps none.
    """

    row_ptr: Tensor
    col: Tensor
    row: Tensor
    t_ptr: Tensor
    t_row: Tensor
    t_perm: Tensor
    row_order: Tensor
    t_order: Tensor
    union_ptr: Tensor
    union: Tensor
    t_union_ptr: Tensor
    t_union: Tensor


@dataclass(frozen=True)
class IndexOffsets:
    """Where each array of :class:`IndexView` starts in the packed buffer, in elements; ``end`` is its length."""

    row_ptr: int
    col: int
    row: int
    t_ptr: int
    t_row: int
    t_perm: int
    row_order: int
    t_order: int
    union_ptr: int
    union: int
    t_union_ptr: int
    t_union: int
    end: int


def _index_sizes(grid: BlockGrid, capacity: int) -> list[int]:
    """Lengths of the arrays of :class:`IndexView`. Not cached: ``torch.compile`` traces it with masked layers."""
    rows, t_rows, unions, t_unions = grid.rows, grid.t_rows, grid.unions, grid.t_unions
    united = (unions + 1, capacity) if unions else (0, 0)
    t_united = (t_unions + 1, capacity) if t_unions else (0, 0)
    return [rows + 1, capacity, capacity, t_rows + 1, capacity, capacity, rows, t_rows, *united, *t_united]


@functools.lru_cache(maxsize=8192)
def index_offsets(grid: BlockGrid, capacity: int) -> IndexOffsets:
    """Offsets into the packed buffer of a layout of ``grid`` with ``capacity`` slots."""
    return IndexOffsets(0, *itertools.accumulate(_index_sizes(grid, capacity)))


def index_view(grid: BlockGrid, index: Tensor) -> IndexView:
    """Views over ``index`` (int32, 1-D); the capacity follows from its length."""
    return IndexView(*torch.split(index, _index_sizes(grid, capacity_of(grid, index))))


def capacity_of(grid: BlockGrid, index: Tensor) -> int:
    """Block slots that the packed buffer ``index`` of this grid has."""
    capacity, rest = divmod(index.shape[0] - grid.index_size(0), grid.index_per_slot)
    if index.dim() != 1 or rest or capacity < 0:
        raise ValueError(f"index: {index.shape[0]} elements are no packed layout of a grid {grid.shape}")
    return int(capacity)


def _stable_order(keys: np.ndarray) -> np.ndarray:
    """int64 [n]: stable ascending order of int32 ``keys`` [n], not negative; 16 bits at a time get a radix sort."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    high = (keys >> 16).astype(np.uint16)
    return order[np.argsort(high[order], kind="stable")] if high.any() else order


class BlockLayout:
    """The stored blocks of one weight.

    Args:
        grid: the block grid.
        index: packed int32 buffer, 1-D (see :class:`IndexView`). It is held, not copied.
    """

    def __init__(self, grid: BlockGrid, index: Tensor) -> None:
        self.grid = grid
        self.index = index
        self.capacity = capacity_of(grid, index)

    # -- construction -------------------------------------------------------------------------------------------

    @classmethod
    def from_mask(
        cls, mask: Tensor, block: int | Sequence[int], *, groups: int = 1, capacity: int | None = None
    ) -> BlockLayout:
        """Layout of an element mask: a block is stored if any of its elements is kept.

        Args:
            mask: bool [O, I] or [O, C/g, R, S].
            block: ``bo x bi``.
            groups: convolution groups.
            capacity: block slots, at least the number of stored blocks (default: exactly that).

        Raises:
            ValueError: the shapes do not fit or the capacity is too small.
        """
        grid = BlockGrid(tuple(mask.shape), as_block(block), groups)
        return cls.from_block_mask(grid, grid.to_blocks(mask != 0).flatten(1).any(1), capacity=capacity)

    @classmethod
    def from_block_mask(cls, grid: BlockGrid, block_mask: Tensor, *, capacity: int | None = None) -> BlockLayout:
        """Layout of a block mask, bool [G, Ob, T, Ib] or any shape of as many elements. One host sync."""
        nnz = int(block_mask.count_nonzero())
        if capacity is None:
            capacity = nnz
        if capacity < nnz:
            raise ValueError(f"capacity: expected at least the {nnz} blocks of the mask, got {capacity}")
        index = torch.zeros(grid.index_size(capacity), dtype=torch.int32, device=block_mask.device)
        layout = cls(grid, index)
        layout._write(layout._check_block_mask(block_mask))
        return layout

    @classmethod
    def from_rows(cls, grid: BlockGrid, row_ptr: Tensor, col: Tensor) -> BlockLayout:
        """Layout from its forward half, as a checkpoint stores it: ``row_ptr`` [rows + 1], ``col`` [capacity].

        Raises:
            ValueError: the two do not describe a layout of this grid.
        """
        if tuple(row_ptr.shape) != (grid.rows + 1,) or col.dim() != 1:
            raise ValueError(
                f"row_ptr, col: expected [{grid.rows + 1}] and [capacity], "
                f"got {list(row_ptr.shape)} and {list(col.shape)}"
            )
        _, _, t, ib = grid.shape
        ptr = row_ptr.to(torch.int64)
        nnz, width = int(ptr[-1]), t * ib
        lengths = ptr.diff()
        if int(ptr[0]) != 0 or bool((lengths < 0).any()) or nnz > col.shape[0]:
            raise ValueError(f"row_ptr: expected 0 rising to at most {col.shape[0]}, got {ptr[:4].tolist()}...{nnz}")
        used = col[:nnz].to(torch.int64)
        if nnz and (int(used.min()) < 0 or int(used.max()) >= width):
            raise ValueError(f"col: expected values within 0..{width - 1}, got {int(used.min())}..{int(used.max())}")
        rows = torch.repeat_interleave(torch.arange(grid.rows, device=col.device), lengths)
        flat = rows * width + used
        if nnz and not bool((flat.diff() > 0).all()):
            raise ValueError("col: expected ascending columns without repeats within each block row")
        block_mask = torch.zeros(grid.blocks, dtype=torch.bool, device=col.device)
        block_mask[flat] = True
        return cls.from_block_mask(grid, block_mask, capacity=col.shape[0])

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def view(self) -> IndexView:
        return index_view(self.grid, self.index)

    @property
    def nnz(self) -> int:
        """Stored blocks (host sync on a GPU)."""
        return int(self.index[self.grid.rows])

    @property
    def density(self) -> float:
        """Stored blocks over all blocks (host sync on a GPU)."""
        return self.nnz / self.grid.blocks

    def slots(self) -> Tensor:
        """int64 [capacity]: position in the grid of each slot; spare slots hold ``grid.blocks``. No host sync."""
        v = self.view
        _, _, t, ib = self.grid.shape
        flat = v.row.to(torch.int64) * (t * ib) + v.col
        used = torch.arange(self.capacity, device=flat.device) < v.row_ptr[-1]
        return torch.where(used, flat, self.grid.blocks)

    def slot_of_block(self) -> Tensor:
        """int64 [blocks]: slot of each block of the grid; ``capacity`` where it is not stored. No host sync."""
        out = torch.full((self.grid.blocks + 1,), self.capacity, dtype=torch.int64, device=self.index.device)
        out.scatter_(0, self.slots(), torch.arange(self.capacity, device=out.device))
        return out[:-1]

    def block_mask(self) -> Tensor:
        """bool [G, Ob, T, Ib]. No host sync."""
        out = torch.zeros(self.grid.blocks + 1, dtype=torch.bool, device=self.index.device)
        return out.scatter_(0, self.slots(), True)[:-1].view(self.grid.shape)

    def mask(self) -> Tensor:
        """bool, the weight's shape: elements inside stored blocks."""
        bo, bi = self.grid.block
        return self.grid.from_blocks(self.block_mask().view(-1, 1, 1).expand(-1, bo, bi))

    def to_dense(self, values: Tensor) -> Tensor:
        """The dense weight of ``values`` [capacity, bo, bi]; differentiable in ``values``."""
        padded = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
        return self.grid.from_blocks(padded[self.slot_of_block()])

    def from_dense(self, weight: Tensor) -> Tensor:
        """The stored blocks of a dense weight: [capacity, bo, bi], spare slots zero."""
        blocks = self.grid.to_blocks(weight)
        return torch.cat([blocks, blocks.new_zeros(1, *blocks.shape[1:])])[self.slots()]

    def digest(self) -> str:
        """Hash of grid and stored blocks, equal on ranks that agree."""
        head = repr((self.grid.weight_shape, self.grid.block, self.grid.groups, self.capacity)).encode()
        forward = self.index[: self.grid.rows + 1 + self.capacity].cpu().numpy().tobytes()
        return hashlib.sha256(head + forward).hexdigest()

    def __repr__(self) -> str:
        bo, bi = self.grid.block
        return (
            f"BlockLayout(weight={list(self.grid.weight_shape)}, block={bo}x{bi}, groups={self.grid.groups}, "
            f"nnz={self.nnz}/{self.grid.blocks}, capacity={self.capacity})"
        )

    # -- writing ------------------------------------------------------------------------------------------------

    def update_(self, block_mask: Tensor, *, check: bool = True) -> Tensor:
        """Rewrite the layout in place from another block mask; buffer size and identity stay.

        Args:
            block_mask: bool [G, Ob, T, Ib], at most ``capacity`` blocks kept.
            check: compare the count against the capacity (one host sync); pass False where the count is known.

        Returns:
            The slot map, int64 [capacity]: the old slot of each new slot, or -1 for a grown or spare one.

        Raises:
            ValueError: wrong shape, or more blocks than slots.
        """
        block_mask = self._check_block_mask(block_mask)
        if check and int(block_mask.count_nonzero()) > self.capacity:
            raise ValueError(
                f"block mask: expected at most {self.capacity} blocks (the capacity), "
                f"got {int(block_mask.count_nonzero())}; build the layer with a larger capacity"
            )
        old = torch.full((self.grid.blocks + 1,), -1, dtype=torch.int32, device=self.index.device)
        old.scatter_(0, self.slots(), torch.arange(self.capacity, dtype=torch.int32, device=old.device))
        old[-1:].fill_(-1)  # where spare slots point
        self._write(block_mask)
        return old[self.slots()].to(torch.int64)

    def _check_block_mask(self, block_mask: Tensor) -> Tensor:
        if block_mask.numel() != self.grid.blocks:
            raise ValueError(f"block mask: expected shape {self.grid.shape}, got {list(block_mask.shape)}")
        block_mask = block_mask.reshape(self.grid.shape)
        return block_mask if block_mask.dtype == torch.bool else block_mask != 0

    def _write(self, block_mask: Tensor) -> None:
        """Fill the packed buffer from a bool mask [G, Ob, T, Ib]."""
        if type(block_mask) is Tensor and block_mask.device.type == "cpu" and self.index.device.type == "cpu":
            self._write_stored(block_mask)
        else:
            self._write_whole(block_mask)
        if self.grid.unions or self.grid.t_unions:
            self._write_unions(block_mask)

    def _write_stored(self, block_mask: Tensor) -> None:
        """All but the unions on a CPU, with work per stored block: 8 times as fast at block 1 and density 0.1."""
        _, ob, t, ib = self.grid.shape
        v = self.view
        width = t * ib
        flat = np.flatnonzero(block_mask.numpy()).astype(np.int32)
        nnz = len(flat)
        row = flat // np.int32(width)
        col = flat - row * np.int32(width)
        tap = col // np.int32(ib)
        t_row = row // np.int32(ob) * np.int32(ib) + (col - tap * np.int32(ib))  # of each slot, in order of slots
        # Slots ascend by row, so a stable sort by (transposed row, tap) leaves rows ascending.
        t_perm = _stable_order(t_row if t == 1 else t_row * np.int32(t) + tap)
        entry = tap * np.int32(ob) + row % np.int32(ob)
        for target, values in ((v.col, col), (v.row, row), (v.t_row, entry[t_perm]), (v.t_perm, t_perm)):
            out = target.numpy()
            out[:nnz], out[nnz:] = values, 0
        for ptr, order, keys in ((v.row_ptr, v.row_order, row), (v.t_ptr, v.t_order, t_row)):
            lengths = np.bincount(keys, minlength=order.shape[0])
            ptr[0] = 0
            np.cumsum(lengths, out=ptr.numpy()[1:])
            order.copy_(torch.from_numpy(np.argsort(-lengths, kind="stable")))

    def _write_whole(self, block_mask: Tensor) -> None:
        """All but the unions with work per block of the grid. Sizes do not depend on the mask: no wait for a GPU."""
        g, ob, t, ib = self.grid.shape
        v = self.view
        flat = block_mask.reshape(g * ob, t * ib)
        slot = flat.flatten().cumsum(0) - 1

        def fill(keep: Tensor, ptr: Tensor, order: Tensor) -> None:
            lengths = keep.sum(1)
            ptr[0] = 0
            ptr[1:] = lengths.cumsum(0)
            order.copy_(torch.argsort(lengths, descending=True, stable=True))

        position = torch.arange(flat.numel(), device=flat.device)
        kept = flat.flatten()
        fill(flat, v.row_ptr, v.row_order)
        v.col.copy_(self._compact(kept, slot, position % (t * ib)))
        v.row.copy_(self._compact(kept, slot, position // (t * ib)))

        t_mask = block_mask.permute(0, 3, 2, 1).reshape(g * ib, t * ob)
        t_kept = t_mask.flatten()
        t_slot = t_kept.cumsum(0) - 1
        fill(t_mask, v.t_ptr, v.t_order)
        v.t_row.copy_(self._compact(t_kept, t_slot, position % (t * ob)))
        slot_transposed = slot.view(self.grid.shape).permute(0, 3, 2, 1).flatten()
        v.t_perm.copy_(self._compact(t_kept, t_slot, slot_transposed))

    def _compact(self, keep: Tensor, place: Tensor, what: Tensor) -> Tensor:
        """int64 [capacity]: ``what`` at ``place`` where ``keep``, 0 elsewhere; all three [n]."""
        out = torch.zeros(self.capacity + 1, dtype=torch.int64, device=keep.device)
        out.scatter_(0, torch.where(keep, place.clamp(0, self.capacity), self.capacity), what)
        return out[: self.capacity]

    def _write_unions(self, block_mask: Tensor) -> None:
        """Panels of neighbouring rows. Sizes do not depend on the mask: no wait for a GPU."""
        g, ob, _, ib = self.grid.shape
        v = self.view

        def unite(keep: Tensor, panel: int, ptr: Tensor, entries: Tensor) -> None:
            """``keep`` [groups, rows, columns] into panels of rows and the columns that any of them has."""
            padded = F.pad(keep, (0, 0, 0, -keep.shape[1] % panel))
            bits = 1 << torch.arange(panel, device=keep.device)
            rows_of = (padded.unflatten(1, (-1, panel)) * bits[:, None]).sum(2)
            present = rows_of.flatten(0, 1) > 0
            ptr[0] = 0
            ptr[1:] = present.sum(1).cumsum(0)
            column = torch.arange(keep.shape[2], device=keep.device) << panel
            entry = (rows_of + column).flatten()
            entries.copy_(self._compact(present.flatten(), present.flatten().cumsum(0) - 1, entry))

        if self.grid.unions:
            unite(block_mask.reshape(g, ob, -1), union_rows(self.grid.block[0]), v.union_ptr, v.union)
        if self.grid.t_unions:
            turned = block_mask.permute(0, 3, 2, 1).reshape(g, ib, -1)
            unite(turned, union_rows(self.grid.block[1]), v.t_union_ptr, v.t_union)

    def validate(self) -> None:
        """Check every array of the packed buffer against the others.

        Raises:
            ValueError: naming the first array that is wrong.
        """
        if self.index.dtype != torch.int32:
            raise ValueError(f"index: expected int32, got {self.index.dtype}")
        v = self.view
        try:
            fresh = BlockLayout.from_rows(self.grid, v.row_ptr, v.col).view
        except ValueError as error:
            raise ValueError(f"corrupt layout: {error}") from None
        for name in IndexView.__dataclass_fields__:
            if not torch.equal(getattr(v, name), getattr(fresh, name)):
                raise ValueError(
                    f"corrupt layout: {name} does not follow from row_ptr and col; rebuild it with from_rows"
                )
