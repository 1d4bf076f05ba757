"""Layer shapes of one forward pass over an example input."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCall:
    """What a layer saw: ``x`` and ``y`` shapes of its first call, number of calls, memory format, dtype."""

    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    calls: int
    channels_last: bool


def run_example(model: nn.Module, example_input: Any) -> Any:
    """``model(example_input)``: a tuple or list is unpacked, a mapping goes in as keywords."""
    if isinstance(example_input, (tuple, list)):
        return model(*example_input)
    if hasattr(example_input, "keys"):
        return model(**example_input)
    return model(example_input)


def example_batch(example_input: Any) -> int:
    """Examples in the input: the first tensor's first dimension."""
    parts: Iterable[Any]
    if isinstance(example_input, Tensor):
        parts = [example_input]
    elif hasattr(example_input, "values"):
        parts = example_input.values()
    else:
        parts = example_input
    for part in parts:
        if isinstance(part, Tensor) and part.dim() > 0:
            return max(int(part.shape[0]), 1)
    raise ValueError(f"example_input: expected a tensor or a collection of tensors, got {type(example_input).__name__}")


def trace(model: nn.Module, layers: dict[str, nn.Module], example_input: Any) -> dict[str, LayerCall]:
    """Run the model once without gradients, in eval mode, and note each layer's shapes.

    Modes and random state are put back; a layer that the pass never reached is missing from the result.
    """
    calls: dict[str, LayerCall] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            old = calls.get(name)
            calls[name] = (
                LayerCall(tuple(x.shape), tuple(output.shape), 1, last)
                if old is None
                else LayerCall(old.x_shape, old.y_shape, old.calls + 1, old.channels_last)
            )

        return hook

    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in layers.items()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            run_example(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return calls


def macs_per_example(call: LayerCall, weight_shape: tuple[int, ...], batch: int) -> int:
    """Dense multiply-accumulates of one example: outputs times fan-in, over all calls of the layer."""
    return math.prod(call.y_shape) * math.prod(weight_shape[1:]) * call.calls // batch
