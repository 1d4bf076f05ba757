"""The data side of a run: batches of the configured set, and accuracy on its other splits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekern.data import Augment, Batches, DataBundle, load
from sparsekern.training.config import TrainConfig
from sparsekern.training.step import Step


@dataclass
class Task:
    """Batches of one configuration.

    Attributes:
        train: shuffled, augmented, with label noise.
        val: None without ``val_split``.
    """

    train: Batches
    val: Batches | None
    test: Batches
    bundle: DataBundle

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of a sample."""
        return self.bundle.in_shape

    @property
    def num_classes(self) -> int:
        return self.bundle.num_classes

    def example(self, device: torch.device) -> Tensor:
        """Noise in the shape of a training batch [B, C, H, W]: the size that decides a layer's break-even."""
        batch = min(self.train.batch_size, len(self.train.split))
        x = torch.randn(batch, *self.in_shape, generator=torch.Generator().manual_seed(0)).to(device)
        return x.contiguous(memory_format=torch.channels_last) if self.train.channels_last else x

    def scoring_batches(self, device: torch.device, count: int = 4) -> list[tuple[Tensor, Tensor]]:
        """The batches of the training set, for allocations that score weights on data (snip, grasp)."""
        ordered = Batches(
            self.train.split,
            self.train.batch_size,
            mean=self.bundle.mean,
            std=self.bundle.std,
            shuffle=True,
            channels_last=self.train.channels_last,
        )
        return [(x.to(device), y.to(device)) for (x, y), _ in zip(ordered, range(count), strict=False)]


def load_task(config: TrainConfig) -> Task:
    """Load the data of ``config``.

    Raises:
        DataError: an unknown set, files missing or damaged, impossible subset or noise.
    """
    bundle = load(
        config.data,
        config.data_dir,
        val=config.val_split,
        subset={split: n for split, n in (("train", config.subset), ("test", config.test_subset)) if n},
        label_noise=config.label_noise,
        noise_kind=config.noise_kind,
        seed=config.seed,
    )
    split = bundle.train
    crop, flip = "crop" in config.augment, "flip" in config.augment
    train = Batches(
        split,
        config.batch_size,
        shuffle=True,
        # Batch norm cannot train on a single sample.
        drop_last=len(split) > config.batch_size and len(split) % config.batch_size == 1,
        augment=Augment(padding=4 if crop else 0, flip=flip) if crop or flip else None,
        mean=bundle.mean,
        std=bundle.std,
        seed=config.seed,
        channels_last=config.channels_last,
    )
    val = _ordered(bundle, "val", config) if config.val_split else None
    return Task(train, val, _ordered(bundle, "test", config), bundle)


def _ordered(bundle: DataBundle, split: str, config: TrainConfig) -> Batches:
    # Larger batches than in training: no activations are kept.
    size = max(256, config.batch_size)
    return bundle.batches(split, size, channels_last=config.channels_last)


@torch.no_grad()
def evaluate(step: Step, batches: Batches) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0..1) over ``batches`` in eval mode."""
    training = step.model.training
    step.model.eval()
    loss = torch.zeros((), dtype=torch.float64)
    correct = count = 0
    for x, y in batches:
        x, y = step.to_device(x, y)
        logits = step.logits(x)
        loss += F.cross_entropy(logits, y, reduction="sum").double().cpu()
        correct += int((logits.argmax(1) == y).sum())
        count += y.numel()
    step.model.train(training)
    return float(loss) / count, correct / count
