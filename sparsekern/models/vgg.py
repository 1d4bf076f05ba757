"""VGG networks for small images."""

from __future__ import annotations

from torch import Tensor, nn

from sparsekern.models.layers import init_kaiming_, scaled

# "M" is a 2x2 max pool, a negative number a 1x1 convolution.
PLANS: dict[str, tuple[int | str, ...]] = {
    "11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "16": (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"),
    "19": (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"),
    "c": (64, 64, "M", 128, 128, "M", 256, 256, -256, "M", 512, 512, -512, "M", 512, 512, -512, "M"),
}


class VGG(nn.Module):
    """Convolution, batch norm, ReLU stacks with max pooling (Simonyan and Zisserman 2015).

    ``vgg11`` to ``vgg19`` end in global average pooling and one linear layer. ``vgg-c`` is the variant of SNIP and
    ITOP: its 1x1 convolutions are padded by one pixel, which leaves 2x2 positions at the end, and its classifier
    has two hidden layers of 512. Pools that would empty the image are left out (inputs under 32 pixels).
    """

    def __init__(self, variant: str, num_classes: int, in_shape: tuple[int, int, int], width: float = 1.0) -> None:
        super().__init__()
        plan = PLANS[variant]
        channels, side = in_shape[0], min(in_shape[1:])
        layers: list[nn.Module] = []
        for step in plan:
            if isinstance(step, str):
                if side >= 2:
                    layers.append(nn.MaxPool2d(2))
                    side //= 2
                continue
            kernel = 3 if step > 0 else 1
            out = scaled(abs(step), width)
            layers += [
                nn.Conv2d(channels, out, kernel, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            channels, side = out, side + 3 - kernel
        self.stem, *rest = layers
        self.features = nn.Sequential(*rest)
        hidden: list[nn.Module] = []
        if variant == "c":
            self.pool = nn.AdaptiveAvgPool2d(2)
            inputs = channels * 4
            for _ in range(2):
                out = scaled(512, width)
                hidden += [nn.Linear(inputs, out), nn.ReLU(inplace=True), nn.BatchNorm1d(out)]
                inputs = out
        else:
            self.pool = nn.AdaptiveAvgPool2d(1)
            inputs = channels
        self.classifier = nn.Sequential(*hidden)
        self.head = nn.Linear(inputs, num_classes)
        init_kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(self.stem(x))).flatten(1)
        out: Tensor = self.head(self.classifier(x))
        return out
