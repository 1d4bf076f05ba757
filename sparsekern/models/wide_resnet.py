"""Wide residual networks for 32-pixel images, depth 6n+4."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.models.layers import conv1x1, conv3x3, init_kaiming_, scaled


class PreActBlock(nn.Module):
    """Norm, ReLU, convolution, twice; where the shape changes the shortcut starts after the first ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = conv1x1(in_channels, out_channels, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x), inplace=True)
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = F.relu(self.bn2(self.conv1(y)), inplace=True)
        out: Tensor = x + self.conv2(y)
        return out


class WideResNet(nn.Module):
    """Zagoruyko and Komodakis 2016, without dropout.

    Args:
        depth: 6n+4.
        widen: the stages have 16, 32 and 64 times this many channels.
    """

    def __init__(
        self, depth: int, widen: int, num_classes: int, in_shape: tuple[int, int, int], width: float = 1.0
    ) -> None:
        super().__init__()
        channels = scaled(16, width)
        self.stem = conv3x3(in_shape[0], channels)
        stages: list[nn.Module] = []
        for stage in range(3):
            out = scaled(16 * 2**stage * widen, width)
            blocks: list[nn.Module] = []
            for i in range((depth - 4) // 6):
                blocks.append(PreActBlock(channels, out, 2 if stage and i == 0 else 1))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        init_kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stages(self.stem(x))), inplace=True)
        out: Tensor = self.head(x.mean((2, 3)))
        return out
