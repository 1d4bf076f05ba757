"""From a configuration to the network that is trained, and back from a run folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekern.training.checkpoint import seed_all
from sparsekern.training.config import TrainConfig
from sparsekern.training.errors import ConfigError, TrainingError
from sparsekern.training.weights import SavedNet, load_net

if TYPE_CHECKING:
    from sparsekern.config import SparsityConfig
    from sparsekern.plan import Plan

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
    config: TrainConfig,
    in_shape: Shape,
    num_classes: int,
    device: torch.device | None = None,
    *,
    channels: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """The dense model of ``config`` with the weights of its seed.

    Args:
        channels: ``channels.json`` to replay instead of ``config.channels``.
    """
    from sparsekern import models

    seed_all(config.seed)
    try:
        model = models.build(config.model, num_classes=num_classes, in_shape=in_shape, width=config.width)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    channels = channels or config.channels
    if channels is not None:
        _slim(model, Path(channels))
    return _place(model, config, device)


def _slim(model: nn.Module, channels: Path) -> None:
    from sparsekern.pruning.structured import replay_

    try:
        replay_(model, channels)
    except FileNotFoundError:
        raise ConfigError(f"channels: {channels} does not exist") from None
    except (ValueError, KeyError) as error:
        raise ConfigError(f"channels: {channels} does not fit the model: {error}") from None


def build_network(
    config: TrainConfig,
    example: Tensor,
    num_classes: int,
    *,
    batches: Sequence[tuple[Tensor, Tensor]] | None = None,
    dry_run: bool = False,
) -> tuple[Network, Any]:
    """The model of ``config`` and its printable plan (None for a dense one and for one that comes from ``init``).

    Args:
        example: a training batch [B, C, H, W] on the device of the run: its size decides each layer's break-even.
        batches: ``(x, y)`` for allocations that score weights on data.
        dry_run: plan only; the returned model stays dense.
    """
    model = build_dense(config, shape_of(example), num_classes, example.device)
    if config.init is not None:
        try:
            saved = load_net(config.init)
        except TrainingError as error:
            raise ConfigError(f"init: {error}") from None
        _load_init(model, saved, config, shape_of(example), num_classes)
        if saved.sparse or config.method != "gradual":
            return measure(model, plan_of(model, example, saved.plan) if saved.sparse else None, example), None
    if config.sparsity == 0 and not config.override:
        return measure(model, None, example), None
    import sparsekern as sk

    try:
        settings = sparsity_config(config)
        # Layers are planned for the dtype that they will compute in.
        with torch.autocast(example.device.type, torch.bfloat16, enabled=config.amp):
            if config.tune:
                sk.tune(model, example, settings)
            if config.method == "gradual":
                plan = sk.plan(model, settings, example_input=example, batches=batches)
                if not dry_run:
                    begin_gradual(model, plan, config, example, batches)
            else:
                make = sk.plan if dry_run else sk.sparsify_
                plan = make(model, settings, example_input=example, batches=batches)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None
    # Through JSON: plain containers only, as checkpoints hold them.
    return measure(model, json.loads(json.dumps(plan.to_dict())), example), plan


def sparsity_config(config: TrainConfig, **changes: Any) -> SparsityConfig:
    """The sparsity options of ``config`` as the library takes them."""
    from sparsekern.config import SparsityConfig

    values: dict[str, Any] = {
        "sparsity": config.sparsity,
        "block": config.block_value,
        "allocation": config.allocation,
        "budget": config.budget,
        "pattern": config.pattern,
        "exclude": config.exclude,
        "overrides": config.override,
        "seed": config.seed,
        "rescale": config.rescale,
        "capacity": config.capacity,
        "below_break_even": config.below_break_even,
    }
    return SparsityConfig(**{**values, **changes})


def _load_init(model: nn.Module, saved: SavedNet, config: TrainConfig, shape: Shape, num_classes: int) -> None:
    if (saved.in_shape, saved.num_classes) != (shape, num_classes):
        raise ConfigError(
            f"init: {saved.path} takes samples {saved.in_shape} of {saved.num_classes} classes, the data of this run "
            f"has {shape} of {num_classes}"
        )
    if saved.sparse and config.method == "gradual":
        raise ConfigError(f"init: method gradual starts from a dense net, {saved.path} holds sparse layers")
    try:
        load_state(model, saved.state, sparse=saved.sparse)
    except TrainingError as error:
        name = f"{saved.config.model}, width {saved.config.width:g}"
        name += f", channels {saved.channels}" if saved.channels is not None else ""
        raise ConfigError(f"init: {saved.path} ({name}) does not fit {config.model}: {error}") from None


def begin_gradual(
    model: nn.Module, plan: Plan, config: TrainConfig, example: Tensor, batches: Sequence[tuple[Tensor, Tensor]] | None
) -> None:
    """Make the layers that ``plan`` prunes sparse modules in place, at the blocks of ``initial_sparsity``.

    A layer's first blocks are drawn as the plan draws its last ones; none has fewer than the plan keeps.
    """
    import sparsekern as sk
    from sparsekern.allocation import block_counts
    from sparsekern.layout import BlockGrid, BlockLayout
    from sparsekern.masks import make_block_masks
    from sparsekern.sparsify import ignore_in_ddp, replace_module, to_sparse

    layers = {layer.name: layer for layer in plan.layers if layer.state != "dense"}
    modules = dict(model.named_modules())
    grids = {}
    for name, layer in layers.items():
        assert layer.block is not None
        grids[name] = BlockGrid(layer.weight_shape, layer.block, getattr(modules[name], "groups", 1))
    first = {name: grid.blocks for name, grid in grids.items()}
    if config.initial_sparsity and grids:
        overrides = {glob: s * config.initial_sparsity / config.sparsity for glob, s in config.override.items()}
        begin = sparsity_config(config, sparsity=config.initial_sparsity, overrides=overrides)
        start = {layer.name: layer for layer in sk.plan(model, begin, example_input=example, batches=batches).layers}
        drawn = block_counts({name: start[name].target_density for name in grids}, grids)
        first = {name: max(count, layers[name].nnz) for name, count in drawn.items()}
    masks = make_block_masks(grids, first, pattern=config.pattern, seed=config.seed) if grids else {}
    for name, mask in masks.items():
        dense = modules[name]
        layout = BlockLayout.from_block_mask(grids[name], mask)
        sparse = to_sparse(dense, layout.mask(), grids[name].block, rescale=config.rescale)
        dense_for_now = first[name] > config.sparse_below * grids[name].blocks and config.sparse_below > 0
        sparse.masked = layers[name].state == "masked" or dense_for_now
        replace_module(model, dense, sparse)
    ignore_in_ddp(model)


def plan_of(model: nn.Module, example: Tensor, plan: dict[str, Any] | None = None) -> dict[str, Any]:
    """``Plan.to_dict()`` of the layers that ``model`` has now.

    Args:
        plan: of the same model when it was built: targets, reasons and predictions are taken from it, counts are not.
    """
    from sparsekern import models
    from sparsekern.nn import SparseConv2d, SparseModule
    from sparsekern.plan import LayerPlan, Plan

    known = {layer["name"]: layer for layer in plan["layers"]} if plan is not None else {}
    macs = models.count_macs(model, example[:1])
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d, SparseModule)):
            continue
        conv = isinstance(module, (nn.Conv2d, SparseConv2d))
        sparse = module if isinstance(module, SparseModule) else None
        shape = sparse.grid.weight_shape if sparse is not None else tuple(module.weight.shape)  # type: ignore[union-attr]
        layer = LayerPlan(name, "conv2d" if conv else "linear", shape)
        fields = LayerPlan.__dataclass_fields__
        for key, value in known.get(name, {}).items():
            if key in fields and key not in ("name", "kind", "weight_shape"):
                setattr(layer, key, tuple(value) if isinstance(value, list) else value)
        size = math.prod(shape)
        layer.params_dense = layer.params = size
        layer.macs_dense = layer.macs = macs[name]
        layer.state = "dense"
        if sparse is not None:
            layer.state = "masked" if sparse.masked else "sparse"
            layer.block, layer.nnz, layer.blocks = sparse.block, sparse.layout.nnz, sparse.grid.blocks
            inside = int(sparse.layout.mask().sum())
            layer.params = int(sparse.mask.sum())
            layer.fill = layer.params / inside if inside else 1.0
            # Per use of a weight; a masked layer computes with all of them.
            uses = macs[name] // max(size if sparse.masked else inside, 1)
            layer.macs_dense, layer.macs = uses * size, uses * layer.params
        layer.density = layer.params / size
        layers.append(layer)
    other = models.count_params(model) - sum(layer.params for layer in layers)
    notes = list(plan["notes"]) if plan is not None else []
    out: dict[str, Any] = json.loads(json.dumps(Plan(layers, other_params=max(other, 0), notes=notes).to_dict()))
    return out


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
    config: TrainConfig,
    state: dict[str, Tensor],
    plan: dict[str, Any] | None,
    example: Tensor,
    num_classes: int,
) -> Network:
    """The network of a checkpoint: the layout comes from ``state``, nothing is planned or measured again."""
    model = build_dense(config, shape_of(example), num_classes, example.device)
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


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> nn.Module:
    """The trained model of a finished run, in eval mode.

    Args:
        path: run folder, ``model.pt`` or a snapshot.

    Raises:
        CheckpointError: no such file, a damaged one, or a run folder without ``model.pt``.
    """
    saved = load_net(path)
    model = build_dense(saved.config, saved.in_shape, saved.num_classes, channels=saved.channels)
    load_state(model, saved.state, sparse=saved.sparse)
    return _place(model, saved.config, torch.device(device)).eval()


def shape_of(example: Tensor) -> Shape:
    """``(C, H, W)`` of the samples of ``example`` [B, C, H, W]."""
    c, h, w = example.shape[1:]
    return int(c), int(h), int(w)


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
