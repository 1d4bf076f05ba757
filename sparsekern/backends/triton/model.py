"""What a call takes by the limits of the chip: multiply-adds, L2 to shared memory, device memory, latencies.

Letters: n and k are the block's edges along the outputs and along the reduction (forward: bo, bi; dgrad: bi, bo), R the
block rows and C the block columns as the op walks the layout, d the density, s bytes per element.

A tile of x that a random mask fetches serves only the outputs of the block rows of that program. Traffic from L2
(bytes) and multiply-adds (FLOP) of a call are therefore

- "gather", "tma": L2 = ceil(M/bm) nnz (bm k + n k) s, FLOP = 2 ceil(M/bm) bm nnz' n k. With p = bk/k blocks per stage
  rows are filled up to whole stages, nnz' = nnz + R (p-1)/2; what fills up is masked and costs no traffic.
- "union" of P block rows: a column is loaded if any of them needs it, u = 1-(1-d)^P of all columns:
  L2 = ceil(M/bm) ceil(R/P) C (u bm k + P d n k) s, FLOP = 2 ceil(M/bm) bm ceil(R/P) C u P n k: absent blocks are
  multiplied as zeros.
- wgrad, panels of P blocks of one block row: a row of r blocks is cut into ceil(r/P), on average
  panels = nnz/P + Ob (P-1)/(2 P). L2 = M (nnz bi + panels bo) s, FLOP = 2 M panels P bi bo: absent slots of a panel
  are multiplied as zeros. With S > 1 token chunks partial sums in fp32 are written and read once, 8 S nnz bo bi bytes,
  by one more launch.
- scores, F outputs by P inputs per program: L2 = M ceil(O/F) ceil(I/P) (F + P) s, FLOP of the dense product.

Device memory sees every activation, value and result once: (M I + M O + nnz bo bi) s. That L2 may hold some of it from
the operation before is left out.

Convolutions are the same products over pixels: M output pixels, one block column per tap and block of channels, R and C
over all groups. What differs:

- each stored block loads its own shifted tile of the image from L2; that the taps of one block overlap, so that L1 or
  one load could serve several, is not modelled, nor that tiles are cut off at the image's border. Device memory sees x,
  or those of its pixels that some tap reads, and y once, whatever the number of taps.
- dgrad of a convolution with strides writes each of its F = stride area phases by programs of their own, M' = N H W / F
  pixels each. A phase walks all entries of a row and masks those whose tap it lacks; every tap belongs to one phase.
  So L2 = ceil(M'/bm) nnz (bm k + F n k) s and FLOP = 2 F ceil(M'/bm) bm nnz' n k, F times those stored.
- the dense op is cuDNN at ``Chip.conv_share`` of the rate of cuBLAS; groups cost it nothing here, so that a kernel is
  not chosen too early. Other memory formats are converted by both.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.dense_model import activation_bytes, ideal_seconds
from sparsekern.backends.gpu.problem import Problem
from sparsekern.backends.triton.tile import (
    OTHER_REGISTERS,
    Tile,
    accumulator_registers,
    buffers,
    score_outputs,
    shared_bytes,
)

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
WORKSPACE = 256 * 2**20  # bytes of partial sums at most


@dataclass(frozen=True)
class Work:
    """What one call moves and multiplies.

    Attributes:
        programs: of the main kernel.
        stages: pipeline stages that one program goes through.
        flops: multiply-adds issued, zeros included.
        width: outputs of one multiply instruction along its narrow side.
        l2_bytes: from L2 to shared memory.
        hbm_bytes: device memory, everything once.
        workspace: bytes of partial sums, written and read once more.
    """

    programs: float
    stages: float
    flops: float
    width: int
    l2_bytes: float
    hbm_bytes: float
    workspace: float = 0.0


@dataclass(frozen=True)
class Roofline:
    """Seconds that each limit alone allows, with the chip full and no latency."""

    mma: float
    l2: float
    hbm: float

    @property
    def seconds(self) -> float:
        return max(self.mma, self.l2, self.hbm)


def work(problem: Problem, tile: Tile, splits: int = 1) -> Work:
    """Formulas of the module; ``splits`` are the token chunks of wgrad. Without tokens or blocks it counts one."""
    if problem.m < 1 or problem.capacity < 1:
        problem = replace(
            problem, m=max(problem.m, 1), capacity=max(problem.capacity, 1), source=max(problem.source, 1)
        )
    p, s, (bo, bi) = problem, problem.itemsize, problem.block
    nnz, area = p.capacity, bo * bi
    hbm = activation_bytes(p) + nnz * area * s
    if tile.variant == "scores":
        outputs = score_outputs(p.block)
        programs = math.ceil(p.out_features / p.groups / outputs) * math.ceil(p.in_features / p.groups / tile.panel)
        programs *= p.taps * p.groups
        return Work(
            programs=programs,
            stages=math.ceil(p.m / tile.bm),
            flops=2.0 * p.m * programs * outputs * tile.panel,
            width=min(outputs, tile.panel),
            l2_bytes=float(p.m * programs * (outputs + tile.panel) * s),
            hbm_bytes=activation_bytes(p) + p.blocks * 4.0,
        )
    if tile.variant == "panel":
        panels = _panels(p, tile.panel)
        return Work(
            programs=panels * splits,
            stages=math.ceil(p.m / splits / tile.bm),
            flops=2.0 * p.m * panels * tile.panel * area,
            width=bo,
            l2_bytes=p.m * (nnz * bi + panels * bo) * s,
            hbm_bytes=hbm,
            workspace=4.0 * splits * nnz * area if splits > 1 else 0.0,
        )
    (n, k), (rows, columns), steps = p.edges, p.walked, math.ceil(p.outputs / p.phases / tile.bm)
    if tile.variant == "union":
        groups = math.ceil(rows / tile.panel)
        union = 1.0 - (1.0 - p.density) ** tile.panel
        return Work(
            programs=groups * steps,
            stages=columns * union * k / tile.bk,
            flops=2.0 * steps * tile.bm * groups * columns * union * tile.panel * area,
            width=n * tile.panel,
            l2_bytes=steps * (groups * columns * union * tile.bm * k + nnz * area) * s,
            hbm_bytes=hbm,
        )
    packed = max(tile.bk // k, 1)
    filled = nnz if packed == 1 else nnz + rows * (packed - 1) / 2
    return Work(
        programs=rows * steps * p.phases,
        stages=filled / rows * k / tile.bk,
        flops=2.0 * steps * p.phases * tile.bm * filled * area,
        width=n,
        l2_bytes=float(steps * nnz * (tile.bm + p.phases * n) * k * s),
        hbm_bytes=hbm,
    )


def _panels(problem: Problem, panel: int) -> float:
    """Expected panels of all block rows; exact where every block is stored."""
    (ob, ib), groups = problem.grid, problem.groups
    if problem.capacity >= problem.blocks:
        return float(groups * ob * math.ceil(ib / panel))
    return problem.capacity / panel + min(groups * ob, problem.capacity) * (panel - 1) / (2 * panel)


def narrow(width: int, dtype: str) -> float:
    """Share of the tensor cores' rate with ``width`` outputs: a 64 x width x 16 product takes width/2 clocks and its
    operands 16 + width/4 clocks of shared memory. Plain fp32 does not use them."""
    return 1.0 if dtype == "float32" else min(2.0 * width / (64.0 + width), 1.0)


def roofline(problem: Problem, tile: Tile, chip: Chip) -> Roofline:
    """The three limits of a call; multiply-adds at the rate of cuBLAS, without ``Chip.kernel_rate``."""
    w = work(problem, tile)
    return Roofline(
        mma=w.flops / (chip.rate(problem.dtype) * narrow(w.width, problem.dtype)),
        l2=w.l2_bytes / chip.l2_bandwidth,
        hbm=w.hbm_bytes / chip.hbm_bandwidth,
    )


def resident(problem: Problem, tile: Tile, chip: Chip) -> int:
    """Programs of this tile that one multiprocessor holds at a time, at least 1."""
    threads = 32 * tile.warps
    registers = min(accumulator_registers(problem, tile) + OTHER_REGISTERS[problem.kind], 255) * threads
    shared = shared_bytes(problem, tile, chip.arch) + 1024  # the driver's own per program
    fits = min(chip.shared_per_sm // shared, int(chip.registers // registers), chip.threads // threads)
    return max(min(fits, tile.ctas) if tile.ctas else fits, 1)


def seconds(problem: Problem, tile: Tile, chip: Chip, splits: int | None = None) -> float:
    """Predicted time of one call.

    The fullest multiprocessor runs q = ceil(programs / SMs) programs, c of them at a time. Time is the launch, plus
    the largest of: q programs' multiply-adds; L2 traffic over the whole chip, or q programs' share of it through one
    multiprocessor's port; device memory; q/c times stages waiting for their data, all buffers but one in flight;
    plus q/c times the prologue and epilogue. wgrad adds the partial sums, and one launch for them.
    """
    if splits is None:
        splits = _splits(problem, tile, chip) if tile.variant == "panel" else 1
    w = work(problem, tile, splits)
    queue = math.ceil(w.programs / chip.sms)
    held = min(resident(problem, tile, chip), queue)
    rate = chip.rate(problem.dtype) * chip.share(problem.dtype) * narrow(w.width, problem.dtype) / chip.sms
    total = chip.launch + queue / held * chip.program_latency
    total += max(
        queue * w.flops / w.programs / rate,
        w.l2_bytes / chip.l2_bandwidth,
        queue * w.l2_bytes / w.programs / (chip.l2_port * chip.clock),
        w.hbm_bytes / chip.hbm_bandwidth,
        queue / held * w.stages * chip.stage_latency / max(buffers(problem, tile, chip.arch) - 1, 1),
    )
    if w.workspace:
        bandwidth = chip.l2_bandwidth if w.workspace < chip.l2_bytes / 2 else chip.hbm_bandwidth
        total += chip.launch + 2 * w.workspace / bandwidth
    return total


@functools.lru_cache(maxsize=4096)
def _splits(problem: Problem, tile: Tile, chip: Chip) -> int:
    partial = 4 * problem.capacity * math.prod(problem.block)
    most = max(problem.m // (2 * tile.stages * tile.bm), 1)  # a chunk worth its prologue
    options = [s for s in SPLITS if s == 1 or (s <= most and s * partial <= WORKSPACE)]
    return min(options, key=lambda s: seconds(problem, tile, chip, s))


def splits(problem: Problem, tile: Tile, chip: Chip) -> int:
    """Token chunks of wgrad: the number whose predicted time is least; 1 for every other op."""
    return _splits(problem, tile, chip) if tile.variant == "panel" else 1


def efficiency(problem: Problem, tile: Tile, chip: Chip) -> float:
    """Ideal time over predicted time, within (0, 1]."""
    return ideal_seconds(problem, chip) / seconds(problem, tile, chip)
