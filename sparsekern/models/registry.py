"""Names of models, and how a name becomes a network."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from sparsekern.models.cifar_resnet import CifarResNet
from sparsekern.models.mlp import MLP
from sparsekern.models.resnet import ResNet
from sparsekern.models.vgg import VGG
from sparsekern.models.vit import ViT
from sparsekern.models.wide_resnet import WideResNet

Shape = tuple[int, int, int]
MLP_HIDDEN = (1024, 1024, 1024)


@dataclass(frozen=True)
class Family:
    """One naming pattern: ``make(match, num_classes, in_shape, width)`` builds what ``regex`` matched."""

    pattern: str
    about: str
    regex: str
    make: Callable[[re.Match[str], int, Shape, float], nn.Module]
    examples: tuple[str, ...]


def _wrn(m: re.Match[str], classes: int, shape: Shape, width: float) -> nn.Module:
    depth, widen = int(m[1]), int(m[2])
    if depth in (50, 101):
        return ResNet(depth, classes, shape, width, widen=widen)
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"{m[0]}: expected a depth of 6n+4 (10, 16, 22, 28, 40, ...) or 50 or 101, got {depth}")
    return WideResNet(depth, widen, classes, shape, width)


def _cifar_resnet(m: re.Match[str], classes: int, shape: Shape, width: float) -> nn.Module:
    return CifarResNet(int(m[1]), classes, shape, width, base=int(m[2] or 16))


def _vit(m: re.Match[str], classes: int, shape: Shape, width: float) -> nn.Module:
    return ViT(m[1], classes, shape, width, patch=int(m[2]) if m[2] else None)


FAMILIES = (
    Family(
        "mlp[-H1-H2-...]",
        "multilayer perceptron, hidden widths as named, 1024-1024-1024 if none are",
        r"mlp((?:-[1-9]\d*)*)",
        lambda m, c, s, w: MLP([int(h) for h in m[1].split("-")[1:]] or MLP_HIDDEN, c, s, w),
        ("mlp", "mlp-512-512"),
    ),
    Family(
        "lenet-300-100",
        "perceptron with hidden layers of 300 and 100",
        r"lenet-300-100",
        lambda m, c, s, w: MLP((300, 100), c, s, w),
        ("lenet-300-100",),
    ),
    Family(
        "vgg11|13|16|19|-c",
        "VGG with batch norm for small images; vgg-c is the variant with 1x1 convolutions and three linear layers",
        r"vgg-?(11|13|16|19|c)",
        lambda m, c, s, w: VGG(m[1], c, s, w),
        ("vgg11", "vgg13", "vgg16", "vgg19", "vgg-c"),
    ),
    Family(
        "resnet20|32|44|56|110[-wB]",
        "residual network for small images, B, 2B, 4B channels (16 if not named)",
        r"resnet-?(20|32|44|56|110)(?:-w([1-9]\d*))?",
        _cifar_resnet,
        ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet20-w64"),
    ),
    Family(
        "resnet18|34|50|101",
        "ImageNet residual network; 3x3 stem without pooling under 96 pixels",
        r"resnet-?(18|34|50|101)",
        lambda m, c, s, w: ResNet(int(m[1]), c, s, w),
        ("resnet18", "resnet34", "resnet50", "resnet101"),
    ),
    Family(
        "wrn-D-K",
        "wide residual network: D = 6n+4 for small images (wrn-28-10), D = 50 or 101 the ImageNet one (wrn-50-2)",
        r"wrn-(\d+)-([1-9]\d*)",
        _wrn,
        ("wrn-16-4", "wrn-22-2", "wrn-28-2", "wrn-28-10", "wrn-40-4", "wrn-50-2"),
    ),
    Family(
        "vit-tiny|small[-pP]",
        "vision transformer, patches of P pixels (fitted to the input if not named)",
        r"vit-(tiny|small)(?:-p([1-9]\d*))?",
        _vit,
        ("vit-tiny", "vit-small", "vit-tiny-p4"),
    ),
)


def names() -> dict[str, str]:
    """Families of models: ``{pattern of the name: what it is}``."""
    return {family.pattern: family.about for family in FAMILIES}


def build(
    name: str, *, num_classes: int = 10, in_shape: tuple[int, int, int] = (3, 32, 32), width: float = 1.0
) -> nn.Module:
    """Build a network with fresh Kaiming-normal weights (dense fan-in), drawn from torch's global generator.

    Args:
        name: one of the patterns of :func:`names`, such as ``resnet20``, ``wrn-16-4``, ``mlp-512-512``.
        num_classes: width of the head.
        in_shape: ``(C, H, W)`` of one sample.
        width: factor on every hidden width, rounded to whole channels and at least 1.

    Returns:
        A module from ``[B, C, H, W]`` to logits ``[B, num_classes]``.

    Raises:
        ValueError: unknown name (the message lists the families and the closest match) or a bad argument.
    """
    shape = tuple(int(n) for n in in_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"in_shape: expected (channels, height, width) of 1 and more, got {in_shape!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected 1 or more, got {num_classes}")
    if not 0 < width < float("inf"):
        raise ValueError(f"width: expected a positive factor, got {width!r}")
    for family in FAMILIES:
        match = re.fullmatch(family.regex, name.strip().lower())
        if match:
            return family.make(match, num_classes, shape, width)
    examples = [example for family in FAMILIES for example in family.examples]
    close = difflib.get_close_matches(name.strip().lower(), examples, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"model: expected one of {', '.join(names())}; got {name!r}{hint}")
