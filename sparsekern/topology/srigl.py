"""SRigL: RigL with a constant fan-in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekern.topology.layer import Layer
from sparsekern.topology.method import Change, Update
from sparsekern.topology.rigl import RigL
from sparsekern.topology.select import highest, positions, sorted_rows, stable_order
from sparsekern.topology.streams import Stream


@dataclass(frozen=True)
class SRigL(RigL):
    """Dynamic sparse training with structured sparsity (Lasby et al. 2023, arXiv:2305.02299): constant fan-in.

    Every block row stores equally many blocks, and rows that matter little lose all of theirs. A layer's small blocks
    are dropped as in RigL. Blocks that stay and the places of the largest gradients, as many as were dropped, are
    salient. A row with fewer salient blocks than max(1, int(ablation * fan-in)) is ablated: its outputs are its bias,
    until it has enough salient places again. The other rows share the layer's blocks: they are trimmed to the new
    fan-in, nnz // rows, smallest blocks first, and grow up to it where their gradient is largest. The remainder goes
    to the most salient rows, one block each, so the layer's count stays exactly and counts of rows differ by at most
    one. At least as many rows stay as hold the blocks, and all rows of the last sparse layer.

    Start from ``SparsityConfig(pattern="fan_in")``; other masks get constant fan-in from the first update. Where a row
    has no place left that was not just dropped, it keeps more of its blocks instead.

    Attributes:
        ablation: gamma; 0 ablates no row. The paper has 0.3 for convolutional nets, 0.95 for vision transformers.
    """

    ablation: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.ablation <= 1.0:
            raise ValueError(f"SRigL: ablation: expected a share within [0, 1], got {self.ablation!r}")
        if self.scope != "layer":
            raise ValueError(f"SRigL: scope: expected 'layer' (fan-in is constant within a layer), got {self.scope!r}")
        if self.min_per_row or self.min_per_col:
            raise ValueError(
                "SRigL: min_per_row, min_per_col: expected 0 (rows hold equally many blocks anyway), got "
                f"{self.min_per_row} and {self.min_per_col}"
            )

    def changes(self, update: Update) -> dict[str, Change]:
        last = list(update.layers)[-1]
        changes = {}
        for name, layer in update.layers.items():
            drop, count = self._layer_drops(replace(update, layers={name: layer}))[name]
            if count:
                changes[name] = self._rows(update, layer, drop, count, self.ablation if name != last else 0.0)
        return changes

    def _rows(self, update: Update, layer: Layer, drop: Tensor, count: int, ablation: float) -> Change:
        """From ``drop`` [capacity], ``count`` of the layer's smallest blocks, to a change of constant fan-in."""
        grid, used = layer.grid, layer.used()
        width = grid.blocks // grid.rows
        row_of_slot = layer.row_of_slot()
        gradient = update.found[layer.name]  # -inf at stored blocks
        stored, kept = _count(row_of_slot, used, grid.rows), _count(row_of_slot, used & ~drop, grid.rows)
        candidates = highest(gradient, count, update.stream(layer.name, "ties"))
        salient = kept + candidates.view(grid.rows, width).sum(1)

        fan_in = max(1, layer.nnz // int((stored > 0).sum()))
        enough = max(1, int(ablation * fan_in)) if ablation else 0
        rows = max(int((salient >= enough).sum()), -(-layer.nnz // width))
        # Fractions below 1 break ties between whole numbers.
        ranked = salient + update.stream(layer.name, "rows").uniform(grid.rows, layer.device).double() * 0.5
        active = highest(ranked, rows, update.stream(layer.name, "row ties"))

        share, rest = divmod(layer.nnz, rows)
        # Rows that hold more than the share already come first: less is trimmed.
        order = (ranked + (kept > share) * 2.0 * grid.blocks).masked_fill(~active, torch.nan)
        fan = active * share + highest(order, rest, update.stream(layer.name, "row ties")).long()
        stay = torch.maximum(torch.minimum(kept, fan), fan - (width - stored))

        rank = _rank_in_row(row_of_slot, _kept_first(layer, self.drop_scores(update, layer), drop), grid.rows)
        dropped = used & (rank >= stay[row_of_slot])
        gone = int(dropped.sum())
        new = _highest_of_rows(gradient.view(grid.rows, width), fan - stay, update.stream(layer.name, "grow"))
        return Change(dropped, positions(new.flatten(), gone), gone, gone)

    def check(self, layers: Mapping[str, Layer]) -> None:
        super().check(layers)
        if empty := [name for name, layer in layers.items() if not layer.nnz]:
            raise ValueError(f"SRigL: expected stored blocks in every sparse layer, got none in {empty[0]!r}")


def _count(key: Tensor, mask: Tensor, keys: int) -> Tensor:
    """int64 [keys]: how many entries of ``mask`` have each key."""
    return torch.zeros(keys, dtype=torch.int64, device=key.device).scatter_add_(0, key, mask.long())


def _kept_first(layer: Layer, scores: Tensor, drop: Tensor) -> Tensor:
    """int64 [capacity]: places in the order of ``scores``, kept blocks above dropped ones; -1 at spare slots."""
    place = torch.empty_like(layer.row_of_slot())
    place[stable_order(scores)] = torch.arange(place.numel(), device=place.device)
    return (place + place.numel() * ~drop).masked_fill(~layer.used(), -1)


def _rank_in_row(row: Tensor, place: Tensor, rows: int) -> Tensor:
    """int64 [capacity]: how many slots of the same row have a higher place; spare slots rank behind all others."""
    # One sort of whole numbers: rows ascend, places fall.
    order = torch.argsort(row * (2 * place.numel() + 1) - place, stable=True)
    first = torch.searchsorted(row[order], torch.arange(rows, device=row.device))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=row.device) - first[row[order]]
    return rank


def _highest_of_rows(scores: Tensor, counts: Tensor, stream: Stream) -> Tensor:
    """bool [rows, width]: of each row as many of the highest ``scores`` as ``counts`` [rows] says.

    Ties are broken at random: where gradients are zero, first columns are no better.
    """
    rising = sorted_rows(scores)
    threshold = rising.gather(1, scores.shape[1] - counts.clamp(min=1)[:, None])
    threshold = threshold.masked_fill((counts == 0)[:, None], torch.inf)
    chosen, tied = scores > threshold, scores == threshold
    wanted = counts - chosen.sum(1)
    if bool((tied.sum(1) == wanted).all()):  # as good as always: no two gradients at a threshold are equal
        return chosen | tied
    order = stream.uniform(scores.numel(), scores.device).view_as(scores)
    row, column = tied.nonzero(as_tuple=True)
    by_order = torch.argsort(order[row, column], stable=True)
    by_row = by_order[torch.argsort(row[by_order], stable=True)]
    row, column = row[by_row], column[by_row]
    first = torch.searchsorted(row, torch.arange(scores.shape[0], device=row.device))
    taken = torch.arange(row.numel(), device=row.device) - first[row] < wanted[row]
    chosen[row[taken], column[taken]] = True
    return chosen
