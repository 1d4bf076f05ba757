"""Residual networks for 32-pixel images, depth 6n+2."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.models.layers import conv1x1, conv3x3, init_kaiming_, scaled


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution with batch norm where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2, with the 1x1 shortcuts of "The Unreasonable Effectiveness of Random Pruning".

    Args:
        depth: 6n+2.
        base: channels of the first stage; the others have twice and four times as many.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_shape: tuple[int, int, int],
        width: float = 1.0,
        *,
        base: int = 16,
    ) -> None:
        super().__init__()
        channels = scaled(base, width)
        self.stem = conv3x3(in_shape[0], channels)
        self.stem_norm = nn.BatchNorm2d(channels)
        stages: list[nn.Module] = []
        for stage in range(3):
            out = scaled(base * 2**stage, width)
            blocks: list[nn.Module] = []
            for i in range((depth - 2) // 6):
                blocks.append(Block(channels, out, 2 if stage and i == 0 else 1))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        init_kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.stem_norm(self.stem(x)), inplace=True))
        out: Tensor = self.head(x.mean((2, 3)))
        return out
