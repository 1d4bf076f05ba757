"""What several test files share: layouts at random, float64 references and the error bound."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekern.layout import BlockGrid, BlockLayout

BOUND = 1e-5  # of the same product of absolute values


def random_layout(grid: BlockGrid, density: float, seed: int = 0, spare: int = 0) -> BlockLayout:
    """A layout of Bernoulli blocks, with empty rows and columns as they come."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(grid.blocks, generator=generator) < density
    return BlockLayout.from_block_mask(grid, mask, capacity=int(mask.sum()) + spare)


def assert_within(actual: Tensor, expected: Tensor, magnitude: Tensor, what: str, bound: float = BOUND) -> None:
    """|actual - expected| <= bound * magnitude, everywhere; NaN fails."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected).abs()
    good = error <= bound * magnitude + 1e-30
    if not bool(good.all()):
        worst = int((error - bound * magnitude).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.numel()} off, worst {actual.flatten()[worst].item()} for "
            f"{expected.flatten()[worst].item()} (magnitude {magnitude.flatten()[worst].item()})"
        )


def linear_reference(x: Tensor, w: Tensor, bias: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    """Forward and all gradients of a dense linear layer, leading dimensions flattened in the sums."""
    rows, dys = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return {"y": F.linear(x, w, bias), "dx": dy @ w, "dw": dys.t() @ rows, "dbias": dys.sum(0)}


def conv2d_reference(x: Tensor, w: Tensor, bias: Tensor | None, dy: Tensor, **geometry: object) -> dict[str, Tensor]:
    """Forward and all gradients of a dense convolution."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = F.conv2d(x, w, bias, **geometry)  # type: ignore[arg-type]
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    return {"y": y.detach(), "dx": dx, "dw": dw, "dbias": dy.sum((0, 2, 3))}
