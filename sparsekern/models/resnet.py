"""Residual networks of the ImageNet family."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.models.layers import conv1x1, conv3x3, init_kaiming_, scaled

DEPTHS: dict[int, tuple[bool, tuple[int, int, int, int]]] = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
}
LARGE_INPUT = 96  # pixels from which the 7x7 stem with max pooling is used


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, mid: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, mid, stride)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv3x3(mid, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, with the stride in the 3x3 convolution."""

    def __init__(self, in_channels: int, mid: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, mid)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv3x3(mid, mid, stride)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = conv1x1(mid, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x), inplace=True)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """He et al. 2016; with ``widen=2`` the wide bottleneck networks of Zagoruyko and Komodakis 2016.

    Inputs of 96 pixels and more get the 7x7 stem of stride 2 and a max pool, smaller ones a 3x3 stem of stride 1.

    Args:
        depth: 18, 34, 50 or 101.
        widen: factor on the inner width of the bottlenecks.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_shape: tuple[int, int, int],
        width: float = 1.0,
        *,
        widen: int = 1,
    ) -> None:
        super().__init__()
        bottleneck, repeats = DEPTHS[depth]
        channels = scaled(64, width)
        large = min(in_shape[1:]) >= LARGE_INPUT
        self.stem = (
            nn.Conv2d(in_shape[0], channels, 7, 2, padding=3, bias=False) if large else conv3x3(in_shape[0], channels)
        )
        self.stem_norm = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        block = Bottleneck if bottleneck else BasicBlock
        stages: list[nn.Module] = []
        for stage, count in enumerate(repeats):
            planes = 64 * 2**stage
            mid = scaled(planes * widen, width)
            out = scaled(planes * 4, width) if bottleneck else mid
            blocks: list[nn.Module] = []
            for i in range(count):
                blocks.append(block(channels, mid, out, 2 if stage and i == 0 else 1))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        init_kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem_norm(self.stem(x)), inplace=True))
        out: Tensor = self.head(self.stages(x).mean((2, 3)))
        return out
