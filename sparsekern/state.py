"""State dicts: dense ones out of and into sparse models, and sparse structure out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.layout import BlockGrid, BlockLayout
from sparsekern.nn import SparseModule
from sparsekern.sparsify import ignore_in_ddp, replace_module, to_sparse

_SPARSE_KEYS = ("values", "row_ptr", "col", "element_mask", "masked")


def _sparse_modules(model: nn.Module) -> dict[str, SparseModule]:
    return {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, SparseModule)
    }


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the dense original: its names, its shapes, zeros where nothing is stored."""
    sparse = _sparse_modules(model)
    out: dict[str, Any] = {}
    for key, item in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if owner not in sparse or leaf not in _SPARSE_KEYS:
            out[key] = item
        elif leaf == "values":
            module = sparse[owner]
            with torch.no_grad():
                weight = module.layout.to_dense(module.values).detach()
            out[f"{owner}.weight"] = weight.t().contiguous() if _transposed(module) else weight
    order = {key: i for i, key in enumerate(out)}
    for owner in sparse:  # the original lists weight before bias
        weight_key, bias_key = f"{owner}.weight", f"{owner}.bias"
        if bias_key in order and order[bias_key] < order[weight_key]:
            order[weight_key], order[bias_key] = order[bias_key], order[weight_key]
    return {key: out[key] for key in sorted(out, key=order.__getitem__)}


def load_dense_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
    """Load a dense state dict into a sparse model: sparse layers take the elements that their masks keep.

    Raises:
        RuntimeError: keys are missing or unexpected (with ``strict``), or shapes differ.
    """
    sparse = _sparse_modules(model)
    rest = dict(state_dict)
    missing, wrong = [], []
    weights: dict[str, Tensor] = {}
    for name, module in sparse.items():
        weight = rest.pop(f"{name}.weight", None)
        if weight is None:
            missing.append(f"{name}.weight")
            continue
        weight = weight.t() if _transposed(module) else weight
        if tuple(weight.shape) != module.grid.weight_shape:
            wrong.append(f"{name}.weight: expected {list(module.grid.weight_shape)}, got {list(weight.shape)}")
        weights[name] = weight
    if wrong:
        raise RuntimeError("load_dense_state_dict: " + "; ".join(wrong))
    result = model.load_state_dict(_with_own_sparse(model, sparse, rest), strict=False)
    missing += list(result.missing_keys)
    if strict and (missing or result.unexpected_keys):
        raise RuntimeError(
            f"load_dense_state_dict: missing keys {missing or 'none'}, "
            f"unexpected keys {result.unexpected_keys or 'none'}"
        )
    for name, weight in weights.items():
        sparse[name].load_dense_(weight)


def _with_own_sparse(
    model: nn.Module, sparse: Mapping[str, SparseModule], rest: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``rest`` plus the model's own sparse entries, so that a plain load finds every key it expects."""
    own = model.state_dict()
    for name in sparse:
        for leaf in _SPARSE_KEYS:
            if f"{name}.{leaf}" in own:
                rest[f"{name}.{leaf}"] = own[f"{name}.{leaf}"]
    return rest


def restore_(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> nn.Module:
    """Give a freshly built dense model the sparse structure of a checkpoint, then load it.

    Args:
        model: the dense model; layers that the checkpoint holds as sparse are replaced in place.
        state_dict: of a sparse model: ``<layer>.values``, ``<layer>.row_ptr``, ``<layer>.col`` and the rest.

    Raises:
        ValueError: the checkpoint's layers do not fit the model's.
    """
    modules = dict(model.named_modules())
    for key, values in state_dict.items():
        name, _, leaf = key.rpartition(".")
        if leaf != "values" or f"{name}.row_ptr" not in state_dict or isinstance(modules.get(name), SparseModule):
            continue
        dense = modules.get(name)
        if dense is None or not hasattr(dense, "weight"):
            raise ValueError(f"restore_: the checkpoint has a sparse layer {name!r}, the model has none of that name")
        shape = tuple(dense.weight.shape)  # type: ignore[union-attr, arg-type]
        if hasattr(dense, "nf"):  # Transformers' Conv1D stores [I, O]
            shape = shape[::-1]
        block = (values.shape[1], values.shape[2])
        grid = BlockGrid(shape, block, getattr(dense, "groups", 1))  # type: ignore[arg-type]
        layout = BlockLayout.from_rows(grid, state_dict[f"{name}.row_ptr"].cpu(), state_dict[f"{name}.col"].cpu())
        sparse = to_sparse(dense, layout.mask(), grid.block, capacity=layout.capacity)
        replace_module(model, dense, sparse)
    ignore_in_ddp(model)
    model.load_state_dict(state_dict, strict=strict)
    return model


def _transposed(module: SparseModule) -> bool:
    return getattr(module, "transposed_origin", False)
