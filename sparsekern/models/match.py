"""The narrower dense net of equal MACs, the baseline that every sparse net has to beat."""

from __future__ import annotations

import math

import torch
from torch import nn

from sparsekern.models.count import count_macs
from sparsekern.models.registry import build

TOLERANCE = 2e-3  # relative; the search stops here, narrow nets may not get as close
RESOLUTION = 1e-3  # relative, of the width; MACs change by twice as much
NARROWEST = 1e-6


def macs_at(name: str, width: float, *, num_classes: int, in_shape: tuple[int, int, int]) -> int:
    """MACs per sample of ``name`` at ``width``, on meta tensors: no weights are allocated."""
    with torch.device("meta"):
        model = build(name, num_classes=num_classes, in_shape=in_shape, width=width)
        return sum(count_macs(model, torch.empty(1, *in_shape)).values())


def match_macs(
    name: str, target_macs: float, *, num_classes: int = 10, in_shape: tuple[int, int, int] = (3, 32, 32)
) -> tuple[float, nn.Module]:
    """Width at which the dense net costs ``target_macs`` per sample, and that net.

    Bisection over ``width``; MACs rise with it in steps of one channel, so the result is within 2 % wherever the
    steps are that fine (narrow nets: the nearest step).

    Args:
        name: a model of :func:`sparsekern.models.names`.
        target_macs: linear and convolution MACs per sample, such as those left in a sparse net.
        num_classes: width of the head.
        in_shape: ``(C, H, W)`` of one sample.

    Returns:
        ``(width, model)``.

    Raises:
        ValueError: the target is below the narrowest net or not positive.
    """

    costs: dict[float, int] = {}

    def macs(width: float) -> int:
        if width not in costs:
            costs[width] = macs_at(name, width, num_classes=num_classes, in_shape=in_shape)
        return costs[width]

    def error(width: float) -> float:
        return abs(costs[width] - target_macs)

    low, high = NARROWEST, 1.0
    if target_macs < macs(low):
        raise ValueError(f"target_macs: expected at least {costs[low]}, {name} at one channel, got {target_macs:.6g}")
    while macs(high) < target_macs:
        low, high = high, 2 * high
    while min(map(error, costs)) > TOLERANCE * target_macs and high - low > RESOLUTION * high:
        # MACs are nearly a square in the width: interpolate their root, every other time halve so that it ends.
        share = 0.5
        if len(costs) % 2 and macs(high) > macs(low):
            root, first, last = (math.sqrt(m) for m in (target_macs, macs(low), macs(high)))
            share = min(max((root - first) / (last - first), 0.05), 0.95)
        middle = round(low + share * (high - low), 6)
        if macs(middle) < target_macs:
            low = middle
        else:
            high = middle
    best = min(costs, key=error)
    return best, build(name, num_classes=num_classes, in_shape=in_shape, width=best)
