"""How long to train a pruned network: as long as the large one, for as many MACs, or a few epochs at a small rate.

Sources: Scratch-E, Scratch-B and fine-tuning of Liu et al. 2019 (arXiv:1810.05270), section 3; learning-rate rewinding
of Renda et al. 2020 (arXiv:2003.02389), section 2.
"""

from __future__ import annotations

import dataclasses
import math

from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import ConfigError

FINETUNE_LR = 1e-3
FINETUNE_EPOCHS = 40
FINETUNE_EPOCHS_IMAGENET = 20

IMAGENET_CAP = 2.0
"""Scratch-B of Liu et al. on ImageNet trains at most twice as long, whatever the ratio of MACs."""


def scratch_e(config: TrainConfig) -> TrainConfig:
    """Scratch-E: as many epochs (or steps) as the large network of ``config``, on the same schedule."""
    return config


def scratch_b(config: TrainConfig, macs_large: float, macs_small: float, cap: float | None = None) -> TrainConfig:
    """Scratch-B: as many MACs as the large network, ``round(E * macs_large / macs_small)`` epochs.

    The whole schedule is stretched: milestones are fractions and move by themselves, warm-up is multiplied by the
    same factor. A configuration that counts steps gets more steps.

    Args:
        config: of the large network.
        macs_large, macs_small: measured MACs per sample of the two networks that are trained (``TrainResult.macs``, or
            the sum of :func:`sparsekern.models.count_macs`).
        cap: most times as long; Liu et al. use 2.0 on ImageNet.

    Raises:
        ConfigError: counts that are not positive, a ratio of 1 or less (the small network is not smaller: usually it
            was counted before it was pruned), or a cap below 1.
    """
    if not (0 < macs_large < math.inf and 0 < macs_small < math.inf):
        raise ConfigError(f"scratch-b: expected MACs above 0, got {macs_large:g} and {macs_small:g}")
    if cap is not None and not 1.0 <= cap < math.inf:
        raise ConfigError(f"cap: expected a factor of 1 or more, got {cap:g}")
    ratio = macs_large / macs_small
    if ratio <= 1.0:
        raise ConfigError(
            f"scratch-b: expected fewer MACs than the large network's {macs_large:,.0f}, got {macs_small:,.0f} (ratio "
            f"{ratio:.4g}); count the network after it was pruned, or train it with scratch-e"
        )
    return stretched(config, ratio if cap is None else min(ratio, cap))


def stretched(config: TrainConfig, factor: float) -> TrainConfig:
    """``factor`` times as many epochs, or steps where ``config`` counts them, rounded half up; warm-up as well."""
    if config.steps:
        steps = max(1, math.floor(config.steps * factor + 0.5))
        return dataclasses.replace(config, steps=steps, warmup=config.warmup * steps / config.steps)
    epochs = max(1, math.floor(config.epochs * factor + 0.5))
    return dataclasses.replace(config, epochs=epochs, warmup=config.warmup * epochs / config.epochs)


def finetune(config: TrainConfig, epochs: int | None = None, lr: float | None = None) -> TrainConfig:
    """A few epochs at a small constant rate, without warm-up, from the weights that the pruned network has.

    Args:
        config: of the large network; whether it counts epochs or steps, fine-tuning counts epochs.
        epochs: 40 by default, 20 on image folders (ImageNet).
        lr: 0.001 by default.

    Raises:
        ConfigError: no epochs, or a rate that is not above 0.
    """
    if epochs is None:
        epochs = FINETUNE_EPOCHS_IMAGENET if config.data == "imagefolder" else FINETUNE_EPOCHS
    lr = FINETUNE_LR if lr is None else lr
    if epochs < 1:
        raise ConfigError(f"finetune: expected 1 or more epochs, got {epochs}")
    if not 0 < lr < math.inf:
        raise ConfigError(f"finetune: expected a learning rate above 0, got {lr:g}")
    return dataclasses.replace(config, epochs=epochs, steps=0, lr=lr, schedule="constant", warmup=0.0)


def last_epochs(config: TrainConfig, epochs: int, per_epoch: int) -> TrainConfig:
    """The last ``epochs`` of the schedule of ``config``, as a run of its own (learning-rate rewinding).

    Args:
        per_epoch: steps of one epoch of the data.

    Raises:
        ConfigError: more epochs than the run has, a part of the warm-up, or the end of a cosine, which no
            configuration describes.
    """
    total = config.steps or config.epochs * per_epoch
    steps = epochs * per_epoch
    if epochs < 1 or steps > total:
        raise ConfigError(f"lr-rewind: expected 1 to {total / per_epoch:g} epochs of the schedule, got {epochs}")
    if steps == total:
        return config
    begin = total - steps
    if config.schedule == "cosine":
        raise ConfigError("lr-rewind: the end of a cosine schedule is no schedule of its own; replay all of it")
    if begin < round(config.warmup * per_epoch):
        raise ConfigError(
            f"lr-rewind: the last {epochs} epochs begin within the {config.warmup:g} of warm-up; replay all of it"
        )
    part = dataclasses.replace(config, epochs=epochs, steps=0, warmup=0.0)
    if config.schedule == "linear":
        after_warmup = total - round(config.warmup * per_epoch)
        return dataclasses.replace(part, lr=config.base_lr * steps / after_warmup)
    # A milestone that has passed stays passed: it lowers the rate from the first step.
    drops = (max(0.0, (round(fraction * total) - begin) / steps) for fraction in config.milestones)
    return dataclasses.replace(part, milestones=tuple(drops))
