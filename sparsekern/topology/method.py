"""What a topology method is: options, when it updates, and which blocks it moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sparsekern.topology.layer import DROP_BY, Layer
from sparsekern.topology.select import best, highest, lowest, positions, random_free, rank_within
from sparsekern.topology.streams import Stream

DROP_SCHEDULES = ("cosine", "linear", "constant")
SCOPES = ("layer", "global")
NEW_VALUES = ("zero", "random")

# Added to the scores of blocks that minima protect: far above any weight, and in fp64 it leaves 2e-10 of the scores.
PROTECTED = 2.0**20


@dataclass(frozen=True)
class Update:
    """What a method may look at in one update.

    Attributes:
        number: of this update, from 0.
        step: optimizer steps done.
        fraction: share of the stored blocks to drop now.
        progress: ``step / total_steps``.
        layers: the sparse layers by name.
        found: what the probes collected, by layer: [blocks] norms of gradient blocks, -inf at stored ones, summed over
            micro-batches and ranks.
        memory: what the method keeps between updates, part of the scheduler's state: tensors and plain values.
        over_ranks: a tensor to its sum over the ranks.
    """

    number: int
    step: int
    fraction: float
    progress: float
    seed: int
    layers: Mapping[str, Layer]
    found: Mapping[str, Tensor]
    memory: dict[str, Any]
    over_ranks: Callable[[Tensor], Tensor]

    def stream(self, layer: str, purpose: str) -> Stream:
        """Random numbers for one purpose in this update of one layer."""
        return Stream(self.seed, layer, self.number, purpose)


@dataclass(frozen=True)
class Change:
    """What happens to one layer.

    Attributes:
        drop: bool [capacity], the slots to empty; ``dropped`` are set.
        grow: int64 [grown], places in the grid of new blocks, not stored before.
    """

    drop: Tensor
    grow: Tensor
    dropped: int
    grown: int


@dataclass(frozen=True)
class Method:
    """Options that the methods share.

    Attributes:
        drop_fraction: share of a layer's blocks that the first update replaces, within [0, 1].
        update_every: optimizer steps between updates.
        stop_fraction: no update at or after this share of the run, within (0, 1].
        drop_schedule: how the share falls to the stop: "cosine" a/2 (1 + cos(pi t / T)) (RigL, Evci et al. 2020),
            "linear" a (1 - t / T), "constant".
        drop_by: which blocks go: the smallest "l1", "l2" or "linf" norm, the smallest |w * gradient| ("gradient"),
            any ("random"), or, at block 1 only, "signed": the smallest positive and the largest negative (SET, Mocanu
            et al. 2018).
        scope: "layer" replaces the same share of every layer; "global" compares blocks of all layers, and each layer
            grows as many as it lost.
        new_values: what grown blocks start from: "zero", or "random" normal values as large as the layer's others on
            average (as SET was published). Blocks of zeros have to outgrow the smallest of the others between two
            updates or they go again; means of large blocks lie close together, so that takes long.
        min_per_row, min_per_col: blocks that each block row and column keeps or gets, as far as the counts allow.

    Raises:
        ValueError: an option out of range, with what was expected.
    """

    drop_fraction: float = 0.3
    update_every: int = 100
    stop_fraction: float = 0.75
    drop_schedule: str = "cosine"
    drop_by: str = "l1"
    scope: str = "layer"
    new_values: str = "zero"
    min_per_row: int = 0
    min_per_col: int = 0

    # What the probes of an update step collect: "norms" of gradient blocks, the "dense" gradient, or None.
    probe: ClassVar[str | None] = None
    # Whether they collect at every step.
    probe_always: ClassVar[bool] = False
    # Whether blocks move between layers, within their capacities.
    redistributes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        who = type(self).__name__
        if not 0.0 <= self.drop_fraction <= 1.0:
            raise ValueError(f"{who}: drop_fraction: expected a share within [0, 1], got {self.drop_fraction!r}")
        if not 0.0 < self.stop_fraction <= 1.0:
            raise ValueError(f"{who}: stop_fraction: expected a share within (0, 1], got {self.stop_fraction!r}")
        for name in ("update_every", "min_per_row", "min_per_col"):
            value, low = getattr(self, name), int(name == "update_every")
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{who}: {name}: expected a whole number of {low} or more, got {value!r}")
        for name, allowed in (
            ("drop_schedule", DROP_SCHEDULES), ("drop_by", DROP_BY), ("scope", SCOPES), ("new_values", NEW_VALUES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{who}: {name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    # -- when ------------------------------------------------------------------------------------------------------

    def due(self, step: int, total_steps: int) -> bool:
        """Whether an update follows optimizer step ``step`` (from 1)."""
        return step % self.update_every == 0 and step < self.stop_fraction * total_steps

    def fraction(self, step: int, total_steps: int) -> float:
        """Share of the stored blocks that an update after ``step`` drops."""
        t = min(1.0, step / (self.stop_fraction * total_steps))
        if self.drop_schedule == "cosine":
            return self.drop_fraction / 2 * (1 + math.cos(math.pi * t))
        return self.drop_fraction * (1 - t if self.drop_schedule == "linear" else 1.0)

    # -- what ------------------------------------------------------------------------------------------------------

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Raise ``ValueError`` where the method does not fit the layers."""
        if self.drop_by == "signed" and any(layer.grid.block != (1, 1) for layer in layers.values()):
            raise ValueError("drop_by='signed': expected blocks of 1x1 (a block has no sign), use 'l1'")
        if self.drop_by == "signed" and self.scope != "layer":
            raise ValueError(f"drop_by='signed': expected scope='layer' (a share of each layer), got {self.scope!r}")

    def observe(self, layer: Layer, found: Tensor, memory: dict[str, Any]) -> None:
        """See what a probe collected in one step, for methods with ``probe_always``."""

    def changes(self, update: Update) -> dict[str, Change]:
        """The blocks to drop and to grow, by layer; layers left out stay as they are."""
        raise NotImplementedError

    @property
    def replaces_parameters(self) -> bool:
        """Whether :meth:`compacts` can be true."""
        return False

    def compacts(self, before: int, update: Update) -> bool:
        """Whether spare slots are given back now that ``before`` stored blocks have become those of ``update.layers``.

        Parameters are then replaced by smaller ones, in the optimizer too.
        """
        return False

    def compacted(self, layers: Mapping[str, Layer]) -> None:
        """Spare slots were given back."""


