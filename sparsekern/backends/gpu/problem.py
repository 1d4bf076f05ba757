"""What a kernel on a GPU is asked to do: all static facts of one pass of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sparsekern.backends import ConvGeometry, precision
from sparsekern.layout import BlockGrid

ITEMSIZE = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}


@dataclass(frozen=True)
class Window:
    """Exact geometry of a convolution.

    Attributes:
        images, height, width: N, H, W of x.
        out: (P, Q).
        kernel: (R, S).
        padding: (top, left); bottom and right follow from ``out``.
    """

    images: int
    height: int
    width: int
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """One call of one op: all static facts.

    Attributes:
        op: "linear_forward", "linear_dgrad", "linear_wgrad" or "block_scores"; for convolutions "conv2d_forward",
            "conv2d_dgrad", "conv2d_wgrad" or "conv2d_block_scores".
        dtype: "bfloat16", "float16", "float32" (IEEE) or "tf32".
        block: (bo, bi).
        m: tokens; output pixels N P Q of a convolution.
        out_features, in_features: O and I; channels of all groups, O and C, of a convolution.
        capacity: block slots of all groups, the static stand-in for nnz.
        taps: R S of the filter.
        groups: of a convolution.
        source: input pixels N H W; 0 for linear.
        stride_area: input pixels per output pixel, the product of both strides.
        window: of a convolution, where its exact geometry is known; tiles of Triton do without.
    """

    op: str
    dtype: str
    block: tuple[int, int]
    m: int
    out_features: int
    in_features: int
    capacity: int
    taps: int = 1
    groups: int = 1
    source: int = 0
    stride_area: int = 1
    window: Window | None = None

    @property
    def kind(self) -> str:
        """ "linear" or "conv2d"."""
        return "conv2d" if self.op.startswith("conv2d") else "linear"

    @property
    def step(self) -> str:
        """ "forward", "dgrad", "wgrad" or "scores": the op without its kind."""
        return self.op.rpartition("_")[2]

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def grid(self) -> tuple[int, int]:
        """(Ob, taps Ib) of one group."""
        bo, bi = self.block
        return -(-self.out_features // self.groups // bo), self.taps * -(-self.in_features // self.groups // bi)

    @property
    def blocks(self) -> int:
        """Of all groups, stored or not."""
        return self.groups * math.prod(self.grid)

    @property
    def density(self) -> float:
        """Stored share of the blocks."""
        return min(self.capacity / self.blocks, 1.0)

    @property
    def edges(self) -> tuple[int, int]:
        """(n, k): block edge along the outputs of the product, block edge along its reduction (forward, dgrad)."""
        bo, bi = self.block
        return (bi, bo) if self.step == "dgrad" else (bo, bi)

    @property
    def walked(self) -> tuple[int, int]:
        """(block rows, block columns) as the op walks the layout, of all groups: of the transpose for dgrad."""
        ob, ib = self.grid
        if self.step == "dgrad":
            ob, ib = ib // self.taps, self.taps * ob
        return self.groups * ob, ib

    @property
    def phases(self) -> int:
        """Sets of output pixels that see different taps: dgrad writes pixels of every remainder by the stride."""
        return self.stride_area if self.step == "dgrad" else 1

    @property
    def outputs(self) -> int:
        """Tokens or pixels that forward or dgrad writes."""
        return self.source if self.kind == "conv2d" and self.step == "dgrad" else self.m

    @property
    def image(self) -> int:
        """Tokens or pixels of x (dx) in device memory: those that some tap reads, and all of dx."""
        if self.kind == "linear":
            return self.m
        return self.source if self.step == "dgrad" else min(self.source, self.m * self.taps)

    @property
    def weight(self) -> int:
        """Elements of the dense weight."""
        return self.out_features * self.in_features // self.groups * self.taps

    @property
    def dense_flops(self) -> float:
        return 2.0 * self.m * self.weight

    @property
    def stored_flops(self) -> float:
        """Of the stored blocks; all of them for block scores, which look at every block."""
        if self.step == "scores":
            return self.dense_flops
        return 2.0 * self.m * self.capacity * self.block[0] * self.block[1]

    def at_density(self, density: float) -> Problem:
        """The same problem with another number of stored blocks, at least one."""
        return replace(self, capacity=max(round(density * self.blocks), 1))


def is_linear(grid: BlockGrid, geometry: ConvGeometry) -> bool:
    """Whether the convolution is a linear layer over its pixels."""
    pointwise = grid.kernel_size == (1, 1) and grid.groups == 1
    return pointwise and geometry.stride == (1, 1) and geometry.padding == (0, 0, 0, 0)


def conv_problem(
    op: str, dtype: str, grid: BlockGrid, geometry: ConvGeometry, x_shape: Sequence[int], capacity: int
) -> Problem:
    """An op of a convolution; the linear one over pixels where the linear kernels run it.

    Args:
        op: "conv2d_forward", "conv2d_dgrad", "conv2d_wgrad" or "conv2d_block_scores".
        dtype: ``Problem.dtype``.
        grid: of the weight [O, C/g, R, S].
        geometry: stride, padding and dilation.
        x_shape: [N, C, H, W].
        capacity: block slots.
    """
    n, c, h, w = x_shape
    p, q = (max(size, 0) for size in geometry.output_size(h, w, grid.kernel_size))
    out_features = grid.weight_shape[0]
    if is_linear(grid, geometry):
        op = "block_scores" if op == "conv2d_block_scores" else op.replace("conv2d", "linear")
        return Problem(op, dtype, grid.block, n * h * w, out_features, c, capacity)
    return Problem(
        op,
        dtype,
        grid.block,
        n * p * q,
        out_features,
        c,
        capacity,
        taps=math.prod(grid.kernel_size),
        groups=grid.groups,
        source=n * h * w,
        stride_area=math.prod(geometry.stride),
        window=Window(n, h, w, (p, q), grid.kernel_size, geometry.stride, geometry.padding[::2], geometry.dilation),
    )


def layer_problem(
    step: str,
    dtype: torch.dtype,
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    x_shape: Sequence[int],
    capacity: int,
) -> Problem:
    """One pass of a layer: ``step`` is "forward", "dgrad", "wgrad" or "block_scores".

    Args:
        dtype: of the tensors; PyTorch's own switches decide about TF32.
        grid: of the weight.
        geometry: of a convolution, None for a linear layer.
        x_shape: [..., I], of which the leading dimensions count, [N, C, H, W] or [C, H, W].
        capacity: block slots.
    """
    if geometry is not None:
        images = x_shape if len(x_shape) == 4 else (1, *x_shape)
        return conv_problem(f"conv2d_{step}", precision(dtype, "conv2d"), grid, geometry, images, capacity)
    op = step if step == "block_scores" else f"linear_{step}"
    out_features, in_features = grid.weight_shape
    return Problem(op, precision(dtype), grid.block, math.prod(x_shape[:-1]), out_features, in_features, capacity)
