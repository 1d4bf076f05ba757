"""Which channels hang together, found by Torch-Pruning (Fang et al. 2023, arXiv:2301.12900), and their removal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsekern.pruning.structured.channels import IN, OUT, SLICED, Channels, axis_size

INSTALL = "structured pruning needs Torch-Pruning: pip install 'sparsekern[structured]'"
SPARSE = ("SparseLinear", "SparseConv2d")
# Operations between layers through which a channel passes alone and in order.
PASSING = ("_ElementWiseOp", "_ReshapeOp")


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a group's channels; ``positions`` of its inputs belong to each (flattened images: > 1)."""

    layer: str
    positions: int


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together.

    Attributes:
        name: the first of ``producers``.
        producers: linear and convolution layers that write the channels; several where a residual addition ties them.
        norms: batch norms on the way.
        consumers: layers that read the channels.
        channels: how many.
    """

    name: str
    producers: tuple[str, ...]
    norms: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    channels: int

    @property
    def coupled(self) -> bool:
        """Whether channels of several layers are tied."""
        return len(self.producers) > 1


def torch_pruning() -> Any:
    """The module; ``ImportError`` says how to install it."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return torch_pruning


def check_dense(model: nn.Module) -> None:
    """``ValueError`` names a layer that is sparse, and says what to do."""
    for name, module in model.named_modules():
        if any(cls.__name__ in SPARSE for cls in type(module).__mro__):
            raise ValueError(
                f"structured pruning: expected a dense model, {name} is a {type(module).__name__}; prune channels "
                "first and call sparsify_ afterwards, or densify_ the model"
            )


class ChannelGraph:
    """Groups of channels of a dense model, and what was removed from them so far.

    Args:
        model: dense; no layer may be sparse.
        example_input: [B, ...], or a tuple of arguments; the model runs on it once in eval mode.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: sparse layers, or nothing that can be traced.
    """

    def __init__(self, model: nn.Module, example_input: Tensor | Sequence[Any]) -> None:
        check_dense(model)
        self.model = model
        self.channels = Channels()
        inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.enable_grad():
                # Always a tuple: a tensor would be unpacked along its batch.
                self._graph = torch_pruning().DependencyGraph().build_dependency(model, inputs, verbose=False)
        finally:
            for module, training in modes.items():
                module.training = training
        self._names = {module: name for name, module in model.named_modules()}
        self._layers = dict(model.named_modules())

    def groups(self) -> dict[str, Group]:
        """Groups that can be pruned, by name and in the order of ``named_modules()``.

        Left out: channels that are the model's output, that pass through anything but batch norms, element-wise
        operations, pooling and flattening (attention heads, layer norms), and grouped convolutions.
        """
        found: dict[str, Group] = {}
        seen: set[str] = set()
        for name, module in self._layers.items():
            if name in seen or not isinstance(module, (nn.Linear, nn.Conv2d)) or module not in self._graph.module2node:
                continue
            count = axis_size(module, OUT) if getattr(module, "groups", 1) == 1 else 0
            group = self._group(name, range(count)) if count else None
            if group is None:
                continue
            seen.update(group.producers)
            if group.consumers:
                found[name] = group
        return found

    def remove_(self, group: Group, indices: Iterable[int]) -> None:
        """Remove channels ``indices`` of ``group`` from every layer that has them; in place, noted in ``channels``.

        Raises:
            ValueError: an index out of range, or nothing would be left.
        """
        removed = sorted({int(i) for i in indices})
        if not removed:
            return
        size = axis_size(self._layers[group.name], OUT)
        if removed[0] < 0 or removed[-1] >= size or len(removed) >= size:
            raise ValueError(
                f"{group.name}: expected fewer than its {size} channels, each within 0..{size - 1}, "
                f"got {len(removed)} of {removed[0]}..{removed[-1]}"
            )
        for module, axis, own in self._items(group.name, removed).values():
            self.channels.remove(self._names[module], axis, own, axis_size(module, axis))
        self._last.prune(record_history=False)

    def _items(self, name: str, indices: Sequence[int]) -> dict[tuple[str, str], tuple[nn.Module, str, list[int]]]:
        """``{(layer, axis): (module, axis, its indices)}`` of a pruning group."""
        module = self._layers[name]
        pruner = self._graph.get_pruner_of_module(module)
        self._last = self._graph.get_pruning_group(module, pruner.prune_out_channels, list(indices))
        found: dict[tuple[str, str], tuple[nn.Module, str, list[int]]] = {}
        for item in self._last.items:
            target = item.dep.target.module
            if isinstance(target, SLICED):
                output = isinstance(target, _BatchNorm) or self._graph.is_out_channel_pruning_fn(item.dep.handler)
                axis = OUT if output else IN
                found[self._names[target], axis] = (target, axis, [int(i) for i in item.idxs])
        return found

    def _group(self, name: str, indices: Sequence[int]) -> Group | None:
        count = len(indices)
        items = self._items(name, indices)
        for item in self._last.items:
            target = item.dep.target.module
            if not isinstance(target, SLICED) and type(target).__name__ not in PASSING:
                return None
        producers: list[str] = []
        norms: list[str] = []
        consumers: list[Consumer] = []
        for (layer, axis), (module, _, own) in items.items():
            positions, rest = divmod(len(own), count)
            if rest or own != list(range(count * positions)) or getattr(module, "groups", 1) != 1:
                return None
            if axis == IN:
                consumers.append(Consumer(layer, positions))
            elif positions != 1 and not isinstance(module, _BatchNorm):
                return None
            else:
                (norms if isinstance(module, _BatchNorm) else producers).append(layer)
        order = list(self._layers)
        producers.sort(key=order.index)
        return Group(name, tuple(producers), tuple(norms), tuple(consumers), count)
