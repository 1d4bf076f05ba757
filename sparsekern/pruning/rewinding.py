"""Weights after pruning: an earlier state, fresh ones, or dense again. The masks stay where they are."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import handover
from sparsekern.layout import BlockGrid, BlockLayout
from sparsekern.matching import check_unwrapped, is_conv1d
from sparsekern.nn import SparseModule
from sparsekern.sparsify import densify_
from sparsekern.state import load_dense_state_dict

State = Mapping[str, Any] | str | os.PathLike[str]

_STORED = ("values", "row_ptr", "col", "element_mask", "masked")


def rewind_(model: nn.Module, state: State) -> nn.Module:
    """Load the weights of an earlier state into the model's present sparse layout, in place.

    Every parameter and buffer is rewound, running statistics of norms included; only layouts and masks stay as they
    are. Elements that the earlier state did not store come back as zeros. Parameters keep their identity and their
    gradients are dropped; an optimizer built before keeps its state, so build a new one.

    Args:
        model: with or without sparse layers.
        state: a dense state dict, a sparse one of any layout and block size, or a file that holds one (a snapshot or
            ``model.pt`` of a run, or what ``torch.save(model.state_dict())`` wrote), which is read without executing
            anything.

    Returns:
        ``model``.

    Raises:
        ValueError: names or shapes do not fit, the file cannot be read, or a layer has no layout yet. The model is
            then unchanged.

    Source: weight rewinding, Frankle et al. 2020 (arXiv:1912.05671), section 3; Renda et al. 2020 (arXiv:2003.02389).
    """
    _check_ready(model, "rewind_")
    dense = _dense_form(model, _read(state))
    _check_fits(model, dense)
    started = _started(model)
    load_dense_state_dict(model, dense)
    _mend(model, started)
    return model


def reinitialize_(model: nn.Module, seed: int) -> nn.Module:
    """Fresh weights under the same masks, in place: every module's own ``reset_parameters``, children first.

    Sparse layers draw the whole dense weight and keep their elements, so a sparse model gets what its dense original
    would get from the same seed. Norms forget their running statistics. The global random state is left as it was.

    Args:
        seed: of the drawing; the same seed gives the same weights on the same device.

    Returns:
        ``model``.

    Raises:
        ValueError: a module holds Parameters and cannot draw them anew (no ``reset_parameters``). A model with an
            initialisation of its own: build it again and :func:`rewind_` to its state.

    Source: the random reinitialisation of Frankle and Carbin 2019 (arXiv:1803.03635), section 2.
    """
    _check_ready(model, "reinitialize_")
    modules = list(model.modules())
    for name, module in model.named_modules():
        own = [key for key, parameter in module._parameters.items() if parameter is not None]
        if own and _resetter(module) is None:
            raise ValueError(
                f"reinitialize_: {name or 'the model'} ({type(module).__name__}) holds {own[0]!r} and has no "
                "reset_parameters; define it, or build the model anew and use rewind_(model, fresh.state_dict())"
            )
    started = _started(model)
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        torch.manual_seed(seed)
        for module in reversed(modules):  # children first, so that a parent may initialise over them
            reset = _resetter(module)
            if reset is not None:
                reset()
    _mend(model, started)
    return model


def redense_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Return the pruned weights as zeros, in place: every sparse layer becomes its dense original.

    The model computes what it computed; all weights learn from here on (dense-sparse-dense).

    Args:
        optimizer: holds the model's parameters; its groups get the dense weights, and state of the stored blocks'
            shape (momentum, Adam's moments) becomes dense with zeros where nothing was stored.

    Returns:
        ``model``.

    Raises:
        ValueError: the optimizer holds none of the model's sparse weights.
        TypeError: the model is compiled or wrapped.

    Source: Han et al. 2017 (arXiv:1607.04381), section 2.
    """
    _check_ready(model, "redense_")
    try:
        check_unwrapped(model)
    except TypeError:
        raise TypeError(
            "redense_: expected a plain module, got a compiled or wrapped one; pass the module inside, then compile "
            "or wrap it again"
        ) from None
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseModule)}
    if optimizer is not None and sparse and not handover.holds(optimizer, sparse.values()):
        raise ValueError(
            "redense_: expected an optimizer that holds the model's sparse weights, got one with none of them; pass "
            "the one that was built from this model"
        )
    densify_(model)
    if optimizer is not None:
        for name, module in sparse.items():
            handover.to_dense(optimizer, module, model.get_submodule(name))
    return model


