"""What a kernel is asked to do and how it is cut, and what that takes of a multiprocessor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsekern.backends import ConvGeometry
from sparsekern.layout import BlockGrid

ITEMSIZE = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}
UNION_WIDTH = 128  # outputs of one "union" program
SCORE_OUTPUTS = 128  # outputs of one "scores" program
SHARED_RESERVE = 4096  # bytes a kernel may need besides its stages (barriers, pipelined indices); assumed
# Registers of a thread besides its accumulators (addresses, operands, indices); assumed for linear. Convolutions hold
# an address and a position per row of pixels: compiled for sm_90, 110 beside 64 accumulators and 120 beside 128.
OTHER_REGISTERS = {"linear": 48, "conv2d": 112}


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
    )


@dataclass(frozen=True)
class Tile:
    """How one program of a kernel is cut.

    Attributes:
        variant: forward and dgrad: "gather" (pointers), "tma" (descriptors, sm_90 and later) or "union" (several block
            rows share each tile of x); wgrad: "panel"; scores: "scores".
        bm: tokens or pixels of one program (forward, dgrad), tokens or pixels per stage (wgrad, scores).
        bk: reduction depth of one stage (forward, dgrad): several blocks or a part of one; 0 where unused.
        panel: union: block rows per program; wgrad: blocks of one block row per program; scores: input features per
            program; else 1.
        ctas: programs of the persistent grid per multiprocessor; 0: one program per tile.
    """

    variant: str
    bm: int
    bk: int
    panel: int
    warps: int
    stages: int
    ctas: int = 0


def precision(dtype: torch.dtype, kind: str = "linear") -> str:
    """``Problem.dtype`` of a torch dtype; float32 is "tf32" where PyTorch's own switch says so.

    Matrix products (``kind`` "linear") and convolutions ("conv2d") have switches of their own, and cuDNN's is on by
    default.
    """
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    cudnn: Any = torch.backends.cudnn
    old: Any = cudnn if kind == "conv2d" else torch.backends.cuda.matmul
    switch = getattr(cudnn, "conv", None) if kind == "conv2d" else old
    # Since torch 2.9 reading allow_tf32 raises once the newer setting was used.
    wish = getattr(switch, "fp32_precision", None)
    return "tf32" if (wish == "tf32" if wish is not None else old.allow_tf32) else "float32"


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


def score_outputs(block: tuple[int, int]) -> int:
    """Output features of one "scores" program: a multiple of bo near :data:`SCORE_OUTPUTS`."""
    return max(SCORE_OUTPUTS // block[0], 1) * block[0]


def stage_elements(problem: Problem, tile: Tile) -> int:
    """Elements of both operands that one stage brings in."""
    bo, bi = problem.block
    n, _ = problem.edges
    if tile.variant == "panel":
        return tile.bm * (tile.panel * bi + bo)
    if tile.variant == "scores":
        return tile.bm * (tile.panel + score_outputs(problem.block))
    return tile.bk * (tile.bm + n * tile.panel)


def accumulators(problem: Problem, tile: Tile) -> int:
    """fp32 accumulators of one program."""
    bo, bi = problem.block
    if tile.variant == "panel":
        return tile.panel * bi * bo
    if tile.variant == "scores":
        return tile.panel * score_outputs(problem.block)
    return tile.bm * problem.edges[0] * tile.panel


def warpgroups(arch: int) -> bool:
    """Whether this architecture multiplies by warpgroup (wgmma, tcgen05), operands read from shared memory."""
    return 90 <= arch < 120


def rows(problem: Problem, tile: Tile) -> int:
    """Extent of the accumulator along the instruction's M side; warpgroups need 64."""
    if tile.variant == "panel":
        return tile.panel * problem.block[1]
    return tile.panel if tile.variant == "scores" else tile.bm


def buffers(problem: Problem, tile: Tile, arch: int | None = None) -> int:
    """Stages that lie in shared memory at a time; without ``arch`` an upper bound.

    As Triton 3.9 compiles the kernels: "union" reads its index inside the loop and spends every second stage on that;
    ``mma.sync``, which takes operands through registers (sm_80, and fewer than 64 rows elsewhere), keeps one less, but
    not where a stage is a single instruction deep.
    """
    count = (tile.stages + 1) // 2 if tile.variant == "union" else tile.stages
    plain = arch is not None and problem.dtype != "float32" and not (warpgroups(arch) and rows(problem, tile) >= 64)
    if plain and not (tile.variant == "union" and tile.bk * problem.itemsize == 32):
        count -= 1
    return max(count, 1)


def shared_bytes(problem: Problem, tile: Tile, arch: int | None = None) -> int:
    """Shared memory of one program: the buffered stages of both operands, and for "tma" the box its outputs leave by.

    Without ``arch`` an upper bound.
    """
    box = tile.bm * problem.edges[0] if tile.variant == "tma" else 0
    held = (buffers(problem, tile, arch) * stage_elements(problem, tile) + box) * problem.itemsize
    # At the end plain fp32 accumulators of a weight gradient are turned into rows of blocks there.
    turned = 4 * accumulators(problem, tile) if (tile.variant, problem.dtype) == ("panel", "float32") else 0
    return max(held, turned)


def accumulator_registers(problem: Problem, tile: Tile) -> float:
    """32-bit accumulator registers of one thread."""
    return accumulators(problem, tile) / (32 * tile.warps)