def drop_count(fraction: float, nnz: int) -> int:
    """``ceil(fraction * nnz)``, as in-time over-parameterization counts; rounding noise does not add a block."""
    return min(nnz, math.ceil(fraction * nnz - 1e-9))


def lowest_of_all(update: Update, scores: Mapping[str, Tensor], count: int) -> dict[str, tuple[Tensor, int]]:
    """The ``count`` lowest of all layers' ``scores`` [capacity]: bool [capacity] and how many, by layer (host sync)."""
    sizes = [part.numel() for part in scores.values()]
    chosen = lowest(torch.cat(list(scores.values())), count, update.stream("", "drop ties")).split(sizes)
    counts = torch.stack([part.sum() for part in chosen]).tolist()
    return dict(zip(scores, zip(chosen, counts, strict=True), strict=True))


@dataclass(frozen=True)
class DropAndGrow(Method):
    """Drop the least important blocks of a layer, grow as many elsewhere; what was just dropped does not return."""

    def changes(self, update: Update) -> dict[str, Change]:
        drops = self._global_drops(update) if self.scope == "global" else self._layer_drops(update)
        return {
            name: Change(drop, self.grow(update, update.layers[name], drop, count), count, count)
            for name, (drop, count) in drops.items()
            if count
        }

    def grow(self, update: Update, layer: Layer, drop: Tensor, count: int) -> Tensor:
        """Places int64 [count] of new blocks: random ones."""
        stream = update.stream(layer.name, "grow")
        if not (self.min_per_row or self.min_per_col):
            return random_free(layer.places(), layer.grid.blocks, count, stream)
        scores = stream.uniform(layer.grid.blocks, layer.device).masked_fill(layer.stored(), -torch.inf)
        return self.best_places(update, layer, drop, count, scores)

    def best_places(self, update: Update, layer: Layer, drop: Tensor, count: int, scores: Tensor) -> Tensor:
        """Places int64 [count] of the highest ``scores`` [blocks], -inf at stored blocks; minima first."""
        if self.min_per_row or self.min_per_col:
            scores = self._minima_first(layer, drop, scores)
        return positions(highest(scores, count, update.stream(layer.name, "ties")), count)

    # -- what goes -------------------------------------------------------------------------------------------------

    def drop_scores(self, update: Update, layer: Layer) -> Tensor:
        """[capacity]; NaN at spare slots, lifted above all others at blocks that the minima per row and column protect.

        Where more blocks have to go than are not protected, protected ones follow by their own scores.
        """
        scores = layer.magnitude(self.drop_by, update.stream(layer.name, "drop"))
        if not (self.min_per_row or self.min_per_col):
            return scores
        scores, used = scores.double(), layer.used()
        protected = torch.zeros_like(used)
        for key, keys, least in (
            (layer.row_of_slot(), layer.grid.rows, self.min_per_row),
            (layer.column_of_slot(), layer.grid.t_rows, self.min_per_col),
        ):
            # Spare slots claim to be in row 0, but rank behind every stored block. What the rows protect counts first
            # for the columns: fewer blocks are protected in all.
            protected |= (rank_within(key, scores + PROTECTED * protected, keys) < least) & used
        return scores + PROTECTED * protected

    def _layer_drops(self, update: Update) -> dict[str, tuple[Tensor, int]]:
        drops = {}
        for name, layer in update.layers.items():
            count = min(drop_count(update.fraction, layer.nnz), layer.free)
            scores = self.drop_scores(update, layer)
            stream = update.stream(name, "drop ties")
            if self.drop_by == "signed":
                drops[name] = self._signed(layer, scores, update.fraction, stream)
            else:
                drops[name] = lowest(scores, count, stream), count
        return drops

    def _global_drops(self, update: Update) -> dict[str, tuple[Tensor, int]]:
        """One threshold over all layers; every layer keeps a block, and drops no more than it can grow elsewhere."""
        scores = {name: self.scores_but_best(update, layer) for name, layer in update.layers.items()}
        total = drop_count(update.fraction, sum(layer.nnz for layer in update.layers.values()))
        drops = {}
        for name, (_, below) in lowest_of_all(update, scores, total).items():
            layer = update.layers[name]
            count = min(below, layer.free, layer.nnz - 1)
            drops[name] = lowest(scores[name], count, update.stream(name, "drop ties")), count
        return drops

    def scores_but_best(self, update: Update, layer: Layer) -> Tensor:
        """:meth:`drop_scores`, +inf at the best block: where layers compare, each keeps one."""
        scores = self.drop_scores(update, layer)
        return scores.masked_fill(best(scores) & layer.used(), torch.inf)

    def _signed(self, layer: Layer, scores: Tensor, fraction: float, stream: Stream) -> tuple[Tensor, int]:
        """The share of the smallest positive, and that of the largest negative weights; zeros count as positive."""
        negative = (layer.values.detach().view(-1) < 0) & layer.used()
        n = int(negative.sum())
        counts = [drop_count(fraction, n), drop_count(fraction, layer.nnz - n)]
        excess = max(0, sum(counts) - layer.free)
        counts = [counts[0] - min(excess, counts[0]), counts[1] - max(0, excess - counts[0])]
        drop = lowest(scores.masked_fill(~negative, torch.nan), counts[0], stream)
        drop |= lowest(scores.masked_fill(negative, torch.nan), counts[1], stream)
        return drop, sum(counts)

    def _minima_first(self, layer: Layer, drop: Tensor, scores: Tensor) -> Tensor:
        """``scores`` with +inf where block rows, and then block columns, that are short of their minimum take a place.

        One place at a time, the best one, for rows in a column that is short too if there is one: gradients of one
        column are often the largest of every row. (Host sync.)
        """
        _, _, t, ib = shape = layer.grid.shape
        best = scores.double().cpu().numpy().reshape(shape)
        have = layer.stored_but(drop).cpu().numpy().reshape(shape)
        taken = np.zeros(shape, dtype=bool)

        def take(place: tuple[int, ...]) -> None:
            have[place] = taken[place] = True

        for g, row in np.argwhere(have.sum((2, 3)) < self.min_per_row):
            while have[g, row].sum() < self.min_per_row and (open_ := (best[g, row] > -np.inf) & ~have[g, row]).any():
                helps = have[g].sum((0, 1)) < self.min_per_col
                tap, column = divmod(int(np.where(open_, best[g, row] + PROTECTED * helps, -np.inf).argmax()), ib)
                take((g, row, tap, column))
        for g, column in np.argwhere(have.sum((1, 2)) < self.min_per_col):
            line = best[g, :, :, column]
            while (mine := have[g, :, :, column]).sum() < self.min_per_col and (
                open_ := (line > -np.inf) & ~mine
            ).any():
                row, tap = divmod(int(np.where(open_, line, -np.inf).argmax()), t)
                take((g, row, tap, column))
        return scores.masked_fill(torch.from_numpy(taken.reshape(-1)).to(scores.device), torch.inf)
