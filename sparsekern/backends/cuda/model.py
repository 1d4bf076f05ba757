"""What a call of a CUDA kernel takes by the limits of the chip, and the table of predictions.

Nothing here was measured: ``Chip`` says of every figure where it comes from, and those of the kernels are assumed.

Letters: n and k are the block's edges along the outputs and along the reduction (forward: bo, bi; dgrad: bi, bo), s
bytes per element, e = 32 / s the depth of one multiply instruction (a step is 32 bytes of each row), F the phases of
pixels (dgrad of a strided convolution), T tiles of all phases, G groups, B = bm pixels of a tile, d the density, nnz
the stored blocks of all groups. A tile meets only the taps that exist in its phase, nnz / F blocks and C / F columns
on average.

Products. ``mma.sync`` runs at ``Chip.mma_sync`` of the rate of cuBLAS (all of it on sm_80; on sm_90 and later cuBLAS
uses the faster wgmma and tcgen05, which these kernels don't). Absent blocks are never multiplied; pixels that fill up
a tile are: FLOP = 2 T B (nnz / F) n k, wgrad with T tiles of B pixels 2 T B nnz n k.

Shared memory, 128 bytes per clock and multiprocessor, reads and writes together:

- stationary, units of NB outputs (16 for edge 16, else 32): per step B 32 bytes of activations and NB 32 of weights
  for B NB e multiply-adds, the weights written once more. Steps = T (nnz / F) (n / NB) (k / e). The activations are
  written once: T S G times the box with halo, S splits.
- streamed, P block rows of a panel (128 / n for edges 16 and 32, else 1), W warps: activations are written once for
  each column that some row of the panel has, u = 1 - (1-d)^P of all C columns, and read once by the warp that owns
  them: 2 T R/P (C / F) u B k s. Every warp reads each stored block: T (nnz / F) n k s (W + 1).
- wgrad, pieces of p x q (edges, 32 at most): per piece and e pixels q 32 bytes of x, and p 32 bytes of dy wherever the
  block row changes, taken as every second piece. Tiles of dy and x are written once per window and pass.

L2 to shared memory: what is written above, but for the rounding to 16 bytes.

- stationary: (T (nnz / F) n k + T S G box C_group) s. Weights once per tile whatever the block: 2 B FLOP per byte.
- streamed: T (R/P C u B k + nnz n k) s / F.
- wgrad: per window and pass M' rows bo + (M' box / B) cols bi elements, M' the pixels of all tiles.

A window of wgrad stores K blocks, a Poisson number by the model; more than fit the accumulators cost another pass over
the pixels: E[passes]. Its splits write and read partial sums once more, 8 S nnz bo bi bytes, by one more launch.

Issue: a multiprocessor starts 4 instructions per clock. A step of a warp is its multiplies, its ldmatrix (tf32: four
times as many loads where the operand is transposed) and ``Chip.step_instructions`` besides.

Latency: a warp's own steps come one after another, ``Chip.step_latency`` each.

Device memory sees every activation, value and result once.

Time = launch + waves x prologue + the largest of these limits, each for the fullest multiprocessor: q = ceil(blocks /
SMs) blocks, c of them at a time. A block alone on its multiprocessor loads its stationary tile with nothing to hide
behind.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from sparsekern.backends.cuda import plans
from sparsekern.backends.cuda.plan import Plan
from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.dense_model import activation_bytes
from sparsekern.backends.gpu.problem import Problem

ISSUED_PER_CLOCK = 4  # instructions, by the four schedulers of a multiprocessor
LIMITS = ("mma", "shared", "l2", "hbm", "issue", "latency")


@dataclass(frozen=True)
class Work:
    """What one call moves and multiplies, all blocks (CTAs) together.

    Attributes:
        blocks: CTAs of the main kernel.
        flops: multiply-adds issued.
        shared_bytes: reads and writes of shared memory.
        l2_bytes: from L2 to shared memory.
        hbm_bytes: device memory, everything once.
        instructions: of all warps.
        steps: of the warp with the most, one after another, in one block.
        tile_bytes: loaded by a block before its first product.
        workspace: bytes of partial sums, written and read once more.
        share: of the time of their products that the warps of the fullest block have work on average.
    """

    blocks: float
    flops: float
    shared_bytes: float
    l2_bytes: float
    hbm_bytes: float
    instructions: float
    steps: float
    tile_bytes: float = 0.0
    workspace: float = 0.0
    share: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """Seconds of one call, and those that each limit alone allows.

    Attributes:
        limits: by name, of :data:`LIMITS`.
    """

    seconds: float
    limits: dict[str, float]

    @property
    def bound(self) -> str:
        """The limit that holds, or "launch" where none takes half of the time."""
        name = max(self.limits, key=self.limits.__getitem__)
        return name if 2 * self.limits[name] >= self.seconds else "launch"


def _filled(problem: Problem) -> Problem:
    """Without tokens or blocks it counts one."""
    window = problem.window
    if window is not None and window.images < 1:
        window = replace(window, images=1)
    source = max(problem.source, 1) if window else problem.source
    return replace(problem, m=max(problem.m, 1), capacity=max(problem.capacity, 1), source=source, window=window)


@functools.lru_cache(maxsize=4096)
def work(problem: Problem, plan: Plan) -> Work:
    """Formulas of the module."""
    if problem.m < 1 or problem.capacity < 1:
        problem = _filled(problem)
    return {"stationary": _stationary, "streamed": _streamed, "wgrad": _wgrad}[plan.family](problem, plan)


def _phases(problem: Problem) -> int:
    window = plans.window_of(problem)
    assert window is not None
    down, across = plans.axes(window, problem.step == "dgrad")
    return down.phases * across.phases


def _loads(problem: Problem, rows: float, transposed: bool) -> float:
    """Load instructions of an operand of ``rows`` x 32 bytes: ldmatrix takes 16 rows; TF32 has no transposing one."""
    return rows / 16 * (4 if transposed and problem.itemsize == 4 else 1)


def _stationary(problem: Problem, plan: Plan) -> Work:
    (n, k), s, nb = problem.edges, problem.itemsize, plans.unit(problem)
    tiles, phases, groups = plans.tiles_of(problem, plan.tile), _phases(problem), problem.groups
    depth, nnz = plans.STEP_BYTES // s, problem.capacity / phases
    steps = tiles * nnz * (n // nb) * (k / depth)
    channels = -(-(problem.out_features if problem.step == "dgrad" else problem.in_features) // groups)
    box = plans.pixels_of_box(problem, plan.tile) * channels * s
    weights, activations = tiles * nnz * n * k * s, float(tiles * plan.splits * groups * box)
    units = problem.walked[0] // groups * (n // nb)
    workers = plan.warps * plan.splits
    per_step = plan.bm / 16 * nb / 8 + _loads(problem, plan.bm, False) + _loads(problem, nb, problem.step == "dgrad")
    return Work(
        blocks=float(tiles * plan.splits * groups),
        flops=2.0 * steps * plan.bm * nb * depth,
        shared_bytes=steps * (plan.bm + nb) * plans.STEP_BYTES + weights + activations,
        l2_bytes=weights + activations,
        hbm_bytes=activation_bytes(problem) + problem.capacity * n * k * s,
        instructions=steps * per_step,
        steps=steps / (tiles * groups) / units * math.ceil(units / workers),
        tile_bytes=float(box),
        share=units / workers / math.ceil(units / workers),
    )


def _streamed(problem: Problem, plan: Plan) -> Work:
    (n, k), s, phases, (rows, columns) = problem.edges, problem.itemsize, _phases(problem), problem.walked
    tiles, panel, groups = plans.tiles_of(problem, plan.tile), plans.panel_rows(problem), problem.groups
    nnz, present = problem.capacity / phases, columns / phases * (1.0 - (1.0 - problem.density) ** panel)
    panels = groups * math.ceil(rows / groups / panel)
    depth = plans.STEP_BYTES // s
    activations = tiles * panels * present * plan.bm * k * s
    weights = float(tiles * nnz * n * k * s)
    steps = tiles * plan.warps * nnz * (k / depth)  # of 32 pixels x n outputs
    transposed = problem.step == "dgrad"
    loads = tiles * plan.warps * panels * present * (k / depth) * _loads(problem, 32, False)
    return Work(
        blocks=float(tiles * panels),
        flops=2.0 * steps * 32 * n * depth,
        shared_bytes=2 * activations + weights * (plan.warps + 1),
        l2_bytes=activations + weights,
        hbm_bytes=activation_bytes(problem) + problem.capacity * n * k * s,
        instructions=steps * (2 * n / 8 + _loads(problem, n, transposed)) + loads,
        steps=nnz / panels * (k / depth),
    )


def expected_passes(mean: float, room: float) -> float:
    """E[max(1, ceil(K / room))] of a Poisson number K of blocks; by the normal law where they are many."""
    if mean > 200:
        return max(1.0, math.ceil((mean + math.sqrt(mean)) / room))
    probability, expected, count = math.exp(-mean), 0.0, 0
    rest = 1.0
    while rest > 1e-9 and count < 2000:
        expected += probability * max(1, math.ceil(count / room))
        rest -= probability
        count += 1
        probability *= mean / count
    return expected


def _wgrad(problem: Problem, plan: Plan) -> Work:
    (bo, bi), s, nnz = problem.block, problem.itemsize, problem.capacity
    tiles, pixels = plans.tiles_of(problem, plan.tile), plan.bm
    windows = plans.wgrad_windows(problem, plan)
    mean = nnz / windows
    passes = expected_passes(mean, plan.warps * plans.WARP_ACCUMULATORS / (bo * bi))
    piece_o, piece_i = min(bo, 32), min(bi, 32)
    pieces, depth = nnz * (bo // piece_o) * (bi // piece_i), plans.STEP_BYTES // s
    steps = tiles * pixels / depth * pieces
    row_share = 0.5
    loaded = pixels * plan.rows * bo + plans.wgrad_box(problem, plan) * plan.cols * bi
    moved = tiles * windows * passes * loaded * s
    per_step = piece_o / 16 * piece_i / 8 + _loads(problem, piece_i, True) + row_share * _loads(problem, piece_o, True)
    per_warp = plans.WARP_ACCUMULATORS / (piece_o * piece_i)
    return Work(
        blocks=float(windows * plan.splits),
        flops=2.0 * steps * depth * piece_o * piece_i,
        shared_bytes=steps * (piece_i + row_share * piece_o) * plans.STEP_BYTES + moved,
        l2_bytes=moved,
        hbm_bytes=activation_bytes(problem) + nnz * bo * bi * s,
        instructions=steps * per_step,
        steps=tiles / plan.splits * pixels / depth * passes * min(per_warp, max(pieces / windows / plan.warps, 1.0)),
        workspace=4.0 * plan.splits * nnz * bo * bi if plan.splits > 1 else 0.0,
        # Windows differ in how many blocks they store, and a multiprocessor waits for its fullest.
        share=1.0 / (1.0 + 2.0 / math.sqrt(max(mean, 1.0))) if windows > 1 else 1.0,
    )


@functools.lru_cache(maxsize=4096)
def predict(problem: Problem, plan: Plan, chip: Chip) -> Prediction:
    """Time of one call, and of each limit for the fullest multiprocessor."""
    w = work(problem, plan)
    queue = math.ceil(w.blocks / chip.sms)
    held = min(plans.resident(problem, plan, chip), queue)
    part = queue / w.blocks  # of all blocks, on the fullest multiprocessor
    rate = chip.rate(problem.dtype) * chip.mma_sync / chip.sms
    step_instructions = w.instructions + chip.step_instructions * _warp_steps(problem, plan, w)
    shared_bandwidth = chip.shared_bytes_per_clock * chip.clock
    port = max(w.l2_bytes / chip.l2_bandwidth, part * w.l2_bytes / (chip.l2_port * chip.clock))
    limits = {
        "mma": part * w.flops / rate / w.share,
        # Copies are shared out evenly, products are not.
        "shared": part * (w.l2_bytes + (w.shared_bytes - w.l2_bytes) / w.share) / shared_bandwidth,
        "l2": port,
        "hbm": w.hbm_bytes / chip.hbm_bandwidth,
        "issue": part * step_instructions / (ISSUED_PER_CLOCK * chip.clock) / w.share,
        "latency": queue / held * w.steps * chip.step_latency,
    }
    total = chip.launch + queue / held * chip.program_latency + max(limits.values())
    if held == 1:
        total += queue * w.tile_bytes / (chip.l2_port * chip.clock)
    if w.workspace:
        bandwidth = chip.l2_bandwidth if w.workspace < chip.l2_bytes / 2 else chip.hbm_bandwidth
        total += chip.launch + 2 * w.workspace / bandwidth
    return Prediction(total, limits)


def _warp_steps(problem: Problem, plan: Plan, w: Work) -> float:
    """Steps of all warps: multiplies of one warp's share of a block by one instruction's depth."""
    depth = plans.STEP_BYTES // problem.itemsize
    if plan.family == "stationary":
        outputs = plan.bm * plans.unit(problem)
    elif plan.family == "streamed":
        outputs = 32 * problem.edges[0]
    else:
        outputs = min(problem.block[0], 32) * min(problem.block[1], 32)
    return w.flops / (2.0 * outputs * depth)


def seconds(problem: Problem, plan: Plan, chip: Chip) -> float:
    """Predicted time of one call."""
    return predict(problem, plan, chip).seconds