# -- states ------------------------------------------------------------------------------------------------------------


def _read(state: State) -> Mapping[str, Any]:
    """The state dict itself, out of a file or out of a record that has it under "model"."""
    if not isinstance(state, Mapping):
        path = Path(state)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ValueError(f"state: {path} does not exist; expected a snapshot or model.pt") from None
        except pickle.UnpicklingError:
            raise ValueError(f"state: {path} is refused: it holds more than tensors and plain containers") from None
        except (OSError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"state: {path} cannot be read: {str(error).splitlines()[0]}") from None
        if not isinstance(state, Mapping):
            raise ValueError(f"state: expected a state dict in {path}, got {type(state).__name__}")
    inner = state.get("model")
    return inner if isinstance(inner, Mapping) else state


def _dense_form(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` under the names of the dense model: stored blocks become whole weights."""
    modules = dict(model.named_modules(remove_duplicate=False))
    dense: dict[str, Any] = {}
    for key, item in state.items():
        owner, _, leaf = key.rpartition(".")
        if leaf not in _STORED or f"{owner}.row_ptr" not in state:
            dense[key] = item
        elif leaf == "values":
            dense[f"{owner}.weight"] = _expand(owner, modules.get(owner), state)
    return dense


def _expand(name: str, module: nn.Module | None, state: Mapping[str, Any]) -> Tensor:
    weight = module._parameters.get("weight") if module is not None else None
    values = state[f"{name}.values"]
    if isinstance(module, SparseModule):
        shape, groups, transposed = module.grid.weight_shape, module.grid.groups, _transposed(module)
    elif module is not None and weight is not None:
        transposed = is_conv1d(module)
        shape, groups = tuple(weight.shape[::-1] if transposed else weight.shape), getattr(module, "groups", 1)
    else:
        raise ValueError(f"state: expected the layers of the model, got a sparse layer {name!r} that it does not have")
    try:
        grid = BlockGrid(shape, (values.shape[1], values.shape[2]), groups)
        layout = BlockLayout.from_rows(grid, state[f"{name}.row_ptr"].cpu(), state[f"{name}.col"].cpu())
        dense = layout.to_dense(values.detach().cpu())
    except (ValueError, IndexError, KeyError, RuntimeError) as error:
        raise ValueError(f"state: the layout of {name!r} does not fit the model: {error}") from None
    return dense.t() if transposed else dense


def _check_fits(model: nn.Module, dense: Mapping[str, Any]) -> None:
    """Names and shapes, before anything is written."""
    sparse = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, SparseModule)}
    expected: dict[str, Any] = {}
    for key, item in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if owner not in sparse or leaf not in _STORED:
            expected[key] = getattr(item, "shape", None)
    for name, module in sparse.items():
        shape = module.grid.weight_shape
        expected[f"{name}.weight"] = torch.Size(shape[::-1] if _transposed(module) else shape)
    missing = [key for key in expected if key not in dense]
    unknown = [key for key in dense if key not in expected]
    if missing or unknown:
        found = [f"missing {missing[0]!r} and {len(missing) - 1} more"] if missing else []
        found += [f"unknown {unknown[0]!r} and {len(unknown) - 1} more"] if unknown else []
        raise ValueError(f"state: expected the names of this model, got a state with {', '.join(found)}")
    for key, shape in expected.items():
        got = getattr(dense[key], "shape", None)
        if got != shape:
            raise ValueError(f"state: {key}: expected {list(shape or ())}, got {list(got or ())}")


# -- models ------------------------------------------------------------------------------------------------------------


def _check_ready(model: nn.Module, what: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, SparseModule) and (module.index.is_meta or module._unloaded):
            raise ValueError(
                f"{what}: {name or 'the layer'} has no layout yet (it is or was on the meta device); load a state "
                "dict first"
            )


def _started(model: nn.Module) -> list[SparseModule]:
    """Sparse layers that an optimizer has trained, so that their Parameter must not be replaced."""
    return [module for module in model.modules() if isinstance(module, SparseModule) and module._started()]


def _mend(model: nn.Module, started: list[SparseModule]) -> None:
    """Drop stale gradients, and keep refusing checkpoints of another size where an optimizer holds the Parameter."""
    for parameter in model.parameters():
        parameter.grad = None
    for module in started:
        module._fresh_version = -1


def _resetter(module: nn.Module) -> Any:
    # MultiheadAttention and a few others spell it with an underscore.
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _transposed(module: SparseModule) -> bool:
    return getattr(module, "transposed_origin", False)
