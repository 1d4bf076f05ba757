"""Scores of filters by the size of their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekern.pruning.structured.graph import Group


def filter_norms(weight: Tensor, order: int) -> Tensor:
    """L1 or L2 norm of each output channel over (in, kh, kw).

    Args:
        weight: [out, in] or [out, in, kh, kw].
        order: 1 or 2.

    Returns:
        float64 [out].
    """
    return torch.linalg.vector_norm(weight.detach().double().flatten(1), order, dim=1)


def group_scores(model: nn.Module, group: Group, order: int) -> Tensor:
    """Norms of the filters that write each channel of ``group``, summed over tied layers; float64 [channels].

    ``order=1`` is the criterion of Li et al. 2017 (arXiv:1608.08710, section 3.1), ``order=2`` that of soft filter
    pruning (He et al. 2018, arXiv:1808.06866, eq. 2).
    """
    norms = [filter_norms(model.get_submodule(name).weight, order) for name in group.producers]  # type: ignore[arg-type]
    return torch.stack([n.cpu() for n in norms]).sum(0)


def largest(scores: Tensor, count: int) -> list[int]:
    """Indices of the ``count`` largest scores, ascending; of equal ones the earlier stay."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(int(i) for i in order[:count])
