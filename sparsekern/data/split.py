"""One split of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.data.augment import Augment
from sparsekern.data.errors import DataError
from sparsekern.data.noise import add_label_noise


class Split:
    """Labels, and images that :meth:`fetch` returns in batches. Also a map-style ``torch`` dataset.

    Attributes:
        labels: int64 [N], with label noise where some was added.
        clean_labels: int64 [N], without it; the same tensor where none was added.
        noisy: int64, ascending: the samples that were picked for label noise, or None.
        num_classes: labels lie in ``0..num_classes - 1``.
        scale: what pixels are divided by before normalising: 255 for uint8, 1 for float.
    """

    labels: Tensor
    clean_labels: Tensor
    noisy: Tensor | None
    num_classes: int
    scale: float

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        raise NotImplementedError

    def fetch(
        self, indices: Tensor, augment: Augment | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images [B, C, H, W] of ``indices`` (int64 [B]), augmented if asked, not normalised."""
        raise NotImplementedError

    def _with(self, indices: Tensor | None, labels: Tensor, clean: Tensor, noisy: Tensor | None) -> Split:
        """A copy with the images of ``indices`` (all if None) and these labels."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected within 0..{len(self) - 1}, got {index}")
        index %= len(self)
        return self.fetch(torch.tensor([index]))[0], int(self.labels[index])

    def select(self, indices: Tensor | Sequence[int]) -> Split:
        """The samples of ``indices``, in that order; label noise goes with them."""
        picked = torch.as_tensor(indices, dtype=torch.int64)
        noisy = None
        if self.noisy is not None:
            flags = torch.zeros(len(self), dtype=torch.bool)
            flags[self.noisy] = True
            noisy = flags[picked].nonzero().flatten()
        return self._with(picked, self.labels[picked], self.clean_labels[picked], noisy)

    def subset(self, size: int, *, how: str = "stratified", seed: int = 0) -> Split:
        """``size`` samples, in their original order.

        Args:
            size: number of samples.
            how: ``first``, ``random``, or ``stratified`` (random, with class shares kept to within one sample).
            seed: of the draw.

        Raises:
            DataError: more samples than there are, or an unknown ``how``.
        """
        return self.select(pick(self.labels, size, how=how, seed=seed, num_classes=self.num_classes))

    def with_label_noise(
        self, rate: float, kind: str = "symmetric", *, seed: int = 0, mapping: dict[int, int] | None = None
    ) -> Split:
        """A copy with noisy labels; see :func:`sparsekern.data.noise.add_label_noise`."""
        noise = add_label_noise(self.clean_labels, rate, kind, self.num_classes, seed=seed, mapping=mapping)
        return self._with(None, noise.labels, self.clean_labels, noise.picked)


class ArraySplit(Split):
    """A split whose images lie in one tensor.

    Args:
        images: uint8 [N, C, H, W] in 0..255, or float32 in 0..1.
        labels: integers [N].
        num_classes: of the set.
        source: named in errors.

    Raises:
        DataError: shapes, dtypes or label range do not fit.
    """

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int, *, source: str = "data") -> None:
        if images.dim() != 4 or images.dtype not in (torch.uint8, torch.float32):
            raise DataError(
                f"{source}: expected images [N, C, H, W] of uint8 or float32, "
                f"got {list(images.shape)} of {images.dtype}; convert them"
            )
        if tuple(labels.shape) != (images.shape[0],):
            raise DataError(
                f"{source}: expected one label for each of {images.shape[0]} images, got {list(labels.shape)}; "
                "check that images and labels belong together"
            )
        check_labels(labels, num_classes, source)
        self.images = images
        self.labels = labels.to(torch.int64)
        self.clean_labels = self.labels
        self.noisy = None
        self.num_classes = num_classes
        self.scale = 255.0 if images.dtype == torch.uint8 else 1.0
        self.source = source

    @property
    def in_shape(self) -> tuple[int, int, int]:
        c, h, w = self.images.shape[1:]
        return c, h, w

    def fetch(
        self, indices: Tensor, augment: Augment | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        images = self.images[indices.to(self.images.device)]
        return images if augment is None else augment(images, generator)

    def _with(self, indices: Tensor | None, labels: Tensor, clean: Tensor, noisy: Tensor | None) -> ArraySplit:
        images = self.images if indices is None else self.images[indices.to(self.images.device)]
        copy = ArraySplit(images, labels, self.num_classes, source=self.source)
        copy.clean_labels, copy.noisy = clean, noisy
        return copy

    def to(self, device: str | torch.device) -> ArraySplit:
        """A copy whose images lie on ``device``, so that batches are cut there. Labels stay on the CPU."""
        copy = self._with(None, self.labels, self.clean_labels, self.noisy)
        copy.images = self.images.to(device)
        return copy

    def to_shape(self, in_shape: Sequence[int]) -> ArraySplit:
        """Images as another net expects them, for out-of-distribution tests: grey becomes RGB, small is zero-padded.

        Raises:
            DataError: the target is smaller, or the channels do not fit.
        """
        c, h, w = (int(n) for n in in_shape)
        own_c, own_h, own_w = self.in_shape
        if own_c not in (1, c) or own_h > h or own_w > w:
            raise DataError(
                f"{self.source}: expected a shape that {list(self.in_shape)} can be padded to, got {[c, h, w]}; "
                "resize the images first"
            )
        top, left = (h - own_h) // 2, (w - own_w) // 2
        copy = self._with(None, self.labels, self.clean_labels, self.noisy)
        padding = (left, w - own_w - left, top, h - own_h - top)
        copy.images = torch.nn.functional.pad(self.images.expand(-1, c, -1, -1), padding).contiguous()
        return copy


def check_labels(labels: Tensor, num_classes: int, source: str) -> None:
    """Raise ``DataError`` unless there is a label and all lie within ``0..num_classes - 1``."""
    if not labels.numel():
        raise DataError(f"{source}: expected at least one sample, found none; check the files")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{source}: expected labels within 0..{num_classes - 1}, found {low}..{high}; "
            "check that these are the files of this set"
        )


def pick(labels: Tensor, size: int, *, how: str, seed: int, num_classes: int) -> Tensor:
    """Ascending int64 indices of ``size`` samples; see :meth:`Split.subset`."""
    total = labels.shape[0]
    if not 1 <= size <= total:
        raise DataError(f"subset: expected a size within 1..{total}, got {size}; choose a smaller one")
    if how == "first":
        return torch.arange(size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    if how == "random":
        return order[:size].sort().values
    if how != "stratified":
        raise DataError(f"subset: expected how to be first, random or stratified, got {how!r}; choose one of them")
    # Largest remainder, so that the shares add up to size exactly.
    counts = torch.bincount(labels, minlength=num_classes)
    exact = counts.to(torch.float64) * size / total
    shares = exact.floor().to(torch.int64)
    shares[torch.argsort(shares - exact, stable=True)[: size - int(shares.sum())]] += 1
    shuffled = labels[order]
    parts = [order[shuffled == c][: int(shares[c])] for c in range(num_classes)]
    return torch.cat(parts).sort().values
