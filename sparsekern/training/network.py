"""From a configuration to the network that is trained, and back from a run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.training.checkpoint import load_checkpoint, seed_all
from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import ConfigError, TrainingError

Shape = tuple[int, int, int]


@dataclass
class Network:
    """A model, dense or sparse, with its size.

    Attributes:
        plan: ``Plan.to_dict()`` of a sparse model, None for a dense one.
        params: parameters, stored ones only.
        macs: multiply-accumulates per sample of linear and convolution layers.
        notes: what the user should know, one line each.
    """

    model: nn.Module
    plan: dict[str, Any] | None
    params: int
    macs: int
    notes: list[str]

    @property
    def layers(self) -> dict[str, int]:
        """Linear and convolution layers per state: ``{"sparse": n, "dense": n, "masked": n}``."""
        if self.plan is None:
            dense = sum(isinstance(module, (nn.Linear, nn.Conv2d)) for module in self.model.modules())
            return {"sparse": 0, "dense": dense, "masked": 0}
        totals = self.plan["totals"]
        return {state: int(totals[state]) for state in ("sparse", "dense", "masked")}

    def size(self) -> dict[str, Any]:
        return {"params": self.params, "macs": self.macs, "layers": self.layers}


def build_dense(
    config: TrainConfig, in_shape: Shape, num_classes: int, device: torch.device | None = None
) -> nn.Module:
    """The dense model of ``config`` with the weights of its seed."""
    from sparsekern import models

    seed_all(config.seed)
    try:
        model = models.build(config.model, num_classes=num_classes, in_shape=in_shape, width=config.width)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return _place(model, config, device)


def build_network(
    config: TrainConfig,
    example: Tensor,
    num_classes: int,
    *,
    batches: Sequence[tuple[Tensor, Tensor]] | None = None,
    dry_run: bool = False,
) -> tuple[Network, Any]:
    """The model of ``config`` and its printable plan (None for a dense one).

    Args:
        example: a training batch [B, C, H, W] on the device of the run: its size decides each layer's break-even.
        batches: ``(x, y)`` for allocations that score weights on data.
        dry_run: plan only; the returned model stays dense.
    """
    shape = (int(example.shape[1]), int(example.shape[2]), int(example.shape[3]))
    model = build_dense(config, shape, num_classes, example.device)
    if config.sparsity == 0 and not config.override:
        return measure(model, None, example), None
    import sparsekern as sk

    try:
        settings = sk.SparsityConfig(
            sparsity=config.sparsity,
            block=config.block_value,
            allocation=config.allocation,
            budget=config.budget,
            pattern=config.pattern,
            exclude=config.exclude,
            overrides=config.override,
            seed=config.seed,
            rescale=config.rescale,
            below_break_even=config.below_break_even,
        )
        # Layers are planned for the dtype that they will compute in.
        with torch.autocast(example.device.type, torch.bfloat16, enabled=config.amp):
            if config.tune:
                sk.tune(model, example, settings)
            make = sk.plan if dry_run else sk.sparsify_
            plan = make(model, settings, example_input=example, batches=batches)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None
    # Through JSON: plain containers only, as checkpoints hold them.
    return measure(model, json.loads(json.dumps(plan.to_dict())), example), plan


def measure(model: nn.Module, plan: dict[str, Any] | None, example: Tensor) -> Network:
    """Count ``model``; ``plan`` describes it if it is sparse."""
    from sparsekern import models

    notes = []
    if plan is not None and plan["totals"]["sparse"] == 0:
        notes.append("no layer runs sparse (see the plan for the reasons): this net costs what the dense one costs")
    macs = plan["totals"]["macs"] if plan is not None else None
    if macs is None:
        macs = sum(models.count_macs(model, example[:1]).values())
    params = plan["totals"]["params"] if plan is not None else models.count_params(model)
    return Network(model, plan, int(params), int(macs), notes)


def restore_network(
    config: TrainConfig, state: dict[str, Tensor], plan: dict[str, Any] | None, example: Tensor, num_classes: int
) -> Network:
    """The network of a checkpoint: the layout comes from ``state``, nothing is planned or measured again."""
    shape = (int(example.shape[1]), int(example.shape[2]), int(example.shape[3]))
    model = build_dense(config, shape, num_classes, example.device)
    load_state(model, state, sparse=plan is not None)
    return measure(model, plan, example)


def load_state(model: nn.Module, state: dict[str, Tensor], *, sparse: bool) -> None:
    """Load ``state`` into a freshly built dense ``model``, giving it the sparse layers that ``state`` describes."""
    try:
        if sparse:
            import sparsekern as sk

            sk.restore_(model, state)
        else:
            model.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"the saved weights do not fit the model: {' '.join(str(error).split())[:300]}") from None


def load_model(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> nn.Module:
    """The trained model of a finished run, in eval mode.

    Raises:
        CheckpointError: no ``model.pt`` in ``folder``, or a damaged one.
    """
    state = load_checkpoint(Path(folder) / "model.pt")
    config = TrainConfig.from_dict(state["config"], source="model.pt")
    model = build_dense(config, tuple(state["in_shape"]), state["num_classes"])
    load_state(model, state["model"], sparse=state["sparse"])
    return _place(model, config, torch.device(device)).eval()


def _place(model: nn.Module, config: TrainConfig, device: torch.device | None) -> nn.Module:
    model = model.to(device=device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model  # type: ignore[call-overload]


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. :class:`ConfigError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: expected cpu or auto on this machine (torch sees no CUDA device), got {name}")
    return torch.device(name)
