"""Tensors that belong to stored blocks follow them: values, gradients, optimizer state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.layout import BlockLayout
from sparsekern.nn import SparseModule
from sparsekern.topology.layer import Layer
from sparsekern.topology.select import positions
from sparsekern.topology.streams import Stream


def remap_(tensor: Tensor, slot_map: Tensor) -> None:
    """Move the rows of ``tensor`` [capacity, ...] in place: row k takes row ``slot_map[k]``, or zero for -1."""
    with torch.no_grad():
        rows = tensor.reshape(tensor.shape[0], -1)
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # slot -1 is the row of zeros
        if rows.shape[1] == 1:  # 2 to 3 times as fast as rows of one element
            moved = padded.flatten()[slot_map]
        else:
            moved = padded.index_select(0, torch.where(slot_map < 0, tensor.shape[0], slot_map))
        tensor.copy_(moved.view(tensor.shape))


def block_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors for ``parameter`` that hold something per block slot.

    Raises:
        TypeError: a tensor that neither is a scalar nor has one row per slot: it could not follow the blocks.
    """
    capacity = parameter.shape[0]
    rows = {}
    for key, item in optimizer.state.get(parameter, {}).items():
        if not isinstance(item, Tensor) or (item.numel() == 1 and item.dim() <= 1):
            continue
        # A row of one block's shape may be as long as the capacity by chance: so dimensions count too.
        if item.dim() != parameter.dim() or item.shape[0] != capacity:
            raise TypeError(
                f"{type(optimizer).__name__}: expected optimizer state with one row per block ({capacity}), got "
                f"{key!r} of shape {list(item.shape)}, which cannot follow blocks that move; use an elementwise "
                "optimizer (SGD, the Adam family, RMSprop, Lion)"
            )
        rows[key] = item
    return rows


def move_blocks_(module: SparseModule, optimizer: Optimizer, block_mask: Tensor) -> Tensor:
    """Rewrite the layout of ``module`` in place and let values, gradient and optimizer state follow.

    Grown blocks and their state are zero afterwards. No Parameter or buffer is replaced.

    Args:
        block_mask: bool [blocks], at most ``capacity`` set.

    Returns:
        The slot map, int64 [capacity].
    """
    rows = [module.values.data, *block_state(optimizer, module.values).values()]
    if module.values.grad is not None:
        rows.append(module.values.grad)
    slot_map = module.layout.update_(block_mask, check=False)
    for tensor in rows:
        remap_(tensor, slot_map)
    torch._C._increment_version([module.values])  # autograd has to see that `.data` was written
    return slot_map


def draw_(layer: Layer, slot_map: Tensor, grown: int, stream: Stream) -> None:
    """Give grown blocks normal values of the standard deviation of those that stayed; padding stays zero.

    Args:
        layer: after the update, its ``nnz`` too.
        slot_map: int64 [capacity] of the update.
        grown: blocks that are new.
    """
    slots = positions((slot_map < 0) & layer.used(), grown)
    whole = layer.inside(layer.places())
    inside = whole[slots]
    with torch.no_grad():
        stayed = layer.values[: layer.nnz].float().square().sum()
        weights = whole.sum() - inside.sum()
        std = (stayed / weights.clamp(min=1)).sqrt()
        drawn = stream.normal(inside.numel(), layer.device).view(inside.shape) * inside * std
        layer.values.index_copy_(0, slots, drawn.to(layer.values.dtype))


def compact_(module: SparseModule, optimizer: Optimizer, nnz: int) -> None:
    """Give back spare slots: a new, smaller Parameter and layout take the place of the old ones, optimizer included.

    Args:
        nnz: stored blocks.
    """
    old, layout = module.values, module.layout
    rows = block_state(optimizer, old)
    new = nn.Parameter(old.detach()[:nnz].clone(), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = old.grad[:nnz].clone()
    fresh = BlockLayout.from_block_mask(layout.grid, layout.block_mask(), capacity=nnz)
    module.values = new
    module.index = fresh.index
    if old in optimizer.state:
        state: dict[str, Any] = optimizer.state.pop(old)
        optimizer.state[new] = {key: item[:nnz].clone() if key in rows else item for key, item in state.items()}
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
