"""A data set: its splits and what belongs to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsekern.data.augment import Augment
from sparsekern.data.batches import Batches
from sparsekern.data.errors import DataError
from sparsekern.data.split import Split


@dataclass
class DataBundle:
    """Splits of one set.

    Attributes:
        name: of the set.
        splits: ``train``, ``val``, ``test``, as far as they were asked for.
        num_classes: of the set.
        class_names: one per class.
        mean, std: per channel, of training pixels in 0..1.
        augment: what the set is usually trained with, or None.
        source: where the files lie.
    """

    name: str
    splits: Mapping[str, Split]
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None = None
    source: str = field(default="", compare=False)

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise DataError(
                f"{self.name}: expected one of the loaded splits {', '.join(self.splits)}, got {split!r}; "
                f"load it with {'val=<share or count>' if split == 'val' else f'splits=({split!r},)'}"
            )
        return self.splits[split]

    def __contains__(self, split: object) -> bool:
        return split in self.splits

    @property
    def train(self) -> Split:
        return self["train"]

    @property
    def val(self) -> Split:
        return self["val"]

    @property
    def test(self) -> Split:
        return self["test"]

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        return next(iter(self.splits.values())).in_shape

    def batches(self, split: str, batch_size: int, **options: Any) -> Batches:
        """:class:`Batches` of a split with this set's mean and std.

        ``train`` is shuffled and augmented as the set usually is, the others are neither; ``options`` (those of
        :class:`Batches`) come first.
        """
        training = split == "train"
        defaults = {
            "shuffle": training,
            "augment": self.augment if training else None,
            "mean": self.mean,
            "std": self.std,
        }
        return Batches(self[split], batch_size, **{**defaults, **options})

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {len(split)}" for name, split in self.splits.items())
        return f"{self.name}: {sizes}; {self.num_classes} classes, {'x'.join(map(str, self.in_shape))}"
