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


_SAMPLE = 4096


def _lowest(scores: np.ndarray, count: int, prime: int, shift: int) -> np.ndarray:
    """What :func:`lowest` computes, for numpy."""
    threshold = _smallest(scores, count)
    chosen: np.ndarray = scores < threshold if threshold == threshold else ~np.isnan(scores)
    tied = np.flatnonzero(scores == threshold if threshold == threshold else np.isnan(scores))
    place = (np.arange(len(tied)) * prime + shift) % len(tied)
    chosen[tied[place < count - np.count_nonzero(chosen)]] = True
    return chosen


def _smallest(scores: np.ndarray, count: int) -> np.floating:
    """The smallest score but ``count - 1``; NaN is the largest.

    Partitioning a million scores takes ten times as long as comparing them with a limit, so a sample guesses a limit
    that ``count`` scores should be below, and those are partitioned; a guess too low costs the comparison only.
    """
    if len(scores) > 16 * _SAMPLE:
        sample = np.sort(scores[:: len(scores) // _SAMPLE])
        share = count / len(scores)
        margin = 6 * (share * (1 - share) / len(sample)) ** 0.5 + 4 / len(sample)  # six standard deviations
        limit = sample[min(int((share + margin) * len(sample)), len(sample) - 1)]
        below = scores[scores < limit]
        if count <= len(below) <= len(scores) // 2:
            scores = below
    return np.partition(scores, count - 1)[count - 1]


def highest(scores: Tensor, count: int, stream: Stream) -> Tensor:
    """bool, the shape of ``scores`` [n]: exactly ``count`` entries of the highest scores; see :func:`lowest`.

    NaN counts as the lowest.
    """
    return lowest(-scores, count, stream)


def random_free(taken: Tensor, blocks: int, count: int, stream: Stream) -> Tensor:
    """int64 [count], ascending: distinct random positions within 0..blocks-1 that are not in ``taken``.

    Uniform over all subsets.

    Args:
        taken: int64 [n], ascending.
    """
    picked = torch.from_numpy(stream.subset(blocks - taken.numel(), count)).to(taken.device, non_blocking=True)
    # Free position number k lies at k plus the taken positions before it, and before taken[i] lie taken[i] - i free.
    free_before = taken - torch.arange(taken.numel(), device=taken.device)
    return picked + torch.searchsorted(free_before, picked, right=True)


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


def stable_order(values: Tensor) -> Tensor:
    """int64 [n]: the order that sorts ``values`` [n] ascending, equal ones by index; NaN last."""
    if type(values) is not Tensor or values.device.type != "cpu" or values.dtype is not torch.float32:
        return torch.argsort(values, stable=True)
    # Bits of positive floats order like integers, those of negative ones the other way round. With the index below
    # them the keys are unique, and numpy sorts integers with vector instructions: 4 times as fast.
    bits = torch.where(values.isnan(), torch.nan, values + 0.0).view(torch.int32).numpy().astype(np.int64)
    keys = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits) << 32 | np.arange(len(bits))
    return torch.from_numpy(np.argsort(keys))


def sorted_rows(scores: Tensor) -> Tensor:
    """Every row of ``scores`` [rows, width] sorted ascending; numpy is 30 times as fast as torch on a CPU."""
    if _on_cpu(scores):
        return torch.from_numpy(np.sort(scores.detach().numpy(), axis=1))
    return scores.sort(dim=1).values


def rank_within(key: Tensor, scores: Tensor, keys: int) -> Tensor:
    """int64 [n]: how many entries of equal ``key`` score higher, ties by index; NaN last.

    Args:
        key: int64 [n] within 0..keys-1.
        scores: [n].
    """
    by_score = stable_order(-scores.nan_to_num(nan=-torch.inf))
    order = by_score[torch.argsort(key[by_score], stable=True)]
    sizes = torch.zeros(keys, dtype=torch.int64, device=key.device).scatter_add_(0, key, torch.ones_like(key))
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(key.numel(), device=key.device) - first[key[order]]
    return rank
