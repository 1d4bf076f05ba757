"""DSR: dynamic sparse reparameterization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekern.topology.layer import Layer
from sparsekern.topology.method import Change, DropAndGrow, Update, drop_count, lowest_of_all
from sparsekern.topology.redistribute import affordable, check_room, redistribute, room
from sparsekern.topology.select import lowest

NORMS = ("l1", "l2", "linf")


@dataclass(frozen=True)
class DSR(DropAndGrow):
    """Dynamic sparse reparameterization (Mostafa & Wang 2019, arXiv:1902.05967): one adaptive threshold, random growth.

    Blocks of all layers whose magnitude (mean |w|, see ``drop_by``) is below a threshold go, and the layers grow as
    many in proportion to the blocks that they kept, at random places that were not stored. The total of stored blocks
    stays exactly; what a layer has no room for goes to the others.

    The threshold follows its target, the share of all blocks that ``drop_fraction`` and its schedule give: more than
    10 % above halves it, more than 10 % below doubles it, from the next update on. An update drops at most twice the
    target: mean magnitudes of blocks lie closer together than single weights, and one doubling could empty a layer.
    Each layer keeps its best block.

    Layers need the same block size, and spare slots for what they gain: ``SparsityConfig(capacity=1.5)``.

    Attributes:
        scope: "global" only.
        threshold: that the first update drops below.
    """

    scope: str = "global"
    threshold: float = 1e-3

    redistributes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "global":
            raise ValueError(f"DSR: scope: expected 'global' (one threshold for all layers), got {self.scope!r}")
        if self.drop_by not in NORMS:
            raise ValueError(f"DSR: drop_by: expected one of {', '.join(NORMS)}, got {self.drop_by!r}")
        if not 0.0 < self.threshold < float("inf"):
            raise ValueError(f"DSR: threshold: expected a magnitude above 0, got {self.threshold!r}")

    def check(self, layers: Mapping[str, Layer]) -> None:
        super().check(layers)
        check_room("DSR", layers)

    def changes(self, update: Update) -> dict[str, Change]:
        layers = update.layers
        scores = {name: self.scores_but_best(update, layer) for name, layer in layers.items()}
        dropped = affordable(self._counts(update, scores), layers)
        grown = redistribute(
            sum(dropped.values()),
            {name: layer.nnz - dropped[name] for name, layer in layers.items()},
            {name: room(layer, dropped[name]) for name, layer in layers.items()},
        )
        changes = {}
        for name, layer in layers.items():
            if dropped[name] or grown[name]:
                drop = lowest(scores[name], dropped[name], update.stream(name, "drop ties"))
                places = self.grow(update, layer, drop, grown[name])
                changes[name] = Change(drop, places, dropped[name], grown[name])
        return changes

    def _counts(self, update: Update, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """How many blocks of each layer are below the threshold, which then follows its target."""
        threshold = update.memory.get("threshold", self.threshold)
        below = [part < threshold for part in scores.values()]
        counts = torch.stack([part.sum() for part in below]).tolist()
        target = drop_count(update.fraction, sum(layer.nnz for layer in update.layers.values()))
        if sum(counts) > 1.1 * target:
            update.memory["threshold"] = threshold / 2
        elif sum(counts) < 0.9 * target:
            update.memory["threshold"] = threshold * 2
        if sum(counts) > 2 * target:
            return {name: count for name, (_, count) in lowest_of_all(update, scores, 2 * target).items()}
        return dict(zip(scores, counts, strict=True))
