"""Label noise with exact counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern.data.errors import DataError

KINDS = ("symmetric", "symmetric-true", "pairflip", "asymmetric")

# Source class to target class. Source: A.10 of the sparse double descent experiments, after Patrini et al. 2017.
ASYMMETRIC: dict[str, dict[int, int]] = {
    "cifar10": {9: 1, 2: 0, 3: 5, 5: 3, 4: 7},
    "mnist": {2: 7, 5: 6, 6: 5, 3: 8},
}


@dataclass(frozen=True)
class LabelNoise:
    """Result of :func:`add_label_noise`.

    Attributes:
        labels: int64 [N], the noisy labels.
        picked: int64, ascending: samples whose label was drawn anew.
        changed: int64, ascending: those of them whose label is now another one.
    """

    labels: Tensor
    picked: Tensor
    changed: Tensor


def add_label_noise(
    labels: Tensor,
    rate: float,
    kind: str = "symmetric",
    num_classes: int | None = None,
    *,
    seed: int = 0,
    mapping: Mapping[int, int] | None = None,
) -> LabelNoise:
    """Replace labels at random; the input stays as it is.

    Kinds:
        symmetric: ``ceil(rate * N)`` labels become a uniformly random class, the old one included, so that a share
            of ``rate * (1 - 1/C)`` is wrong (the sparse double descent code).
        symmetric-true: ``ceil(rate * N)`` labels become a uniformly random *other* class.
        pairflip: ``ceil(rate * N_c)`` labels of every class c become ``(c + 1) mod C`` (Han et al. 2018).
        asymmetric: ``ceil(rate * N_c)`` labels of every class c in ``mapping`` become ``mapping[c]``.

    Args:
        labels: integers [N].
        rate: share of labels, 0..1.
        kind: one of the above.
        num_classes: C; ``labels.max() + 1`` if not given.
        seed: of the draw; equal seeds give equal noise whatever the global generator does.
        mapping: classes of asymmetric noise, such as ``ASYMMETRIC["cifar10"]``.

    Raises:
        DataError: rate, kind or mapping are not as described.
    """
    if not 0 <= rate <= 1:
        raise DataError(f"label noise: expected a rate within 0..1, got {rate}; correct it")
    if kind not in KINDS:
        raise DataError(f"label noise: expected one of {', '.join(KINDS)}, got {kind!r}; choose one of them")
    classes = num_classes if num_classes is not None else int(labels.max()) + 1
    clean = labels.to(torch.int64)
    generator = torch.Generator().manual_seed(seed)
    if kind.startswith("symmetric"):
        if kind == "symmetric-true" and classes < 2:
            raise DataError(f"label noise: expected 2 classes and more for {kind}, got {classes}; use another kind")
        picked = torch.randperm(len(clean), generator=generator)[: _ceil(rate, len(clean))].sort().values
        if kind == "symmetric":
            new = torch.randint(0, classes, picked.shape, generator=generator)
        else:
            shift = torch.randint(1, classes, picked.shape, generator=generator)
            new = (clean[picked] + shift) % classes
    else:
        targets = _targets(kind, classes, mapping)
        parts = []
        for source in sorted(targets):
            members = (clean == source).nonzero().flatten()
            parts.append(members[torch.randperm(len(members), generator=generator)[: _ceil(rate, len(members))]])
        picked = torch.cat(parts).sort().values
        table = torch.arange(classes)
        table[list(targets)] = torch.tensor(list(targets.values()))
        new = table[clean[picked]]
    noisy = clean.clone()
    noisy[picked] = new
    return LabelNoise(noisy, picked, picked[new != clean[picked]])


def _targets(kind: str, classes: int, mapping: Mapping[int, int] | None) -> dict[int, int]:
    if kind == "pairflip":
        return {c: (c + 1) % classes for c in range(classes)}
    if not mapping or not all(0 <= c < classes for pair in mapping.items() for c in pair):
        raise DataError(
            f"label noise: expected a mapping between classes 0..{classes - 1} for asymmetric noise, got {mapping!r}; "
            f"pass mapping= (built in: {', '.join(ASYMMETRIC)})"
        )
    return dict(mapping)


def _ceil(rate: float, count: int) -> int:
    # 0.07 * 100 is 7.000000000000001 in binary: round first, so that it does not become 8.
    return math.ceil(round(rate * count, 6))
