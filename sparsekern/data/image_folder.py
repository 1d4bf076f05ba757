"""Folders of image files, one per class, as ImageNet is kept."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekern.data.augment import Augment
from sparsekern.data.errors import DataError
from sparsekern.data.files import listing
from sparsekern.data.split import Split, check_labels

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
TRIES = 10  # random crops tried before the largest centred one is taken


class FolderSplit(Split):
    """A split whose images are read and resized when they are fetched, several at a time.

    Evaluation scales the shorter side to 8/7 of ``image_size`` and crops the centre. With an :class:`Augment` a random
    part is taken instead (8 to 100 % of the area, aspect 3:4 to 4:3; Szegedy et al. 2015), flipped if ``flip`` is set.

    Args:
        paths: image files.
        labels: int64 [N].
        num_classes: of the set.
        image_size: side of the images that :meth:`fetch` returns, uint8 [B, 3, image_size, image_size].
    """

    scale = 255.0

    def __init__(self, paths: list[Path], labels: Tensor, num_classes: int, image_size: int) -> None:
        self.paths = paths
        self.labels = self.clean_labels = labels
        self.noisy = None
        self.num_classes = num_classes
        self.image_size = image_size

    @property
    def in_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    def fetch(
        self, indices: Tensor, augment: Augment | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        draws: list[Tensor | None] = [None] * len(indices)
        if augment is not None:
            # Drawn before the threads start, so that their order does not matter.
            draws = list(torch.rand(len(indices), TRIES + 1, 4, generator=generator, dtype=torch.float64))
        flip = augment is not None and augment.flip

        def read(job: tuple[int, Tensor | None]) -> Tensor:
            return _read_image(self.paths[job[0]], self.image_size, job[1], flip)

        jobs = list(zip(indices.tolist(), draws, strict=True))
        if len(jobs) < 2:
            return torch.stack([read(job) for job in jobs])
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return torch.stack(list(pool.map(read, jobs)))

    def _with(self, indices: Tensor | None, labels: Tensor, clean: Tensor, noisy: Tensor | None) -> FolderSplit:
        paths = self.paths if indices is None else [self.paths[i] for i in indices.tolist()]
        copy = FolderSplit(paths, labels, self.num_classes, self.image_size)
        copy.clean_labels, copy.noisy = clean, noisy
        return copy


def load_image_folder(root: Path, splits: tuple[str, ...], image_size: int) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Splits below ``root`` and the class names.

    Folders are ``train`` and ``val`` (which is then the test split), or ``train``, ``val`` and ``test``. Classes are
    the sorted folder names of ``train``, or of the first split that is asked for.

    Raises:
        DataError: folders or images are missing, or a split has classes that the others lack.
    """
    has_test = (root / "test").is_dir()
    place = {"train": "train", "val": "val", "test": "test" if has_test else "val"}
    if "val" in splits and not has_test:
        raise DataError(
            f"imagefolder val: expected val/ and test/ in {root}, found {listing(root)}; "
            "without test/, val/ is the test split: hold out part of train/ with val=<share or count>"
        )
    first = root / place["train" if (root / "train").is_dir() else splits[0]]
    classes = _classes(first)
    out: dict[str, Split] = {}
    for split in splits:
        folder = root / place[split]
        extra = set(_classes(folder)) - set(classes)
        if extra:
            raise DataError(
                f"imagefolder {split}: expected the classes of {first}, found others such as {min(extra)} in {folder}; "
                "give both the same class folders"
            )
        samples = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).glob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        check_labels(labels, len(classes), f"imagefolder {folder}")
        out[split] = FolderSplit([path for path, _ in samples], labels, len(classes), image_size)
    return out, classes


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(
            f"imagefolder: expected a folder {folder} with one folder per class, found none; "
            f"{folder.parent} holds {listing(folder.parent)}; correct data_dir"
        )
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not names:
        raise DataError(
            f"imagefolder: expected one folder per class in {folder}, found {listing(folder)}; correct data_dir"
        )
    return names


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("imagefolder: expected Pillow, found none; pip install 'sparsekern[data]'") from None
    return Image


def _read_image(path: Path, size: int, draws: Tensor | None, flip: bool) -> Tensor:
    image_module = _pillow()
    try:
        with image_module.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, image_module.DecompressionBombError) as error:
        raise DataError(f"{path}: expected a readable image, got {error}; remove or replace it") from None
    width, height = image.size
    box = _centre_box(width, height, size) if draws is None else _random_box(width, height, draws)
    image = image.resize((size, size), image_module.Resampling.BILINEAR, box=box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if flip and draws is not None and float(draws[TRIES, 3]) < 0.5:
        pixels = pixels.flip(2)
    return pixels.contiguous()


Box = tuple[float, float, float, float]


def _centre_box(width: int, height: int, size: int) -> Box:
    """The part of the original that a resize to 8/7 ``size`` and a centre crop to ``size`` would show."""
    side = min(width, height) * size / round(size * 8 / 7)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(width: int, height: int, draws: Tensor) -> Box:
    area = width * height
    for area_draw, ratio_draw, x, y in draws[:TRIES].tolist():
        target = area * (0.08 + 0.92 * area_draw)
        ratio = math.exp((2 * ratio_draw - 1) * math.log(4 / 3))
        w, h = math.sqrt(target * ratio), math.sqrt(target / ratio)
        if w <= width and h <= height:
            left, top = x * (width - w), y * (height - h)
            return left, top, left + w, top + h
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
