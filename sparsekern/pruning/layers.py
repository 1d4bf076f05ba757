"""Which layers pruning touches, dense or sparse already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsekern import matching
from sparsekern.config import Selector
from sparsekern.matching import Candidate
from sparsekern.nn import SparseConv2d, SparseLinear, SparseModule

INCLUDE: tuple[Selector, ...] = (nn.Linear, nn.Conv2d)
_DENSE_TYPE = {SparseLinear: nn.Linear, SparseConv2d: nn.Conv2d}


def prunable(
    model: nn.Module,
    names: Sequence[str] | None = None,
    include: Sequence[Selector] = INCLUDE,
    exclude: Sequence[Selector] = (),
) -> list[Candidate]:
    """The layers that pruning touches, in model order.

    The rules are those of :func:`sparsekern.sparsify_`: stem convolutions, the classifier, depthwise convolutions, tied
    weights and subclasses stay dense. Layers that are sparse already are in, whatever they are, unless excluded.

    Args:
        names: exactly these layers; stem and classifier may be among them.
        include, exclude: types, name globs or callables ``(name, module) -> bool``, as in ``SparsityConfig``;
            ``nn.Linear`` and ``nn.Conv2d`` stand for their sparse twins too.

    Raises:
        ValueError: no layer matches, or one of ``names`` is unknown or can't become sparse (with the reason).
        TypeError: the model is compiled or wrapped.
    """
    matching.check_unwrapped(model)
    found = matching.find(model, include, exclude, names or ())
    for c in found:
        if isinstance(c.module, SparseModule):
            c.reason = _why_not_again(c, include, exclude)
    if names is not None:
        by_name = {c.name: c for c in found}
        for name in names:
            if name not in by_name:
                raise ValueError(f"names: expected Linear or Conv2d layers, got {name!r}; the model has {[*by_name]}")
            if by_name[name].reason:
                raise ValueError(f"names: {name!r} can't be pruned: {by_name[name].reason}")
    chosen = [c for c in found if not c.reason and (names is None or c.name in names)]
    if not chosen:
        why = "; ".join(f"{c.name}: {c.reason}" for c in found[:8]) or "the model has no Linear or Conv2d"
        raise ValueError(f"pruning: expected at least one layer to match, got none ({why})")
    return chosen


def _why_not_again(c: Candidate, include: Sequence[Selector], exclude: Sequence[Selector]) -> str:
    if c.groups > 1 and c.weight_shape[1] == 1:
        return "depthwise convolution"
    if any(_matches(selector, c) for selector in exclude):
        return "excluded"
    if not c.explicit and not any(_matches(selector, c) for selector in include):
        return "not included"
    return ""


def _matches(selector: Selector, c: Candidate) -> bool:
    if isinstance(selector, type) and _DENSE_TYPE.get(type(c.module)) is selector:  # type: ignore[call-overload]
        return True
    return matching.matches(selector, c.name, c.module)


def alive(c: Candidate) -> Tensor:
    """bool, ``c.weight_shape``, on the CPU: the weights that exist. All of a dense layer's do, zeros too."""
    if isinstance(c.module, SparseModule):
        return c.module.mask.cpu()
    return torch.ones(c.weight_shape, dtype=torch.bool)


def oriented(c: Candidate, tensor: Tensor) -> Tensor:
    """From the order of ``c.module.weight`` to ``c.weight_shape`` and back: a dense ``Conv1D`` stores [I, O]."""
    return tensor.t() if matching.is_conv1d(c.module) else tensor
