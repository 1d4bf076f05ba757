"""Small vision transformers whose every product with a weight is an ``nn.Linear`` called as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.models.layers import init_kaiming_, scaled

SIZES = {"tiny": (12, 3), "small": (12, 6)}  # layers, heads of 64


def fitting_patch(height: int, width: int) -> int:
    """The largest power of two up to 16 that divides both sides and leaves 7 patches along the shorter one.

    Inputs under 14 pixels settle for half as many patches as pixels.
    """
    side = min(height, width)
    for patch in (16, 8, 4, 2):
        if height % patch == 0 and width % patch == 0 and side // patch >= min(7, side // 2):
            return patch
    return 1


class Attention(nn.Module):
    """Multi-head self-attention, ``[B, T, D]`` to ``[B, T, D]``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm attention and feed-forward layers, each with a residual connection."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) with learned positions and mean pooling instead of a class token.

    ``width`` scales the width of each head and of the feed-forward layers; the number of heads stays.

    Args:
        size: ``tiny`` (12 layers, 3 heads) or ``small`` (12 layers, 6 heads); heads are 64 wide, the
            feed-forward layers four times the embedding.
        patch: side of a patch in pixels, or None for one that fits the input (:func:`fitting_patch`).

    Raises:
        ValueError: the patch does not divide the image.
    """

    def __init__(
        self,
        size: str,
        num_classes: int,
        in_shape: tuple[int, int, int],
        width: float = 1.0,
        *,
        patch: int | None = None,
    ) -> None:
        super().__init__()
        depth, heads = SIZES[size]
        channels, rows, cols = in_shape
        patch = patch or fitting_patch(rows, cols)
        if rows % patch or cols % patch:
            raise ValueError(f"vit-{size}: expected a patch that divides {rows}x{cols} pixels, got {patch}")
        dim = heads * scaled(64, width)
        self.stem = nn.Conv2d(channels, dim, patch, patch)
        self.positions = nn.Parameter(torch.zeros(1, rows // patch * (cols // patch), dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, scaled(4 * 64 * heads, width)) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        init_kaiming_(self, "linear")
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.positions
        out: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return out
