"""ThiNet: drop the channels that the next layer misses least, measured on data.

Source: Luo et al. 2017 (arXiv:1707.06342): samples and objective in section 3.2.1 (eq. 6), greedy selection in
algorithm 1, least-squares scales in section 3.2.2 (eq. 7).
"""

from __future__ import annotations

import torch
from torch import Tensor


def contributions(patches: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """What each input channel adds to one random output of each sample.

    Args:
        patches: float64 [n, channels, k], from :func:`sparsekern.pruning.structured.calibration.sample`.
        weight: [out, channels, k].

    Returns:
        float64 [n, channels]; a row sums to the output without its bias.
    """
    rows = torch.randint(weight.shape[0], (patches.shape[0],), generator=generator).to(weight.device)
    return (patches * weight[rows].double()).sum(2)


def greedy(x: Tensor, keep: int) -> list[int]:
    """Channels to keep: the others are chosen one by one so that the squared sum of what goes stays smallest.

    Args:
        x: contributions, float64 [n, channels].
        keep: how many stay.

    Returns:
        Kept channels, ascending.
    """
    gram = (x.T @ x).cpu()
    cost_alone = gram.diagonal()
    overlap = torch.zeros_like(cost_alone)  # of each channel with the sum of those removed so far
    gone = torch.zeros(len(cost_alone), dtype=torch.bool)
    for _ in range(len(cost_alone) - keep):
        growth = (2 * overlap + cost_alone).masked_fill(gone, torch.inf)
        best = int(growth.argmin())
        gone[best] = True
        overlap += gram[best]
    return (~gone).nonzero().flatten().tolist()


def rescale(x: Tensor, kept: list[int]) -> Tensor:
    """Factors of the kept channels that fit the full output best, by least squares; float64 [kept]."""
    gone = x.sum(1, keepdim=True) - x[:, kept].sum(1, keepdim=True)
    return 1 + least_squares(x[:, kept], gone)[:, 0]


def least_squares(a: Tensor, b: Tensor) -> Tensor:
    """The smallest of the minimisers of ``|a w - b|``, on the CPU in float64; [columns of a, columns of b]."""
    return torch.linalg.lstsq(a.double().cpu(), b.double().cpu(), driver="gelsy").solution
