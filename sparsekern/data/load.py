"""``load``: a set by its name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparsekern.data.augment import Augment
from sparsekern.data.bundle import DataBundle
from sparsekern.data.cifar import CIFAR10, CIFAR100, load_cifar
from sparsekern.data.digits import load_digits
from sparsekern.data.errors import DataError
from sparsekern.data.files import candidate_folders, root_folder
from sparsekern.data.idx import load_idx
from sparsekern.data.image_folder import load_image_folder
from sparsekern.data.noise import ASYMMETRIC
from sparsekern.data.split import Split, pick


@dataclass(frozen=True)
class Source:
    """What is known of a set before any file is read.

    Attributes:
        mean, std: per channel over the training pixels in 0..1.
        folders: names under which a parent folder may hold it.
        class_names: used where the files name no classes.
        augment: usual training augmentation.
    """

    about: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folders: tuple[str, ...] = ()
    class_names: tuple[str, ...] = tuple("0123456789")
    augment: Augment | None = None


SOURCES = {
    "digits": Source("8x8 grey digits, 1,437 + 360, part of scikit-learn; no files needed", (0.3053,), (0.3760,)),
    "mnist": Source("28x28 grey digits, idx files", (0.1307,), (0.3081,), ("mnist", "MNIST/raw", "MNIST")),
    "fashion-mnist": Source(
        "28x28 grey clothes, idx files",
        (0.2860,),
        (0.3530,),
        ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "FashionMNIST"),
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
    "cifar10": Source(
        "32x32 colour images of 10 classes, binary or Python version or npz",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar10", "cifar-10"),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        Augment(),
    ),
    "cifar100": Source(
        "32x32 colour images of 100 classes (fine labels), binary or Python version or npz",
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        ("cifar-100-binary", "cifar-100-python", "cifar100", "cifar-100", "cifar-100-subset"),
        tuple(str(i) for i in range(100)),
        Augment(),
    ),
    "imagefolder": Source(
        "image files in train/<class>/ and val/<class>/ (ImageNet); needs Pillow",
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        augment=Augment(padding=0),
    ),
}
ALIASES = {"cifar-10": "cifar10", "cifar-100": "cifar100", "fashionmnist": "fashion-mnist", "imagenet": "imagefolder"}
SPLITS = ("train", "val", "test")


def names() -> dict[str, str]:
    """Data sets: ``{name: what it is}``."""
    return {name: source.about for name, source in SOURCES.items()}


def load(
    name: str = "digits",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    splits: str | tuple[str, ...] | list[str] = ("train", "test"),
    val: int | float = 0,
    subset: int | float | Mapping[str, int | float] | None = None,
    subset_how: str = "stratified",
    label_noise: float = 0.0,
    noise_kind: str = "symmetric",
    seed: int = 0,
    image_size: int = 224,
) -> DataBundle:
    """Read a data set into memory (``imagefolder``: the names of its files).

    Order of operations: hold out ``val`` from train, take subsets, then add label noise to train.

    Args:
        name: one of :func:`names`.
        data_dir: folder of the files, or a parent that has them in a folder named like the set; the environment
            variable SPARSEKERN_DATA if not given. ``digits`` needs none.
        splits: which of the set's own splits to read.
        val: samples (int) or share (float below 1) of train to hold out at random as ``val``, with clean labels.
        subset: samples or share of train to keep, or ``{split: samples or share}``.
        subset_how: ``stratified``, ``random`` or ``first``.
        label_noise: share of train labels to replace; see :func:`sparsekern.data.noise.add_label_noise`.
        noise_kind: ``symmetric``, ``symmetric-true``, ``pairflip`` or ``asymmetric`` (CIFAR-10 and MNIST).
        seed: of the hold-out, the subsets and the noise, each with draws of its own.
        image_size: side of the images of ``imagefolder``, in pixels.

    Raises:
        DataError: the name is unknown, files are missing or broken, or an argument does not fit.
    """
    key = name.strip().lower().replace("_", "-")
    key = ALIASES.get(key, key)
    if key not in SOURCES:
        close = difflib.get_close_matches(key, SOURCES, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else "choose one of them"
        raise DataError(f"data: expected one of {', '.join(SOURCES)}, got {name!r}; {hint}")
    wanted = (splits,) if isinstance(splits, str) else tuple(splits)
    allowed = SPLITS if key == "imagefolder" else ("train", "test")
    if not wanted or not set(wanted) <= set(allowed):
        raise DataError(
            f"{key}: expected splits out of {', '.join(allowed)}, got {wanted}; "
            "a validation split is held out of train with val=<share or count>"
        )
    loaded, class_names, place = _read(key, data_dir, wanted, image_size)
    if val:
        loaded = _hold_out(key, loaded, val, seed)
    sizes = subset if isinstance(subset, Mapping) else {"train": subset} if subset is not None else {}
    for split, size in sizes.items():
        if split not in loaded:
            raise DataError(f"{key}: expected a subset of {', '.join(loaded)}, got {split!r}; correct the split")
        part = loaded[split]
        loaded[split] = part.subset(_count(size, len(part), "subset"), how=subset_how, seed=seed)
    if label_noise:
        if "train" not in loaded:
            raise DataError(f"{key}: expected a train split for label noise, got {', '.join(loaded)}; load it too")
        mapping = ASYMMETRIC.get(key) if noise_kind == "asymmetric" else None
        loaded["train"] = loaded["train"].with_label_noise(label_noise, noise_kind, seed=seed, mapping=mapping)
    source = SOURCES[key]
    classes = next(iter(loaded.values())).num_classes
    return DataBundle(
        key, loaded, classes, class_names or source.class_names, source.mean, source.std, source.augment, place
    )


def _read(
    key: str, data_dir: str | os.PathLike[str] | None, wanted: tuple[str, ...], image_size: int
) -> tuple[dict[str, Split], tuple[str, ...], str]:
    """Splits, class names as far as the files name them, and where they came from."""
    if key == "digits":
        digits = load_digits()
        return {split: digits[split] for split in wanted}, (), "scikit-learn"
    root = root_folder(key, data_dir)
    if key == "imagefolder":
        folder_splits, classes = load_image_folder(root, wanted, image_size)
        return folder_splits, classes, str(root)
    own = SOURCES[key].folders
    folders = candidate_folders(root, own, [f for source in SOURCES.values() for f in source.folders])
    if not folders:
        raise DataError(
            f"{key}: expected a folder of this set at {root}, found one named like another set; "
            f"point data_dir at {own[0]} or its parent"
        )
    out: dict[str, Split] = {}
    class_names: tuple[str, ...] = ()
    for split in wanted:
        if key in ("cifar10", "cifar100"):
            out[split], found = load_cifar(key, CIFAR10 if key == "cifar10" else CIFAR100, folders, split)
            class_names = class_names or found
        else:
            out[split] = load_idx(key, folders, split)
    return out, class_names, str(root)


def _hold_out(key: str, loaded: dict[str, Split], val: int | float, seed: int) -> dict[str, Split]:
    if "train" not in loaded or "val" in loaded:
        raise DataError(
            f"{key}: expected val to be held out of a loaded train split, got the splits {', '.join(loaded)}; "
            "drop val or load train without val"
        )
    train = loaded["train"]
    count = _count(val, len(train), "val")
    if count >= len(train):
        raise DataError(f"{key}: expected val below the {len(train)} training samples, got {val}; hold out fewer")
    held = pick(train.labels, count, how="random", seed=seed, num_classes=train.num_classes)
    keep = torch.ones(len(train), dtype=torch.bool)
    keep[held] = False
    rest = {split: part for split, part in loaded.items() if split != "train"}
    return {"train": train.select(keep.nonzero().flatten()), "val": train.select(held), **rest}


def _count(size: int | float, total: int, what: str) -> int:
    """Samples that an int or a share names."""
    if isinstance(size, float) and not 0 < size < 1:
        if size != int(size):
            raise DataError(f"{what}: expected a count or a share between 0 and 1, got {size}; correct it")
        size = int(size)
    count = round(size * total) if isinstance(size, float) else int(size)
    if count < 1:
        raise DataError(f"{what}: expected at least one of {total} samples, got {size}; ask for more")
    return count
