"""The calls that are timed on a whole net: a forward pass and a training step, eager, compiled or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.device import captured

MODES = ("eager", "compile", "graph")
OPTIMIZERS: dict[str, dict[str, bool]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}


def sgd(model: nn.Module, implementation: str = "fused") -> torch.optim.SGD:
    """SGD with momentum; so small a rate leaves the weights alone, but not the work."""
    options: dict[str, Any] = OPTIMIZERS[implementation]
    return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4, **options)


class NetSteps:
    """Training step and forward pass of one net under bfloat16 autocast.

    Args:
        model: classifier of images, on its device, in channels_last memory.
        images, labels: the batch, the same at every step.
        mode: one of ``MODES``; on a CPU a graph is the eager call, and compiling stops short of generating code.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, mode: str) -> None:
        self.model, self.images, self.labels, self.mode = model, images, labels, mode
        self.device = images.device.type
        self.optimizer = sgd(model)
        self.graphs: dict[str, Callable[[], object]] = {}
        self.net: Callable[[Tensor], Tensor] = model
        if mode == "compile":
            torch._dynamo.reset()
            self.net = torch.compile(model, backend="inductor" if self.device == "cuda" else "aot_eager")

    def _autocast(self) -> torch.autocast:
        # A graph must hold the casts of the weights: none may come from a cache filled before.
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=self.mode != "graph")

    def _forward(self) -> Tensor:
        with torch.no_grad(), self._autocast():
            return self.net(self.images)

    def _step(self) -> Tensor:
        with self._autocast():
            loss = F.cross_entropy(self.net(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def first_loss(self) -> float:
        """Loss of one step, which also fills the optimizer's state."""
        self.model.train()
        return float(self._step().detach())

    def call(self, pass_: str) -> Callable[[], object]:
        """The timed call of ``"step"`` or ``"forward"``; the model stays in the mode it needs until the next call."""
        self.model.train(pass_ == "step")
        run = self._step if pass_ == "step" else self._forward
        if self.mode != "graph" or self.device != "cuda":
            return run
        if pass_ not in self.graphs:
            self.graphs[pass_] = captured(run)
        return self.graphs[pass_]

    def with_grads(self) -> None:
        """Gradients as before an optimizer step."""
        self.model.train()
        with self._autocast():
            F.cross_entropy(self.net(self.images), self.labels).backward()

    def state_bytes(self) -> int:
        """Bytes of parameters, buffers and optimizer state."""
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state]
        return sum(t.numel() * t.element_size() for t in tensors)
