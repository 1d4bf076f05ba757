"""Training that prepares channel pruning: penalties on scales, filters zeroed after every epoch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import ConfigError


class ChannelTraining:
    """What a run does beside its steps; :func:`channel_training` builds it from the configuration.

    Attributes:
        slimming: penalty on batch-norm scales, 0 for none.
        blocks: scales of residual blocks, None without a penalty on them.
        soft: zeroes filters, None if not asked for.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, example: Tensor) -> None:
        from sparsekern.pruning import structured

        self.model = model
        self.slimming = config.slimming
        self.penalty = config.block_penalty
        self.blocks = structured.BlockScales(model) if config.block_penalty else None
        self.soft = structured.SoftFilters(model, example[:2], config.soft_filters) if config.soft_filters else None

    def after_backward(self) -> None:
        """Add the penalty on batch-norm scales to their gradients."""
        if self.slimming:
            from sparsekern.pruning.structured import slimming_penalty_

            slimming_penalty_(self.model, self.slimming)

    def after_step(self, lr: float) -> None:
        """Update the scales of residual blocks at the learning rate of the step."""
        if self.blocks is not None:
            self.blocks.step(lr, self.penalty)

    def end_epoch(self) -> None:
        """Zero the smallest filters, before the test."""
        if self.soft is not None:
            self.soft.step()

    def finish(self) -> None:
        """Fold the scales into the weights: what is saved is an ordinary network."""
        if self.blocks is not None:
            self.blocks.fold_()

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.blocks is None else self.blocks.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self.blocks is not None and state is not None:
            self.blocks.load_state_dict(state)


def channel_training(model: nn.Module, config: TrainConfig, example: Tensor) -> ChannelTraining | None:
    """What ``config`` asks for, None if nothing.

    Args:
        example: a batch [B, C, H, W] on the model's device.

    Raises:
        ConfigError: a network that it does not fit, Torch-Pruning missing for ``soft_filters``, or snapshots of
            scaled blocks, which a file of weights would not hold.
    """
    if not (config.slimming or config.block_penalty or config.soft_filters):
        return None
    if config.block_penalty and config.snapshots:
        raise ConfigError("snapshots: do not hold the scales of block_penalty; drop one of them")
    if config.slimming and not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules()):
        raise ConfigError(f"slimming: expected a model with batch norm, got {config.model} without any")
    try:
        return ChannelTraining(model, config, example)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
