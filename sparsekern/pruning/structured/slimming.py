"""Network slimming: batch-norm scales are pushed to zero in training, then one threshold decides.

Source: Liu et al. 2017 (arXiv:1708.06519): L1 on the scales, sections 3.2 and 3.3; they use s = 1e-4 for VGG and 1e-5
for ResNet and DenseNet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsekern.pruning.structured.filters import largest
from sparsekern.pruning.structured.graph import Group


@torch.no_grad()
def slimming_penalty_(model: nn.Module, s: float) -> None:
    """Add the subgradient of ``s * sum |gamma|`` over all batch norms to their gradients.

    Call it after ``backward`` and before the optimizer's step. A scale without a gradient is left out.

    Args:
        s: weight of the penalty, 1e-4 (VGG) or 1e-5 (ResNet) in the paper.

    Raises:
        ValueError: ``s`` is negative.
    """
    if not s >= 0:
        raise ValueError(f"s: expected a penalty of 0 or more, got {s!r}")
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and module.weight.grad is not None:
            module.weight.grad.add_(torch.sign(module.weight), alpha=s)


def scales(model: nn.Module, group: Group) -> Tensor:
    """Mean |gamma| over the batch norms of ``group``, float64 [channels].

    Raises:
        ValueError: no batch norm with a scale for each channel follows.
    """
    found = []
    for name in group.norms:
        weight = model.get_submodule(name).weight
        if isinstance(weight, Tensor) and weight.numel() == group.channels:
            found.append(weight.detach().abs().double().cpu())
    if not found:
        raise ValueError(f"slimming: {group.name} has no batch norm whose scales could be ranked; exclude it")
    return torch.stack(found).mean(0)


def global_threshold(scores: Mapping[str, Tensor], ratio: float, min_channels: int = 1) -> dict[str, list[int]]:
    """Channels kept when the ``floor(ratio * n)`` smallest of all ``n`` scores go.

    A layer that would lose everything keeps its ``min_channels`` largest, so less may go than asked. Of equal scores
    the later ones go.

    Args:
        scores: [channels] of each group.
        ratio: fraction of all channels, from 0 to below 1.

    Returns:
        ``{group: kept channels, ascending}``.
    """
    if not scores:
        return {}
    everything = torch.cat([s.double() for s in scores.values()])
    stays = torch.zeros(everything.numel(), dtype=torch.bool)
    stays[largest(everything, everything.numel() - math.floor(ratio * everything.numel() + 1e-6))] = True
    kept: dict[str, list[int]] = {}
    start = 0
    for name, own in scores.items():
        mine = stays[start : start + own.numel()].nonzero().flatten().tolist()
        least = min(min_channels, own.numel())
        kept[name] = mine if len(mine) >= least else largest(own, least)
        start += own.numel()
    return kept
