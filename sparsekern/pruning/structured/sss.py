"""Sparse structure selection: residual blocks learn a scale, and those whose scale is zero go.

Source: Huang and Wang 2018 (arXiv:1707.01213): scales in section 3.2, accelerated proximal gradient in section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsekern.pruning.structured.blocks import last_layer, residual_blocks


class BlockScales:
    """One factor on the residual branch of every block, trained beside the weights.

    The factors start at 1 and are no parameters of the model: its optimizer and its state dict don't see them. ::

        scales = BlockScales(model)
        loss.backward(); optimizer.step(); scales.step(lr, gamma)   # every step
        scales.fold_()                                             # at the end
        structured.prune_(model, example, method="sss")            # blocks of factor 0 go

    Args:
        model: a network with residual blocks (``sparsekern.models``).
        momentum: of the accelerated update, 0.9 in the paper.

    Attributes:
        values: ``{block: factor}``, tensors of no dimension that take gradients.

    Raises:
        ValueError: no residual block, or a momentum outside [0, 1).
    """

    def __init__(self, model: nn.Module, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a value from 0 to below 1, got {momentum!r}")
        self.model, self.momentum = model, momentum
        blocks = residual_blocks(model)
        if not blocks:
            raise ValueError(f"sss: expected a network with residual blocks, got {type(model).__name__} without any")
        self.values: dict[str, Tensor] = {}
        self._velocity: dict[str, Tensor] = {}
        self._handles = []
        for name, block in blocks.items():
            scale = torch.ones((), device=next(block.parameters()).device, requires_grad=True)
            self.values[name] = scale
            self._velocity[name] = torch.zeros_like(scale, requires_grad=False)
            self._handles.append(last_layer(block).register_forward_hook(_times(scale)))

    @torch.no_grad()
    def step(self, lr: float, gamma: float) -> None:
        """One accelerated proximal-gradient update of all factors; their gradients are cleared.

        ``z = soft(x - lr * grad, lr * gamma)``, ``v = z - x + momentum * v``, ``x = z + momentum * v``.

        Args:
            lr: learning rate.
            gamma: weight of the penalty ``gamma * sum |factor|``.
        """
        for name, scale in self.values.items():
            grad = torch.zeros_like(scale) if scale.grad is None else scale.grad
            z = torch.nn.functional.softshrink(scale - lr * grad, lr * gamma)
            velocity = self._velocity[name]
            velocity.copy_(z - scale + self.momentum * velocity)
            scale.copy_(z + self.momentum * velocity)
            scale.grad = None

    @torch.no_grad()
    def fold_(self) -> None:
        """Move the factors into the last layer of each branch and detach from the model, which computes the same."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        blocks = residual_blocks(self.model)
        for name, scale in self.values.items():
            layer = last_layer(blocks[name])
            for tensor in (layer.weight, layer.bias):
                if isinstance(tensor, Tensor):
                    tensor.mul_(scale)

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": {name: scale.detach().clone() for name, scale in self.values.items()},
            "velocity": {name: v.clone() for name, v in self._velocity.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; ``ValueError`` if it is of other blocks."""
        if set(state["values"]) != set(self.values):
            raise ValueError(
                f"sss: expected factors of blocks {', '.join(self.values)}, got {', '.join(state['values'])}"
            )
        for name in self.values:
            self.values[name].copy_(state["values"][name])
            self._velocity[name].copy_(state["velocity"][name])


def _times(scale: Tensor) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * scale

    return hook


def block_scores(model: nn.Module) -> dict[str, float]:
    """Mean |weight| of the last layer of each residual branch: 0 only where a folded factor is 0."""
    scores = {}
    for name, block in residual_blocks(model).items():
        layer = last_layer(block)
        parts = [layer.weight, layer.bias] if isinstance(layer, _BatchNorm) else [layer.weight]
        scores[name] = sum(float(p.detach().abs().double().mean()) for p in parts if isinstance(p, Tensor))
    return scores


def smallest_blocks(scores: Mapping[str, float], ratio: float) -> list[str]:
    """The ``floor(ratio * n)`` blocks of smallest score, in the order of the network."""
    count = int(ratio * len(scores) + 1e-6)
    gone = set(sorted(scores, key=lambda name: scores[name])[:count])
    return [name for name in scores if name in gone]


def zero_blocks(scores: Mapping[str, float]) -> list[str]:
    """Blocks of score 0."""
    return [name for name, score in scores.items() if score == 0]


def blocks_for(left: Sequence[tuple[int, bool]], scores: Mapping[str, float]) -> list[str]:
    """Blocks to drop so that stage ``i`` keeps ``left[i] = (count, whether its first is kept)``, smallest scores first.

    Raises:
        ValueError: the network has other stages.
    """
    stages: dict[str, list[str]] = {}
    for name in scores:
        stages.setdefault(name.rpartition(".")[0], []).append(name)
    if len(stages) != len(left) or any(len(own) < n for own, (n, _) in zip(stages.values(), left)):
        sizes = [len(own) for own in stages.values()]
        raise ValueError(f"sss: expected {len(left)} stages of at least {[n for n, _ in left]} blocks, got {sizes}")
    dropped: list[str] = []
    for own, (count, first) in zip(stages.values(), left):
        candidates = sorted(own[1:], key=lambda name: scores[name], reverse=True)
        kept = set(candidates[: count - first]) | ({own[0]} if first else set())
        dropped += [name for name in own if name not in kept]
    return dropped
