"""Which Triton tiles there are for a problem.

The shipped tiles are few per op, dtype and block, each for a reason; everything here is derived, nothing measured yet.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.problem import ITEMSIZE, Problem
from sparsekern.backends.triton.tile import (
    SHARED_RESERVE,
    UNION_WIDTH,
    Tile,
    accumulator_registers,
    buffers,
    score_outputs,
    shared_bytes,
    warpgroups,
)

LINEAR_OPS = ("linear_forward", "linear_dgrad", "linear_wgrad", "block_scores")
CONV_OPS = ("conv2d_forward", "conv2d_dgrad", "conv2d_wgrad", "conv2d_block_scores")
OPS = (*LINEAR_OPS, *CONV_OPS)
DTYPES = tuple(ITEMSIZE)
EDGES = (16, 32, 64, 128)
BLOCKS = tuple((bo, bi) for bo in EDGES for bi in EDGES)
MOST_ACCUMULATORS = 128  # registers of one thread; more spill
# Where operands pass through registers as well (mma.sync). With 128, kernels for sm_80 spilled: wgrad 96 bytes, forward
# in tf32 40, with 4 warps 8, dgrad in 16 bits with Triton 3.6 64; forward in 16 bits with 8 warps just fits. On sm_100
# the accumulators lie in memory of their own, but in registers at the end: "gather" and "union" spilled 32 to 1052.
# Convolutions hold addresses per row of pixels as well: with 128, forward and dgrad for sm_80 spilled 272 to 380 bytes,
# and in tf32 for sm_90 508.
PLAIN_ACCUMULATORS = 64
DESCRIPTORS = 90  # the first architecture that loads by descriptor


def candidates(problem: Problem, arch: int) -> tuple[Tile, ...]:
    """Every shipped tile that can run ``problem``; they depend on op, dtype, block, architecture and stride alone."""
    listed = _tiles(problem.op, problem.dtype, problem.block, arch)
    return tuple(tile for tile in listed if tile.variant != "tma" or problem.stride_area == 1)


def shipped(arch: int) -> Iterator[tuple[Problem, Tile]]:
    """Every tile with a problem that uses it, for whoever compiles them all."""
    for op in OPS:
        for dtype in DTYPES:
            for block in BLOCKS:
                problem = Problem(op, dtype, block, 4096, 4096, 4096, 1)
                if op in CONV_OPS:
                    problem = replace(problem, out_features=512, in_features=512, taps=9, source=4096)
                # 3x3 with stride 2 is the harder one to compile: dgrad has phases.
                strided = replace(problem, source=16384, stride_area=4) if op in CONV_OPS else problem
                for tile in candidates(problem, arch):
                    yield (problem if tile.variant == "tma" else strided).at_density(0.1), tile


@functools.lru_cache(maxsize=1024)
def _tiles(op: str, dtype: str, block: tuple[int, int], arch: int) -> tuple[Tile, ...]:
    if op not in OPS or dtype not in DTYPES or block not in BLOCKS:
        return ()
    problem = Problem(op, dtype, block, 1, 1, 1, 1)
    product = _conv_product if problem.kind == "conv2d" else _product
    listed = {"wgrad": _wgrad, "scores": _scores}.get(problem.step, product)(problem)
    fitting = (_fitted(problem, tile, arch) for tile in listed)
    return tuple(dict.fromkeys(tile for tile in fitting if why_not(problem, tile, arch) is None))


def _product(problem: Problem) -> Iterator[Tile]:
    """forward and dgrad. 256 tokens read each weight least often; 128 leave room for two programs per multiprocessor,
    so that one's epilogue hides behind the other; 32 are for few tokens."""
    n, k = problem.edges
    if problem.dtype == "float32":  # plain multiply-adds: operands pass through registers, so small stages
        # Of 64 outputs, 16 deep spilled 32 bytes on sm_80 with Triton 3.6.
        yield Tile("gather", 128, 32, 1, 8, 2) if n == 64 else Tile("gather", 128, 16, 1, 8 if n == 128 else 4, 3)
        yield Tile("gather", 64, 16, 1, 8 if n == 128 else 4, 3)
        return
    depth = 128 // problem.itemsize  # a row of a stage is 128 bytes
    stages = 3 if n == 128 else 4
    yield Tile("gather", 256, depth, 1, 8 if n >= 64 else 4, 4)
    if problem.itemsize == 2 and n <= 64:
        yield _shallow(n, depth)
    yield Tile("gather", 128, depth, 1, 4, stages)
    yield Tile("gather", 32, depth, 1, 4, 4)
    if problem.itemsize == 2 and k >= 32:
        yield from _by_copy_engine(n, k)
    if n <= 32 and k <= 64:  # narrow blocks use a tile of x too little to load it for one block row
        yield Tile("union", 128, k, UNION_WIDTH // n, 4, 7)


def _shallow(n: int, depth: int) -> Tile:
    """Less of a row ahead, so two or three programs fit a multiprocessor. Half as deep, the weights of 16 outputs would
    come 4 bytes at a time."""
    return Tile("gather", 256, depth, 1, 8, 3) if n == 16 else Tile("gather", 256, depth // 2, 1, 8, 4)


def _by_copy_engine(n: int, k: int) -> Iterator[Tile]:
    """A whole grid of programs, and as many as fit at a time going round: which is better waits for a GPU."""
    for ctas in (0, 1):
        yield Tile("tma", 256, min(k, 64), 1, 8, 4, ctas)
    for ctas in (0, 2):
        yield Tile("tma", 128, min(k, 64), 1, 8 if n == 128 else 4, 3 if n == 128 else 4, ctas)


def _conv_product(problem: Problem) -> Iterator[Tile]:
    """forward and dgrad of convolutions: pixels as tokens. Small batches and the last stages of a network have few
    pixels, so 64 of them too."""
    n, k = problem.edges
    if problem.dtype == "float32":  # of 128 outputs, 128 pixels spilled 32 to 160 bytes; of 64, 32 deep, 128
        if n <= 64:
            yield Tile("gather", 128, 16, 1, 8 if n == 64 else 4, 3)
        yield Tile("gather", 64, 16, 1, 8 if n == 128 else 4, 3)
        return
    depth = 128 // problem.itemsize
    stages = 3 if n == 128 else 4
    if problem.itemsize == 2 or n <= 32:  # tf32 by 64 outputs: 8 bytes on sm_80 with Triton 3.6
        yield Tile("gather", 256, depth, 1, 8, 4)
    wide = n == 128 or (n == 64 and problem.dtype == "tf32")  # with 4 warps 32 bytes on sm_80 with Triton 3.6
    yield Tile("gather", 128, depth, 1, 8 if wide else 4, stages)
    yield Tile("gather", 64, depth, 1, 4, 4)
    if problem.itemsize == 2 and n <= 32:
        yield _shallow(n, depth)
    if problem.itemsize == 2 and k >= 32:
        yield from _by_copy_engine(n, k)


def _wgrad(problem: Problem) -> Iterator[Tile]:
    """Wide panels read dy least often; short rows fill narrow ones better."""
    (bo, bi), plain = problem.block, problem.dtype == "float32"
    for width, stages in ((128, 2), (64, 2)) if plain else ((256, 4), (128, 3), (64, 4)):
        if width >= bi:
            bm = 64 if problem.itemsize == 2 else 32
            if plain and (width * bo == 128 * 128 or (problem.kind == "conv2d" and width * bo == 128 * 64)):
                bm = 16  # 32 spilled 100 bytes on sm_80 with Triton 3.6, and 1140 in convolutions
            warps = 8 if plain or (width + 64) * bo > 96 * 128 else 4  # the bias sum takes 64 x bo accumulators
            yield Tile("panel", bm, 0, width // bi, warps, stages)


def _scores(problem: Problem) -> Iterator[Tile]:
    """A dense product: its usual tiles."""
    if problem.dtype == "float32":  # of convolutions, 32 deep spilled 12 to 48 bytes
        yield Tile("scores", 16 if problem.kind == "conv2d" else 32, 0, 128, 8, 2)
        return
    tokens = 128 // problem.itemsize
    yield Tile("scores", tokens, 0, 256, 8, 4)
    yield Tile("scores", tokens, 0, 128, 4, 3)


def _fitted(problem: Problem, tile: Tile, arch: int) -> Tile:
    """With as many stages as the architecture has shared memory for, two buffers at least, and warps enough for its
    registers."""
    if _cramped(problem, tile, arch) and accumulator_registers(problem, tile) > PLAIN_ACCUMULATORS:
        tile = replace(tile, warps=8)
    limit = chips.shared_limit(arch) - SHARED_RESERVE
    while buffers(problem, tile, arch) > 2 and shared_bytes(problem, tile, arch) > limit:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def _cramped(problem: Problem, tile: Tile, arch: int) -> bool:
    """Whether registers hold more than accumulators and addresses."""
    if tile.variant == "gather" and problem.kind == "conv2d" and problem.itemsize == 4:
        return True
    return not warpgroups(arch) or (arch >= 100 and tile.variant in ("gather", "union"))


def why_not(problem: Problem, tile: Tile, arch: int) -> str | None:
    """Why ``tile`` can't run ``problem`` on this architecture, or None."""
    (bo, bi), (n, k) = problem.block, problem.edges
    variants = {"wgrad": ("panel",), "scores": ("scores",)}.get(
        problem.step, ("gather", "tma") if problem.kind == "conv2d" else ("gather", "tma", "union")
    )
    if tile.variant not in variants:
        return f"variant: expected one of {', '.join(variants)}, got {tile.variant}"
    if tile.bm not in (16, 32, 64, 128, 256):
        return f"bm: expected a power of two within 16..256, got {tile.bm}"
    if tile.variant in ("gather", "tma", "union"):
        if problem.kind == "conv2d" and problem.dtype == "tf32" and arch >= 100 and tile.bm == 256:
            return "gather: 256 pixels of TF32 spill up to 40 bytes"
        if tile.bk < 16 or (tile.bk % k and k % tile.bk):
            return f"bk: expected a multiple or a divisor of {k}, 16 and more, got {tile.bk}"
        if tile.variant == "tma":
            if arch < DESCRIPTORS:
                return f"tma: needs sm_{DESCRIPTORS} or later"
            if problem.stride_area > 1:
                return "tma: a box of pixels has stride 1"
            if problem.kind == "conv2d" and arch >= 100 and tile.bm * n == 256 * 128:
                return "tma: 256 pixels by 128 outputs spill 12 to 92 bytes"
            if problem.itemsize != 2 or k < 32 or tile.bk != min(k, 64):  # narrower boxes waste the copy engine
                return "tma: needs a 16-bit dtype, a block edge of 32 or more along the reduction, and bk of up to 64"
        if tile.variant == "union" and (n > 32 or tile.panel != UNION_WIDTH // n or tile.bk != k or k > 64):
            return f"union: needs a block edge of 16 or 32 along the outputs, panel {UNION_WIDTH // n} and bk {k} <= 64"
        if tile.variant != "union" and tile.panel != 1:
            return f"panel: expected 1, got {tile.panel}"
    elif tile.variant == "panel" and not (tile.panel & (tile.panel - 1) == 0 and 16 <= tile.panel * bi <= 256):
        return f"panel: expected a power of two with {bi} x panel <= 256, got {tile.panel}"
    elif problem.op == "conv2d_wgrad" and not warpgroups(arch) and bo == 32 and tile.panel * bi == 256:
        # 24 bytes with 4 warps, 52 with 8; panels of 16 or 64 outputs are as wide and spill nothing.
        return "panel: 256 inputs by 32 outputs spill"
    elif tile.variant == "scores" and (tile.panel % bi or score_outputs(problem.block) % bo):
        return f"panel: expected a multiple of {bi}, got {tile.panel}"
    elif tile.variant == "scores" and arch == 90 and tile.warps == 8 and bi in (32, 64) and problem.dtype != "float32":
        # ptxas says so of what Triton 3.6 makes; how the norms are summed did not matter.
        return "scores: with 8 warps and blocks across several of them, wgmma instructions wait for one another"
    if tile.stages < 1 or tile.warps not in (1, 2, 4, 8, 16):
        return f"expected 1 stage or more and a power of two of warps, got {tile.stages} and {tile.warps}"
    limit = chips.shared_limit(arch) - SHARED_RESERVE
    if (shared := shared_bytes(problem, tile, arch)) > limit:
        return f"shared memory: {shared} bytes, the limit is {limit}"
    registers = accumulator_registers(problem, tile)
    sixteen = problem.itemsize == 2 and (problem.op == "linear_forward" or problem.step == "scores")
    roomy = not _cramped(problem, tile, arch) or (sixteen and not warpgroups(arch))
    most = MOST_ACCUMULATORS if roomy else PLAIN_ACCUMULATORS
    if registers > most:
        return f"registers: {registers:.0f} accumulators per thread, the limit is {most}"
    return None
