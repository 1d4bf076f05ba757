"""An optimizer follows a layer that changes between dense and sparse: its parameter groups, and state per weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.matching import is_conv1d
from sparsekern.nn import SparseModule


def weight_of(module: nn.Module) -> nn.Parameter:
    """The Parameter that holds the weights of a dense or a sparse layer."""
    weight = module._parameters["values" if isinstance(module, SparseModule) else "weight"]
    assert weight is not None
    return weight


def holds(optimizer: Optimizer, layers: Iterable[nn.Module]) -> bool:
    """Whether the optimizer has the weights of at least one of ``layers``."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(weight_of(layer)) in held for layer in layers)


def to_stored(optimizer: Optimizer, dense: nn.Module, sparse: SparseModule) -> None:
    """``sparse.values`` takes the place of the dense weight; state of its shape is cut to the stored blocks."""
    layout, transposed = sparse.layout, is_conv1d(dense)
    _hand_over(optimizer, dense, sparse, lambda item: layout.from_dense(item.t() if transposed else item))


def to_dense(optimizer: Optimizer, sparse: SparseModule, dense: nn.Module) -> None:
    """The dense weight takes the place of ``sparse.values``; state of their shape gets zeros where none was stored."""
    layout, transposed = sparse.layout, is_conv1d(dense)

    def widen(item: Tensor) -> Tensor:
        full = layout.to_dense(item)
        return full.t().contiguous() if transposed else full

    _hand_over(optimizer, sparse, dense, widen)


def _hand_over(optimizer: Optimizer, before: nn.Module, after: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    old, new = weight_of(before), weight_of(after)
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state:
        for key, item in state.items():
            if isinstance(item, Tensor) and item.shape == old.shape:
                state[key] = convert(item)
        optimizer.state[new] = state
