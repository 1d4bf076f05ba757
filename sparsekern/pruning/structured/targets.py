"""Published target architectures: how much of which layer goes, for the network that each paper pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from sparsekern.pruning.structured.graph import Group


@dataclass(frozen=True)
class Target:
    """One pruned architecture. Fractions, so that it applies to other widths of the network too.

    Attributes:
        model: name in ``sparsekern.models``; any width.
        method: the method that it was published for.
        source: where it is from.
        convs: fraction removed of each convolution, in their order.
        layers: fraction removed of the layers named.
        blocks: per stage ``(residual blocks left, whether the first is one of them)``.
        ratio: fraction of all channels, for methods with one threshold.
    """

    model: str
    method: str
    source: str
    convs: tuple[float, ...] = ()
    layers: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[tuple[int, bool], ...] = ()
    ratio: float | None = None

    def ratios(self, model: nn.Module, groups: Mapping[str, Group]) -> dict[str, float]:
        """Fraction removed per group of ``model``; groups that it leaves alone are not in it.

        Raises:
            ValueError: ``model`` is another network.
        """
        if self.convs:
            names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
            if len(names) != len(self.convs):
                raise ValueError(f"target: expected {self.model} with {len(self.convs)} convolutions, got {len(names)}")
            wanted = {name: ratio for name, ratio in zip(names, self.convs) if ratio}
        else:
            wanted = {name: ratio for name, ratio in self.layers.items() if ratio}
        for name in wanted:
            if name not in groups:
                raise ValueError(f"target: expected {self.model}, got a model without a prunable layer {name}")
        return wanted


L1 = "Li et al. 2017 (arXiv:1608.08710), as in Liu et al. 2019 (arXiv:1810.05270)"
THINET = "Luo et al. 2017 (arXiv:1707.06342), as in Liu et al. 2019 (arXiv:1810.05270)"
REGRESSION = "He et al. 2017 (arXiv:1707.06168), as in Liu et al. 2019 (arXiv:1810.05270)"
SLIMMING = "Liu et al. 2017 (arXiv:1708.06519), as in Liu et al. 2019 (arXiv:1810.05270)"
SSS = "Huang and Wang 2018 (arXiv:1707.01213), as in Liu et al. 2019 (arXiv:1810.05270)"

VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def _vgg16(*kept: int) -> tuple[float, ...]:
    return tuple(1 - k / of for k, of in zip(kept, VGG16, strict=True))


def _inner(
    repeats: Sequence[int], ratios: Sequence[float], skip: Sequence[int] = (), convs: Sequence[str] = ("conv1",)
) -> dict[str, float]:
    """Inner convolutions of residual blocks by stage.

    Args:
        skip: layers left alone, as the papers number them: the stem is 1, then each block of two layers counts 2.
    """
    layers: dict[str, float] = {}
    number = 2
    for stage, (count, ratio) in enumerate(zip(repeats, ratios, strict=True)):
        for block in range(count):
            if number not in skip and ratio:
                layers.update({f"stages.{stage}.{block}.{conv}": ratio for conv in convs})
            number += 2
    return layers


def _thinet50(ratio: float) -> Target:
    layers = _inner((3, 4, 6, 3), (ratio,) * 4, convs=("conv1", "conv2"))
    return Target("resnet50", "thinet", THINET, layers=layers)


_SKIP34 = (2, 8, 14, 16, 26, 28, 30, 32)

TARGETS: dict[str, Target] = {
    "vgg16-a": Target(
        "vgg16",
        "l1-filters",
        L1,
        convs=_vgg16(32, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256, 256),
    ),
    "resnet56-a": Target("resnet56", "l1-filters", L1, layers=_inner((9, 9, 9), (0.1, 0.1, 0.1), (16, 20, 38, 54))),
    "resnet56-b": Target(
        "resnet56", "l1-filters", L1, layers=_inner((9, 9, 9), (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54))
    ),
    "resnet110-a": Target("resnet110", "l1-filters", L1, layers=_inner((18, 18, 18), (0.5, 0.0, 0.0), (36,))),
    "resnet110-b": Target("resnet110", "l1-filters", L1, layers=_inner((18, 18, 18), (0.5, 0.4, 0.3), (36, 38, 74))),
    "resnet34-a": Target("resnet34", "l1-filters", L1, layers=_inner((3, 4, 6, 3), (0.3, 0.3, 0.3, 0.0), _SKIP34)),
    "resnet34-b": Target("resnet34", "l1-filters", L1, layers=_inner((3, 4, 6, 3), (0.5, 0.6, 0.4, 0.0), _SKIP34)),
    "vgg-gap": Target(
        "vgg16", "thinet", THINET, convs=_vgg16(32, 32, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512)
    ),
    "vgg-tiny": Target(
        "vgg16", "thinet", THINET, convs=_vgg16(16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 256)
    ),
    "thinet-30": _thinet50(0.7),
    "thinet-50": _thinet50(0.5),
    "thinet-70": _thinet50(0.3),
    "vgg-5x": Target(
        "vgg16", "regression", REGRESSION, convs=_vgg16(24, 22, 41, 51, 108, 89, 111, 184, 276, 228, 512, 512, 512)
    ),
    "vgg19-50": Target("vgg19", "slimming", SLIMMING, ratio=0.5),
    "vgg19-70": Target("vgg19", "slimming", SLIMMING, ratio=0.7),
    "vgg11-50": Target("vgg11", "slimming", SLIMMING, ratio=0.5),
    "sss-41": Target("resnet50", "sss", SSS, blocks=((0, False), (4, True), (6, True), (3, True))),
    "sss-32": Target("resnet50", "sss", SSS, blocks=((1, False), (4, True), (4, True), (1, True))),
    "sss-26": Target("resnet50", "sss", SSS, blocks=((0, False), (2, False), (5, False), (1, True))),
}


def targets(model: str | None = None, method: str | None = None) -> dict[str, Target]:
    """Published targets of a model, of a method, or of both."""
    return {
        name: target
        for name, target in TARGETS.items()
        if model in (None, target.model) and method in (None, target.method)
    }
