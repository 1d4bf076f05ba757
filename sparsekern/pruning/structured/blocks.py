"""Residual blocks: where they are, and what is left of one whose residual branch goes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.models.cifar_resnet import Block
from sparsekern.models.resnet import BasicBlock, Bottleneck
from sparsekern.models.wide_resnet import PreActBlock

POST_ACTIVATION = (Block, BasicBlock, Bottleneck)
BLOCKS = (*POST_ACTIVATION, PreActBlock)


class ShortcutOnly(nn.Module):
    """A residual block without its residual branch, where the shortcut is a layer; names stay those of the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.pre_activation = isinstance(block, PreActBlock)
        if isinstance(block, PreActBlock):
            self.bn1 = block.bn1
        self.shortcut: nn.Module = block.shortcut  # type: ignore[assignment]
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_activation:
            x = F.relu(self.bn1(x), inplace=True)
        x = self.shortcut(x)
        return x if self.pre_activation else F.relu(x, inplace=True)


def residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Residual blocks of ``model`` by name, in the order of ``named_modules()``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BLOCKS)}


def has_identity_shortcut(block: nn.Module) -> bool:
    """Whether the input of ``block`` is added to its output as it is."""
    shortcut = getattr(block, "shortcut", None)
    return shortcut is None or (isinstance(shortcut, nn.Sequential) and len(shortcut) == 0)


def last_layer(block: nn.Module) -> nn.Module:
    """The layer whose output a block adds to its shortcut."""
    name = "conv2" if isinstance(block, PreActBlock) else "bn3" if isinstance(block, Bottleneck) else "bn2"
    return block.get_submodule(name)


def drop_block_(model: nn.Module, name: str) -> None:
    """Replace the residual block ``name`` by its shortcut, in place.

    An identity shortcut becomes ``nn.Identity``: the input of a post-activation block is not negative, so the ReLU
    after the addition changes nothing.

    Raises:
        ValueError: no residual block of that name.
    """
    blocks = residual_blocks(model)
    if name not in blocks:
        raise ValueError(f"blocks: expected one of {', '.join(blocks) or 'none (no residual block)'}, got {name!r}")
    block = blocks[name]
    left: nn.Module = nn.Identity() if has_identity_shortcut(block) else ShortcutOnly(block)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, left)
