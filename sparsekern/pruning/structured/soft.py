"""Soft filter pruning: the smallest filters are zeroed after every epoch and go on training.

Source: He et al. 2018 (arXiv:1808.06866), algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekern.pruning.structured.counts import Ratios, kept_count_soft, layer_ratios
from sparsekern.pruning.structured.filters import group_scores, largest
from sparsekern.pruning.structured.graph import ChannelGraph

if TYPE_CHECKING:
    from sparsekern.pruning.structured.report import Report


class SoftFilters:
    """Zeroes the ``floor(channels * ratio)`` filters of smallest L2 norm of every layer; they stay trainable. ::

        soft = SoftFilters(model, example, ratios=0.3)
        for epoch in range(epochs):
            ...train...
            soft.step()
        report = soft.harden_()

    Channels that a residual addition ties to other layers are left alone, as removing them would need an index layer.

    Args:
        model: dense.
        example_input: [B, ...].
        ratios: fraction zeroed, one for all layers or per glob of layer names.

    Attributes:
        zeroed: ``{layer: channels zeroed by the last step}``.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: a fraction out of range, or a glob that matches nothing.
    """

    def __init__(self, model: nn.Module, example_input: Tensor | tuple[Any, ...], ratios: Ratios) -> None:
        self.model, self.example_input = model, example_input
        self._groups = {n: g for n, g in ChannelGraph(model, example_input).groups().items() if not g.coupled}
        self.ratios = layer_ratios(ratios, self._groups)
        self.zeroed: dict[str, list[int]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Zero the smallest filters; at the end of every epoch."""
        self.zeroed = {}
        for name, group in self._groups.items():
            count = kept_count_soft(group.channels, self.ratios[name])
            kept = set(largest(group_scores(self.model, group, 2), count))
            gone = [i for i in range(group.channels) if i not in kept]
            self.zeroed[name] = gone
            layer = self.model.get_submodule(name)
            for tensor in (layer.weight, layer.bias):
                if isinstance(tensor, Tensor) and gone:
                    tensor[gone] = 0

    def harden_(self) -> Report:
        """Zero once more and remove the zeroed filters for good.

        A batch norm turns a zeroed filter into a constant, which goes with it: the papers drop it too, so the network
        is fine-tuned or at least its norms are measured again.
        """
        from sparsekern.pruning.structured.prune import prune_

        self.step()
        return prune_(self.model, self.example_input, method="soft-filters", ratios=self.ratios)
