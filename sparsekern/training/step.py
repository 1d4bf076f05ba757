"""One training step and how long its parts take: the same code trains and is timed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from sparsekern.training.config import TrainConfig

if TYPE_CHECKING:
    from sparsekern.topology import TopologyScheduler, UpdateRecord
    from sparsekern.training.channel_training import ChannelTraining

PHASES = ("forward", "backward", "optimizer", "topology")


class StepOutput(NamedTuple):
    """``loss`` [] and ``logits`` [B, classes], detached; ``seconds`` of each of :data:`PHASES`; ``update`` of the
    topology, None if there was none in this step."""

    loss: Tensor
    logits: Tensor
    seconds: tuple[float, float, float, float]
    update: UpdateRecord | None = None


class Step:
    """Forward with loss, backward, optimizer step with zeroing of gradients, and the topology's step between them.

    Args:
        model: the model, not compiled.
        topology: moves stored blocks.
        channels: penalties on scales of channels and blocks.
        synchronize: on CUDA, wait for the device between the phases so that their times are true.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: TrainConfig,
        *,
        topology: TopologyScheduler | None = None,
        channels: ChannelTraining | None = None,
        synchronize: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.topology = topology
        self.channels = channels
        self.device = next(model.parameters()).device
        self._parameters = list(model.parameters())
        self._forward = torch.compile(model) if config.compile else model
        self._synchronize = synchronize and self.device.type == "cuda"

    def logits(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, classes], under the autocast of the run."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            out: Tensor = self._forward(x)
        return out.float()

    def __call__(self, x: Tensor, y: Tensor) -> StepOutput:
        start = self._now()
        logits = self.logits(x)
        loss = F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)
        forward = self._now()
        loss.backward()
        if self.channels is not None:
            self.channels.after_backward()
        backward = self._now()
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
        self.optimizer.step()
        if self.channels is not None:
            self.channels.after_step(self.optimizer.param_groups[0]["lr"])
        stepped = self._now()
        update = self._move_blocks() if self.topology is not None else None
        moved = self._now() if self.topology is not None else stepped
        self.optimizer.zero_grad(set_to_none=True)
        optimizer = stepped - backward + self._now() - moved
        seconds = (forward - start, backward - forward, optimizer, moved - stepped)
        return StepOutput(loss.detach(), logits.detach(), seconds, update)

    def _move_blocks(self) -> UpdateRecord | None:
        assert self.topology is not None
        update = self.topology.step()
        if update is not None and update.compacted:
            self._parameters = list(self.model.parameters())
        return update

    def to_device(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        if self.config.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y

    def _now(self) -> float:
        if self._synchronize:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
