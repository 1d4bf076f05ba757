"""Times that a kernel on a GPU is held against: the ideal, and the dense op that stands in for it.

Device memory sees every activation, value and result once. The dense op is cuBLAS, for convolutions cuDNN at
``Chip.conv_share`` of the rate of cuBLAS; groups cost it nothing here, so that a kernel is not chosen too early.
"""

from __future__ import annotations

import math

from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.problem import Problem


def activation_bytes(problem: Problem) -> int:
    """Bytes of x (dx) and y (dy)."""
    p = problem
    return (p.image * p.in_features + p.m * p.out_features) * p.itemsize


def ideal_seconds(problem: Problem, chip: Chip) -> float:
    """Stored multiply-adds at the rate of cuBLAS, or everything once through device memory."""
    return max(problem.stored_flops / chip.rate(problem.dtype), activation_bytes(problem) / chip.hbm_bandwidth)


def dense_seconds(problem: Problem, chip: Chip) -> float:
    """The dense op on cuBLAS: launch plus the larger of 2 M O I / rate and (M I + M O + O I) s / bandwidth; on cuDNN
    with its share of the rate.

    Waves are not rounded up, so small shapes look faster than they are and a kernel is not chosen too early.
    """
    p = problem
    rate = chip.rate(p.dtype) * (chip.conv_share if p.kind == "conv2d" else 1.0)
    return chip.launch + max(p.dense_flops / rate, (activation_bytes(p) + p.weight * p.itemsize) / chip.hbm_bandwidth)


def dense_fallback_seconds(problem: Problem, chip: Chip) -> float:
    """The same result on the dense op: :func:`dense_seconds`, and the way from and to stored blocks.

    With K the elements of the dense weight. forward, dgrad: zeros and blocks are written into a dense weight,
    (K + 2 nnz bo bi) s bytes and 2 launches. wgrad: blocks of the dense gradient are gathered, 2 nnz bo bi s bytes and
    1 launch. scores: the dense gradient is read once and reduced, K s bytes and 1 launch.
    """
    p, s = problem, problem.itemsize
    stored, full = p.capacity * math.prod(p.block) * s, p.weight * s
    moved, launches = {"wgrad": (2 * stored, 1), "scores": (full, 1)}.get(p.step, (full + 2 * stored, 2))
    return dense_seconds(p, chip) + launches * chip.launch + moved / chip.hbm_bandwidth
