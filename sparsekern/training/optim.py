"""Optimizers and their parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsekern.training.config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_norm_bias: bool = False) -> list[dict[str, Any]]:
    """Two groups: weights with decay, and vectors (normalization weights, biases) without.

    Stored blocks ``values`` [capacity, bo, bi] are weights; an empty group is left out.
    """
    weights: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (weights if decay_norm_bias or parameter.ndim > 1 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """SGD or AdamW over ``model``, with the library's defaults for everything the configuration does not name."""
    groups = parameter_groups(model, config.weight_decay, decay_norm_bias=config.decay_norm_bias)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.base_lr, betas=(config.momentum, 0.999))
    return torch.optim.SGD(groups, lr=config.base_lr, momentum=config.momentum, nesterov=config.nesterov)
