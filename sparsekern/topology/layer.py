"""One sparse layer as a topology update sees it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from sparsekern.layout import BlockGrid, BlockLayout
from sparsekern.nn import SparseModule
from sparsekern.topology.streams import Stream

DROP_BY = ("l1", "l2", "linf", "gradient", "random", "signed")


class Layer:
    """A sparse layer, its count of stored blocks kept on the host, and what an update asks of it.

    Attributes:
        nnz: stored blocks.
        explored: bool [blocks], stored at any time so far.
        reliable: bool [blocks], kept by at least one update.
    """

    explored: Tensor
    reliable: Tensor

    def __init__(self, name: str, module: SparseModule) -> None:
        self.name, self.module = name, module
        self.nnz = module.layout.nnz

    @property
    def grid(self) -> BlockGrid:
        return self.module.grid

    @property
    def layout(self) -> BlockLayout:
        return self.module.layout

    @property
    def values(self) -> nn.Parameter:
        return self.module.values

    @property
    def capacity(self) -> int:
        return self.values.shape[0]

    @property
    def free(self) -> int:
        """Blocks of the grid that are not stored."""
        return self.grid.blocks - self.nnz

    @property
    def device(self) -> torch.device:
        return self.values.device

    def used(self) -> Tensor:
        """bool [capacity]: slots that hold a block."""
        return torch.arange(self.capacity, device=self.device) < self.nnz

    def stored(self) -> Tensor:
        """bool [blocks]."""
        return self.layout.block_mask().flatten()

    def stored_but(self, drop: Tensor) -> Tensor:
        """bool [blocks]: stored blocks without those in the slots ``drop`` bool [capacity]."""
        mask = torch.zeros(self.grid.blocks + 1, dtype=torch.bool, device=self.device)
        # Spare slots point past the last block.
        return mask.scatter_(0, self.layout.slots(), self.used() & ~drop)[:-1]

    def places(self) -> Tensor:
        """int64 [nnz], ascending: positions of the stored blocks in the grid."""
        return self.layout.slots()[: self.nnz]

    def magnitude(self, by: str, stream: Stream) -> Tensor:
        """Drop scores [capacity] in fp32, NaN at spare slots: of one element on average, so that layers compare.

        ``l1``, ``l2``, ``linf``: norms of the blocks (l1 and l2 per element); ``gradient``: mean |w * g| with the
        gradient of this step; ``random``; ``signed`` (SET, Mocanu et al. 2018): see :class:`Method`, here |w|.

        Raises:
            RuntimeError: ``gradient`` where the gradient is gone.
        """
        values = self.values.detach().float()
        if by == "random":
            scores = stream.uniform(self.capacity, self.device)
        elif by == "gradient":
            if self.values.grad is None:
                raise RuntimeError(
                    f"{self.name}: drop_by='gradient' expected the gradient of this step, got None; call topo.step() "
                    "after optimizer.step() and before optimizer.zero_grad()"
                )
            scores = (values * self.values.grad.float()).abs().mean((1, 2))
        elif self.grid.block == (1, 1):  # all norms are |w|
            scores = values.flatten().abs()
        elif by == "linf":
            scores = values.abs().amax((1, 2))
        elif by == "l2":
            scores = values.square().mean((1, 2)).sqrt()
        else:
            scores = values.abs().mean((1, 2))
        # NaN is for spare slots alone, or one of them would count as dropped in place of a diverged block.
        return scores.masked_fill(scores.isnan(), torch.inf).masked_fill(~self.used(), torch.nan)

    def inside(self, places: Tensor) -> Tensor:
        """bool [n, bo, bi]: which elements of the blocks at ``places`` int64 [n] lie inside the weight."""
        _, ob, t, ib = self.grid.shape
        bo, bi = self.grid.block
        o = places // (t * ib) % ob * bo
        i = places % ib * bi
        rows = o[:, None] + torch.arange(bo, device=places.device) < self.grid.out_per_group
        columns = i[:, None] + torch.arange(bi, device=places.device) < self.grid.in_per_group
        return rows[:, :, None] & columns[:, None, :]

    def row_of_slot(self) -> Tensor:
        """int64 [capacity]: block row over all groups; of spare slots 0."""
        return self.layout.view.row.long()

    def column_of_slot(self) -> Tensor:
        """int64 [capacity]: block column over all groups; of spare slots 0."""
        view, (_, ob, _, ib) = self.layout.view, self.grid.shape
        return view.row.long() // ob * ib + view.col.long() % ib

    @functools.cached_property
    def elements_of_block(self) -> Tensor:
        """int64 [blocks] on the CPU: elements of each block inside the weight, without padding."""
        _, ob, t, ib = self.grid.shape
        bo, bi = self.grid.block
        rows = (self.grid.out_per_group - torch.arange(ob) * bo).clamp(max=bo)
        columns = (self.grid.in_per_group - torch.arange(ib) * bi).clamp(max=bi)
        per_tap = rows[:, None, None] * columns[None, None, :]
        return per_tap.expand(ob, t, ib).expand(self.grid.shape).flatten()
