"""Which channels and blocks of a network are left: a JSON-able record, and its replay on a network built anew."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsekern.pruning.structured.blocks import drop_block_

FORMAT = 1
OUT, IN = "out", "in"
SLICED = (nn.Linear, nn.Conv2d, _BatchNorm)


@dataclass
class Kept:
    """What is left of one axis of a layer: ``kept`` of ``of`` channels, ascending."""

    kept: list[int]
    of: int

    def then(self, later: Kept) -> Kept:
        """The channels that are left after ``later``, which counts from what is left here."""
        if later.of != len(self.kept):
            raise ValueError(f"channels: expected a record of {len(self.kept)} channels, got one of {later.of}")
        return Kept([self.kept[i] for i in later.kept], self.of)


@dataclass
class Channels:
    """A pruned architecture, relative to the network that it came from.

    Attributes:
        layers: ``{layer: {"out": Kept, "in": Kept}}`` of every linear, convolution and batch-norm layer that lost
            channels; norms have ``out`` only.
        blocks: residual blocks of which only the shortcut is left.
        about: how it was made, such as method and target; informative only.
    """

    layers: dict[str, dict[str, Kept]] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def remove(self, layer: str, axis: str, removed: list[int], of: int) -> None:
        """Note that ``removed`` of the ``of`` channels that ``layer`` had until now are gone."""
        gone = set(removed)
        axes = self.layers.setdefault(layer, {})
        now = Kept([i for i in range(of) if i not in gone], of)
        axes[axis] = axes[axis].then(now) if axis in axes else now

    def then(self, later: Channels) -> Channels:
        """This record followed by one that was made on its network.

        Raises:
            ValueError: ``later`` counts other channels than are left here.
        """
        layers = {name: dict(axes) for name, axes in self.layers.items()}
        for name, axes in later.layers.items():
            own = layers.setdefault(name, {})
            for axis, kept in axes.items():
                own[axis] = own[axis].then(kept) if axis in own else kept
        blocks = [*self.blocks, *(b for b in later.blocks if b not in self.blocks)]
        return Channels(layers, blocks, dict(later.about))

    def widths(self) -> dict[str, int]:
        """Output channels left, ``{layer: n}``."""
        return {name: len(axes[OUT].kept) for name, axes in self.layers.items() if OUT in axes}

    def to_dict(self) -> dict[str, Any]:
        """Plain containers; :meth:`from_dict` is the inverse."""
        layers = {
            name: {axis: {"kept": list(k.kept), "of": k.of} for axis, k in axes.items()}
            for name, axes in self.layers.items()
        }
        return {"format": FORMAT, "about": self.about, "blocks": list(self.blocks), "layers": layers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "channels") -> Channels:
        """Check and read ``values``; ``ValueError`` names ``source`` and what is wrong."""
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"{source}: expected channels of format {FORMAT}, got {found}")
        try:
            layers = {
                str(name): {str(axis): _kept(k, f"{source}: {name}") for axis, k in axes.items()}
                for name, axes in values["layers"].items()
            }
            blocks = [str(block) for block in values["blocks"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source}: not a record of channels ({error!r})") from None
        return cls(layers, blocks, dict(values.get("about") or {}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to ``path``."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Channels:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or not a record of channels.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{os.fspath(path)}: not valid JSON ({error})") from None
        return cls.from_dict(values, source=os.fspath(path))


def _kept(values: Mapping[str, Any], source: str) -> Kept:
    kept, of = [int(i) for i in values["kept"]], int(values["of"])
    if not kept or any(b <= a for a, b in itertools.pairwise(kept)) or kept[0] < 0 or kept[-1] >= of:
        raise ValueError(f"{source}: expected ascending channels within 0..{of - 1}, got {str(kept)[:60]}")
    return Kept(kept, of)


def replay_(
    model: nn.Module, channels: Channels | Mapping[str, Any] | str | os.PathLike[str], *, fresh: bool = True
) -> nn.Module:
    """Give a network built anew the architecture of a pruned one; in place, without Torch-Pruning.

    Args:
        model: the dense network that the record was made from, on any device (meta too).
        channels: a :class:`Channels`, its dictionary, or the path of its JSON file.
        fresh: the weights are initial ones, drawn for the large fan-in: scale them to the fan-in that is left, which
            gives the distribution of a network built small (Kaiming, LeCun). False keeps the weights of what is left
            as they are, for a trained network.

    Returns:
        ``model``.

    Raises:
        ValueError: the record is damaged or of another network.
    """
    if isinstance(channels, (str, os.PathLike)):
        channels = Channels.load(channels)
    elif not isinstance(channels, Channels):
        channels = Channels.from_dict(channels)
    for block in channels.blocks:
        drop_block_(model, block)
    modules = dict(model.named_modules())
    chosen: list[tuple[nn.Module, dict[str, Kept]]] = []
    for name, axes in channels.layers.items():
        module = modules.get(name)
        if module is None and any(name.startswith(f"{block}.") for block in channels.blocks):
            continue  # pruned first, then dropped with its block
        if module is None:
            raise ValueError(f"channels: the model has no layer {name!r}; they were made for another model")
        for axis, kept in axes.items():
            if (size := axis_size(module, axis)) != kept.of:
                raise ValueError(
                    f"channels: {name} has {size} {axis} channels, expected {kept.of}: they were made for another "
                    "model, width or number of classes"
                )
        chosen.append((module, axes))
    # All checked: a record that does not fit leaves the layers as they were.
    for module, axes in chosen:
        for axis, kept in axes.items():
            slice_(module, axis, kept.kept)
            if fresh and axis == IN:
                with torch.no_grad():
                    module.weight.mul_(math.sqrt(kept.of / len(kept.kept)))  # type: ignore[operator, union-attr]
    return model


def axis_size(module: nn.Module, axis: str) -> int:
    """Channels of ``module`` along ``axis``; ``ValueError`` for a layer that has no such axis."""
    if isinstance(module, _BatchNorm):
        name = {OUT: "num_features"}.get(axis)
    elif isinstance(module, nn.Linear):
        name = {OUT: "out_features", IN: "in_features"}.get(axis)
    elif isinstance(module, nn.Conv2d) and module.groups == 1:
        name = {OUT: "out_channels", IN: "in_channels"}.get(axis)
    else:
        name = None
    if name is None:
        raise ValueError(
            f"channels: expected Linear, Conv2d without groups or a batch norm, got {type(module).__name__} ({axis})"
        )
    return int(getattr(module, name))


@torch.no_grad()
def slice_(module: nn.Module, axis: str, kept: list[int]) -> None:
    """Keep only the channels ``kept`` of ``module`` along ``axis``: new, smaller parameters and buffers."""
    before = axis_size(module, axis)
    dim = 1 if axis == IN else 0
    tensors: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, old in tensors:
        if old.dim() <= dim or old.shape[dim] != before:
            continue  # the bias of an input axis, num_batches_tracked
        new = old.index_select(dim, torch.tensor(kept, device=old.device))
        if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
            new = new.contiguous(memory_format=torch.channels_last)
        setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    sizes = {"out": ("out_features", "out_channels", "num_features"), "in": ("in_features", "in_channels")}[axis]
    for name in sizes:
        if hasattr(module, name):
            setattr(module, name, len(kept))
