"""What a kernel is asked to do and how it is cut, and what that takes of a multiprocessor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

ITEMSIZE = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}
UNION_WIDTH = 128  # outputs of one "union" program
SCORE_OUTPUTS = 128  # outputs of one "scores" program
SHARED_RESERVE = 4096  # bytes a kernel may need besides its stages (barriers, pipelined indices); assumed
# Registers of a thread besides its accumulators (addresses, operands, indices); assumed.
OTHER_REGISTERS = 48


@dataclass(frozen=True)
class Problem:
    """One call of one op: all static facts.

    Attributes:
        op: "linear_forward", "linear_dgrad", "linear_wgrad" or "block_scores".
        dtype: "bfloat16", "float16", "float32" (IEEE) or "tf32".
        block: (bo, bi).
        m: tokens.
        capacity: block slots, the static stand-in for nnz.
    """

    op: str
    dtype: str
    block: tuple[int, int]
    m: int
    out_features: int
    in_features: int
    capacity: int

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def grid(self) -> tuple[int, int]:
        """(Ob, Ib)."""
        return -(-self.out_features // self.block[0]), -(-self.in_features // self.block[1])

    @property
    def density(self) -> float:
        """Stored share of the blocks."""
        ob, ib = self.grid
        return min(self.capacity / (ob * ib), 1.0)

    @property
    def edges(self) -> tuple[int, int]:
        """(n, k): block edge along the outputs of the product, block edge along its reduction (forward, dgrad)."""
        bo, bi = self.block
        return (bi, bo) if self.op == "linear_dgrad" else (bo, bi)

    @property
    def walked(self) -> tuple[int, int]:
        """(block rows, block columns) as the op walks the layout: of the transpose for dgrad."""
        ob, ib = self.grid
        return (ib, ob) if self.op == "linear_dgrad" else (ob, ib)

    @property
    def dense_flops(self) -> float:
        return 2.0 * self.m * self.out_features * self.in_features

    @property
    def stored_flops(self) -> float:
        """Of the stored blocks; all of them for "block_scores", which looks at every block."""
        if self.op == "block_scores":
            return self.dense_flops
        return 2.0 * self.m * self.capacity * self.block[0] * self.block[1]

    def at_density(self, density: float) -> Problem:
        """The same problem with another number of stored blocks, at least one."""
        return replace(self, capacity=max(round(density * math.prod(self.grid)), 1))


@dataclass(frozen=True)
class Tile:
    """How one program of a kernel is cut.

    Attributes:
        variant: forward and dgrad: "gather" (pointers), "tma" (descriptors, sm_90 and later) or "union" (several block
            rows share each tile of x); wgrad: "panel"; scores: "scores".
        bm: tokens of one program (forward, dgrad), tokens per stage (wgrad, scores).
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


def precision(dtype: torch.dtype) -> str:
    """``Problem.dtype`` of a torch dtype; float32 is "tf32" where torch's own CUDA matmuls would use it."""
    if dtype == torch.float32:
        matmul = torch.backends.cuda.matmul
        # Since torch 2.9 reading allow_tf32 raises once the newer setting was used.
        wish = getattr(matmul, "fp32_precision", None)
        return "tf32" if (wish == "tf32" if wish is not None else matmul.allow_tf32) else "float32"
    return str(dtype).removeprefix("torch.")


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
