"""How a Triton kernel is cut, and what that takes of a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass

from sparsekern.backends.gpu.problem import Problem

UNION_WIDTH = 128  # outputs of one "union" program
SCORE_OUTPUTS = 128  # outputs of one "scores" program
SHARED_RESERVE = 4096  # bytes a kernel may need besides its stages (barriers, pipelined indices); assumed
# Registers of a thread besides its accumulators (addresses, operands, indices); assumed for linear. Convolutions hold
# an address and a position per row of pixels: compiled for sm_90, 110 beside 64 accumulators and 120 beside 128.
OTHER_REGISTERS = {"linear": 48, "conv2d": 112}


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

    def __str__(self) -> str:
        cut = f"{self.bm}x{self.bk}" if self.bk else f"{self.bm}, panel {self.panel}"
        more = f", {self.ctas} programs per multiprocessor" if self.ctas else ""
        return f"{self.variant} tile {cut}, {self.warps} warps, {self.stages} stages{more}"


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
