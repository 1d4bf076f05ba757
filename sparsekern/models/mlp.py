"""Multilayer perceptrons on flattened images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from sparsekern.models.layers import init_kaiming_, scaled


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        hidden: widths of the hidden layers at ``width=1``.

    ``[B, C, H, W]`` (or ``[B, C*H*W]``) to ``[B, num_classes]``.
    """

    def __init__(
        self, hidden: Sequence[int], num_classes: int, in_shape: tuple[int, int, int], width: float = 1.0
    ) -> None:
        super().__init__()
        features = [math.prod(in_shape), *(scaled(h, width) for h in hidden)]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(features):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(features[-1], num_classes)
        init_kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x.flatten(1)))
        return out
