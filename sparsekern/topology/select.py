"""Which entries of a score vector are the lowest or highest, ties broken at random, without waiting for a GPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsekern.topology.streams import Stream

# Primes above any number of blocks that fits in int32: multiplying by one permutes every range of indices.
_PRIMES = (4294967291, 4294967279, 4294967231, 4294967197, 4294967189, 4294967161, 4294967143, 4294967111)


def lowest(scores: Tensor, count: int, stream: Stream) -> Tensor:
    """bool, the shape of ``scores`` [n]: exactly ``count`` entries of the lowest scores.

    Entries tied at the threshold are taken in a pseudo-random order (freshly grown blocks are all zero, and a plain
    sort would always drop those of the first rows). NaN counts as the highest.

    Args:
        scores: [n], any float dtype.
        count: within 0..n.
        stream: random numbers.
    """
    prime, shift = _PRIMES[stream.integer(len(_PRIMES))], stream.integer(1 << 31)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if _on_cpu(scores):
        return torch.from_numpy(_lowest(scores.detach().numpy(), count, prime, shift))
    threshold = scores.kthvalue(count).values
    below = torch.where(threshold.isnan(), ~scores.isnan(), scores < threshold)
    tied = (scores == threshold) | (scores.isnan() & threshold.isnan())
    number = tied.cumsum(0) - 1
    total = number[-1] + 1
    place = (number * prime + shift) % total
    return below | (tied & (place < count - below.sum()))


def _on_cpu(tensor: Tensor) -> bool:
    """Whether numpy can be used: 3 to 10 times as fast as the calls that a GPU needs, with the same result."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


def _lowest(scores: np.ndarray, count: int, prime: int, shift: int) -> np.ndarray:
    """What :func:`lowest` computes, for numpy."""
    threshold = np.partition(scores, count - 1)[count - 1]  # NaN sorts last
    chosen: np.ndarray = scores < threshold if threshold == threshold else ~np.isnan(scores)
    tied = np.flatnonzero(scores == threshold if threshold == threshold else np.isnan(scores))
    place = (np.arange(len(tied)) * prime + shift) % len(tied)
    chosen[tied[place < count - np.count_nonzero(chosen)]] = True
    return chosen


def highest(scores: Tensor, count: int, stream: Stream) -> Tensor:
    """bool, the shape of ``scores`` [n]: exactly ``count`` entries of the highest scores; see :func:`lowest`.

    NaN counts as the lowest.
    """
    return lowest(-scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), count, stream)


def random_positions(mask: Tensor, total: int, count: int, stream: Stream) -> Tensor:
    """int64 [count]: distinct random positions where ``mask`` [n] is true, which it is ``total`` times.

    Uniform over all subsets; ascending.
    """
    picked = torch.from_numpy(stream.subset(total, count)).to(mask.device, non_blocking=True)
    if type(mask) is Tensor and mask.device.type == "cpu":
        flags = mask.numpy()
        if 2 * total < len(flags):
            return torch.from_numpy(np.flatnonzero(flags)[picked.numpy()])
        # Few entries are false: the true entry number k at position p has p - k of them before it.
        gaps = np.flatnonzero(~flags)
        return picked + torch.from_numpy(np.searchsorted(gaps - np.arange(len(gaps)), picked.numpy(), side="right"))
    return torch.searchsorted(mask.cumsum(0), picked + 1)


def positions(mask: Tensor, count: int) -> Tensor:
    """int64 [count]: where ``mask`` [n] is true, which it is ``count`` times; ascending. No host sync."""
    if type(mask) is Tensor and mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.searchsorted(mask.cumsum(0), torch.arange(1, count + 1, device=mask.device))


def best(scores: Tensor) -> Tensor:
    """bool, the shape of ``scores`` [n]: the highest entry alone, the first of equal ones; NaN is the lowest."""
    scores = scores.nan_to_num(nan=-torch.inf)
    top = scores == scores.max()
    return top & (top.cumsum(0) == 1)


def rank_within(key: Tensor, scores: Tensor, keys: int) -> Tensor:
    """int64 [n]: how many entries of equal ``key`` score higher, ties by index; NaN last.

    Args:
        key: int64 [n] within 0..keys-1.
        scores: [n].
    """
    by_score = torch.argsort(scores.nan_to_num(nan=-torch.inf), descending=True, stable=True)
    if keys == 1:
        rank = torch.empty_like(by_score)
        return rank.scatter_(0, by_score, torch.arange(key.numel(), device=key.device))
    order = by_score[torch.argsort(key[by_score], stable=True)]
    sizes = torch.zeros(keys, dtype=torch.int64, device=key.device).scatter_add_(0, key, torch.ones_like(key))
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(key.numel(), device=key.device) - first[key[order]]
    return rank
