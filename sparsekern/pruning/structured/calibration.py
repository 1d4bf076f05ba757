"""What a layer reads and writes on sample images, at sampled positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.pruning.structured.graph import Group


def inputs_of(batches: Iterable[Any]) -> Iterator[Tensor]:
    """Images of ``batches``, whose items are tensors or start with one."""
    for batch in batches:
        yield batch if isinstance(batch, Tensor) else batch[0]


def consumer_of(model: nn.Module, group: Group) -> nn.Module:
    """The one layer that reads ``group``.

    Raises:
        ValueError: several layers read it, or one that the sampling cannot follow.
    """
    if len(group.consumers) != 1:
        names = ", ".join(c.layer for c in group.consumers)
        raise ValueError(
            f"{group.name}: expected channels read by one layer, to minimise its error, got {len(group.consumers)} "
            f"({names}); exclude it or use another method"
        )
    layer = model.get_submodule(group.consumers[0].layer)
    if isinstance(layer, nn.Conv2d) and (
        layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.dilation != (1, 1)
    ):
        raise ValueError(f"{group.consumers[0].layer}: expected zero padding in numbers and no dilation, got {layer}")
    return layer


def split_weight(layer: nn.Module, channels: int) -> Tensor:
    """Weight of a linear or convolution layer per input channel, a view [out, channels, inputs per channel]."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach().flatten(1).unflatten(1, (channels, -1))


def patches(layer: nn.Module, x: Tensor, channels: int, per_image: int, generator: torch.Generator) -> Tensor:
    """Inputs of ``layer`` at random output positions.

    Args:
        x: [B, C, H, W], [B, ..., in] or [B, in].
        per_image: positions drawn from each image, with replacement; all there are if a layer has fewer.
        generator: on the CPU; the same state draws the same positions.

    Returns:
        float64 [samples, channels, inputs per channel], such that ``einsum("nck,ock->no", patches, split_weight)`` is
        the output at these positions without its bias.
    """
    if isinstance(layer, nn.Conv2d):
        (kh, kw), (sh, sw) = layer.kernel_size, layer.stride
        ph, pw = (int(p) for p in layer.padding)
        x = F.pad(x, (pw, pw, ph, ph))
        windows = x.unfold(2, kh, sh).unfold(3, kw, sw)  # [B, C, H', W', kh, kw], a view
        b, rows, cols = x.shape[0], windows.shape[2], windows.shape[3]
        image, place = _places(b, rows * cols, per_image, generator, x.device)
        taken = windows[image, :, place // cols, place % cols]
        return taken.flatten(2).double()
    tokens = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
    image, place = _places(tokens.shape[0], tokens.shape[1], per_image, generator, x.device)
    return tokens[image, place].unflatten(1, (channels, -1)).double()


def _places(
    images: int, places: int, per_image: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    if places <= per_image:
        place = torch.arange(places).repeat(images)
        image = torch.arange(images).repeat_interleave(places)
    else:
        place = torch.randint(places, (images * per_image,), generator=generator)
        image = torch.arange(images).repeat_interleave(per_image)
    return image.to(device), place.to(device)


@torch.no_grad()
def sample(
    model: nn.Module, group: Group, batches: Iterable[Any], *, per_image: int, samples: int, seed: int
) -> Tensor:
    """Inputs of the layer that reads ``group``, with the model in eval mode; float64 [n, channels, inputs per channel].

    Equal arguments sample equal positions, in a pruned copy of the model too.

    Args:
        batches: images [B, C, H, W], or tuples that start with them, on the model's device.
        per_image: positions drawn from each image.
        samples: stop after this many.

    Raises:
        ValueError: no batches, or a layer that :func:`consumer_of` refuses.
    """
    layer = consumer_of(model, group)
    generator = torch.Generator().manual_seed(seed)
    taken: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        taken.append(patches(layer, args[0], group.channels, per_image, generator))

    handle = layer.register_forward_pre_hook(hook)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for x in inputs_of(batches):
            model(x)
            if sum(t.shape[0] for t in taken) >= samples:
                break
    finally:
        handle.remove()
        for module, training in modes.items():
            module.training = training
    if not taken:
        raise ValueError("batches: expected at least one batch of images, got none")
    return torch.cat(taken)[:samples]
