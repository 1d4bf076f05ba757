"""Batches in a seeded order that can be resumed in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.data.augment import Augment
from sparsekern.data.split import Split


class Batches:
    """Iterate over a split in batches of normalised images and labels.

    ``for x, y in batches`` is one epoch. Order and augmentation come from an own generator, so they depend on
    ``seed`` alone. An epoch that is left early is over: the next ``for`` begins the next one. After
    :meth:`load_state_dict` the next ``for`` continues the epoch of the saved state, with exactly the batches that
    would have followed.

    Args:
        split: where images and labels come from.
        batch_size: samples in a batch.
        shuffle: draw a new order in every epoch.
        drop_last: leave out a last batch that is smaller.
        augment: random changes to the images.
        mean, std: per channel, of pixels in 0..1; ``x = (pixel - mean) / std``.
        seed: of order and augmentation.
        device: where batches go; by default they stay where the split has its images.
        dtype: of ``x``.
        channels_last: memory format of ``x``.

    Yields:
        ``x`` [B, C, H, W] and ``y`` int64 [B].

    Attributes:
        epoch: number of the running (or next) epoch, from 0.
        position: batches of this epoch that were handed out.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Augment | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        channels = split.in_shape[0]
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
            raise ValueError(
                f"mean, std: expected 1 or {channels} values each and std above 0, got {tuple(mean)} and {tuple(std)}"
            )
        if drop_last and len(split) < batch_size:
            raise ValueError(f"batch_size: expected at most the {len(split)} samples with drop_last, got {batch_size}")
        self.split = split
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.augment = augment
        self.device = torch.device(device) if device is not None else None
        self.dtype = dtype
        self.channels_last = channels_last
        self.epoch = 0
        self.position = 0
        self._gain = (1.0 / (torch.tensor(std, dtype=torch.float64) * split.scale)).float().view(1, -1, 1, 1)
        ratio = torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        self._offset = ratio.float().view(1, -1, 1, 1)
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch_start = self._generator.get_state()
        self._resume = False
        self._run = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator would do this at its first next(), too late for state_dict() calls before that.
        if self._resume:
            self._resume = False
        elif self.position:
            self.epoch += 1
            self.position = 0
        self._run += 1
        return self._batches(self._run)

    def _batches(self, run: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._check_run(run)
        order = self._order()
        while self.position < len(self):
            start = self.position * self.batch_size
            indices = order[start : start + self.batch_size]
            batch = self._load(indices)
            # Before the yield, so that a state taken while this batch is in use continues with the next one.
            self.position += 1
            yield batch
            self._check_run(run)
        self.epoch += 1
        self.position = 0

    def _check_run(self, run: int) -> None:
        if run != self._run:
            raise RuntimeError("Batches: expected one loop at a time, got a second one; give each its own Batches")

    def _order(self) -> Tensor:
        """Sample indices of this epoch; leaves the generator where the next batch needs it."""
        if self.position == 0:
            self._epoch_start = self._generator.get_state()
        if not self.shuffle:
            return torch.arange(len(self.split))
        if self.position == 0:
            return torch.randperm(len(self.split), generator=self._generator)
        replay = torch.Generator()
        replay.set_state(self._epoch_start)
        return torch.randperm(len(self.split), generator=replay)

    def _load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = self.split.fetch(indices, self.augment, self._generator)
        device = self.device or images.device
        x = images.to(device).to(torch.float32)
        x = x.mul_(self._gain.to(device)) if x is not images else x * self._gain.to(device)
        x = x.sub_(self._offset.to(device)).to(self.dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, self.split.labels[indices].to(device)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the following batches depend on, as ints, bools and tensors."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "generator": self._generator.get_state(),
            "epoch_start": self._epoch_start.clone(),
            "samples": len(self.split),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state belongs to another number of samples, batch size or ordering.
        """
        for key, own in (("samples", len(self.split)), ("batch_size", self.batch_size), ("shuffle", self.shuffle)):
            if state[key] != own:
                raise ValueError(
                    f"Batches state: expected {key} = {own}, got {state[key]}; resume with the data and batch size "
                    "of the saved run"
                )
        self.epoch = int(state["epoch"])
        self.position = int(state["position"])
        self._generator.set_state(state["generator"].cpu())
        self._epoch_start = state["epoch_start"].cpu().clone()
        self._resume = True
        self._run += 1
