"""Pieces that the networks share."""

from __future__ import annotations

import math

from torch import nn


def scaled(channels: int, width: float) -> int:
    """``channels * width`` rounded half up, at least 1. Monotone in ``width``, so that MACs can be bisected."""
    return max(1, math.floor(channels * width + 0.5))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def init_kaiming_(model: nn.Module, nonlinearity: str = "relu") -> None:
    """Kaiming-normal weights over the dense fan-in, zero biases, unit norms; in place.

    Source: He et al. 2015, eq. 10. Masks are applied later and do not change the fan.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity=nonlinearity)  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
