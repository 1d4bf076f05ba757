"""Multiply-accumulates and parameters of a model, dense or sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
SPARSE = ("SparseLinear", "SparseConv2d")


def _is(module: nn.Module, *class_names: str) -> bool:
    # By name: this package must import without the sparse layers, which sit above it.
    return any(cls.__name__ in class_names for cls in type(module).__mro__)


def _counted(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d)) or _is(module, *SPARSE, "Conv1D")


def _learned_weights(module: nn.Module) -> int:
    """Weights that a linear or convolution layer has: all of them, or those of a sparse layer's mask."""
    if _is(module, *SPARSE):
        mask: Tensor = module.mask  # type: ignore[assignment]
        return int(mask.count_nonzero())
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.numel()


def _multiplied_weights(module: nn.Module) -> int:
    """Weights that it multiplies with: a sparse layer computes whole stored blocks, a masked one everything."""
    if not _is(module, *SPARSE):
        return _learned_weights(module)
    layout: Any = module.layout
    return math.prod(layout.grid.weight_shape) if getattr(module, "masked", False) else int(layout.mask().sum())


def count_macs(model: nn.Module, example_input: Example) -> dict[str, int]:
    """Multiply-accumulates per sample of every linear and convolution layer, from one forward pass.

    A layer that is called several times counts every call. Products without a weight (attention scores), norms and
    activations are not counted. The pass runs without gradients in eval mode and leaves the model as it was; meta
    tensors do.

    Args:
        model: any module; ``SparseLinear`` and ``SparseConv2d`` count their stored blocks, clipped to the weight, or
            the whole weight in the masked state.
        example_input: a tensor [B, ...], or a tuple or mapping of arguments whose first tensor is [B, ...].

    Returns:
        ``{module name: MACs}``, in the order of ``model.named_modules()``; layers that did not run count 0.

    Raises:
        ValueError: the example input has no samples.
    """
    args, kwargs = _arguments(example_input)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    batch = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    if batch < 1:
        raise ValueError("example_input: expected a tensor [B, ...] with B of 1 and more as its first tensor")
    layers = {name: module for name, module in model.named_modules() if _counted(module)}
    total = dict.fromkeys(layers, 0)

    def counter(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            weight_uses = output.numel() // _out_features(module)
            total[name] += weight_uses * _multiplied_weights(module)

        return hook

    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(counter(name)) for name, module in layers.items()]
    try:
        model.eval()
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return {name: count // batch for name, count in total.items()}


def count_params(model: nn.Module, *, weights_only: bool = False) -> int:
    """Parameters of a model; tied ones count once.

    Sparse layers count the weights of their mask: no spare slots, no padding of edge blocks.

    Args:
        model: any module.
        weights_only: leave out biases, norms and embeddings: only weights of linear and convolution layers.
    """
    if weights_only:
        seen: set[int] = set()
        count = 0
        for module in model.modules():
            if _counted(module):
                key = id(module if _is(module, *SPARSE) else module.weight)
                count += 0 if key in seen else _learned_weights(module)
                seen.add(key)
        return count
    count = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if _is(module, *SPARSE):
            values: Tensor = module.values  # type: ignore[assignment]
            count -= values.numel() - _learned_weights(module)
    return count


def _out_features(module: nn.Module) -> int:
    for attribute in ("out_features", "out_channels", "nf"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    raise TypeError(f"{type(module).__name__}: expected out_features or out_channels, got neither")


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
