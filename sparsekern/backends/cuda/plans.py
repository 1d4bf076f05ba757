"""Which CUDA plans there are for a problem, what each may be, and what it takes of shared memory.

The rules and the bytes are those of csrc/cuda/{stationary,streamed,wgrad}.cpp in Python, so that a plan can be chosen
without a build; tests hold the two together.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sparsekern.backends.cuda.plan import Plan
from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.problem import Problem, Window

EDGES = (16, 32, 64, 128)
DTYPES = ("bfloat16", "float16", "tf32")
STEPS = ("forward", "dgrad", "wgrad")
STEP_BYTES = 32  # of a row of either operand: what one multiply instruction takes, 16 channels of 16 bits or 8 of 32
ROW_BYTES = 128  # streamed: of a pixel in one stage
FILTER_SIDES = 30  # streamed: rows and columns of the filter together, which each pixel keeps as bits
TILE_LIMIT = 256 * 1024  # stationary: of the tile
MOST_SHARED = 227 * 1024  # wgrad
WARP_ACCUMULATORS = 2048  # wgrad: of one warp
WGRAD_FACTS = 64  # wgrad: bytes of what a block knows of its window
FILL = 0.75  # wgrad: of the accumulators that a window fills on average; a fuller one costs another pass
RESERVE = 1024  # of shared memory, by the driver for each block
REGISTERS = 128  # of a thread up to 64 accumulators, by the kernels' launch bounds
WORKSPACE = 256 * 2**20  # bytes of partial sums at most


# -- geometry ----------------------------------------------------------------------------------------------------------


def window_of(problem: Problem) -> Window | None:
    """A linear layer is a convolution of M images of one pixel; None for a convolution of unknown geometry."""
    if problem.kind == "linear":
        return Window(problem.m, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1))
    return problem.window


@dataclass(frozen=True)
class Axis:
    """Taps along one axis of forward or dgrad, as shifts between result and source (csrc/cuda/tap.h).

    Attributes:
        result, source: pixels along the axis.
    """

    taps: int
    stride: int
    dilation: int
    pad: int
    result: int
    source: int
    transposed: bool

    @property
    def phases(self) -> int:
        return self.stride if self.transposed else 1

    @property
    def per_phase(self) -> int:
        """Result pixels of the first phase, which is the largest."""
        return -(-self.result // self.phases)

    def shifts(self, phase: int) -> list[int]:
        """Of the taps that exist in a phase."""
        if not self.transposed:
            return [tap * self.dilation - self.pad for tap in range(self.taps)]
        distances = [phase + self.pad - tap * self.dilation for tap in range(self.taps)]
        return [distance // self.stride for distance in distances if distance % self.stride == 0]

    def box(self, tile: int) -> int:
        """Source pixels that a tile reads, halo included, in the phase where they are most."""
        step, most = 1 if self.transposed else self.stride, 0
        for phase in range(self.phases):
            if shifts := self.shifts(phase):
                most = max(most, (tile - 1) * step + max(shifts) - min(shifts) + 1)
        return most

    def tiles(self, tile: int) -> int:
        """Of one phase."""
        return -(-self.per_phase // tile)


@functools.lru_cache(maxsize=4096)
def axes(window: Window, transposed: bool) -> tuple[Axis, Axis]:
    """Down and across, of forward or (``transposed``) dgrad."""
    sizes = ((window.height, window.width), window.out)
    source, result = sizes[::-1] if transposed else sizes
    down, across = (
        Axis(
            window.kernel[i], window.stride[i], window.dilation[i], window.padding[i], result[i], source[i], transposed
        )
        for i in (0, 1)
    )
    return down, across


def pixels_of_box(problem: Problem, tile: tuple[int, int, int]) -> int:
    """Source pixels of a tile with its halo."""
    window = window_of(problem)
    assert window is not None
    down, across = axes(window, problem.step == "dgrad")
    return tile[0] * down.box(tile[1]) * across.box(tile[2])


def tiles_of(problem: Problem, tile: tuple[int, int, int]) -> int:
    """Tiles of all phases (of the output pixels for wgrad)."""
    window = window_of(problem)
    assert window is not None
    down, across = axes(window, problem.step == "dgrad")
    phases = down.phases * across.phases
    return phases * -(-window.images // tile[0]) * down.tiles(tile[1]) * across.tiles(tile[2])


# -- shared memory, as the host code of the kernels counts it ----------------------------------------------------------


def shared_bytes(problem: Problem, plan: Plan) -> int:
    """Of one block (CTA)."""
    count = {"stationary": _stationary_bytes, "streamed": _streamed_bytes, "wgrad": _wgrad_bytes}[plan.family]
    return count(problem, plan)


def unit(problem: Problem) -> int:
    """Stationary: outputs that one warp computes at a time (NB)."""
    return 16 if problem.edges[0] == 16 else 32


def panel_rows(problem: Problem) -> int:
    """Streamed: block rows of one panel."""
    edge = problem.edges[0]
    return 128 // edge if edge <= 32 else 1


def _channels(problem: Problem) -> int:
    """Blocks along the reduction of one tap and group."""
    bo, bi = problem.block
    out, inp = problem.out_features // problem.groups, problem.in_features // problem.groups
    return -(-out // bo) if problem.step == "dgrad" else -(-inp // bi)


def tile_bytes(problem: Problem, plan: Plan) -> int:
    """Stationary: of the activations, with halo and all channels of one group."""
    pitch = _channels(problem) * problem.edges[1] * problem.itemsize + 16  # 8 pixels in different banks
    return pixels_of_box(problem, plan.tile) * pitch


def _stationary_bytes(problem: Problem, plan: Plan) -> int:
    ring = plan.warps * plan.stages * 2 * unit(problem) * STEP_BYTES
    return ring + tile_bytes(problem, plan) + plan.bm * 8 + _round16(4 * problem.taps)


def _streamed_bytes(problem: Problem, plan: Plan) -> int:
    outputs = panel_rows(problem) * problem.edges[0]
    return plan.stages * (plan.bm + outputs) * ROW_BYTES + _round16(8 * problem.taps)


def wgrad_box(problem: Problem, plan: Plan) -> int:
    """Pixels of x that the taps of a tile of output pixels read."""
    window = window_of(problem)
    assert window is not None
    sides = zip(plan.tile[1:], window.stride, window.kernel, window.dilation, strict=True)
    return plan.tile[0] * math.prod((tile - 1) * s + (r - 1) * d + 1 for tile, s, r, d in sides)


def _wgrad_bytes(problem: Problem, plan: Plan) -> int:
    (bo, bi), size, pixels, box = problem.block, problem.itemsize, plan.bm, wgrad_box(problem, plan)
    stage = pixels * _odd16(plan.rows * bo * size) + box * _odd16(plan.cols * bi * size)
    pieces = plan.warps * WARP_ACCUMULATORS // (min(bo, 32) * min(bi, 32))
    tables = (pixels * 8, box * 8, pixels * 4, pieces * 16, plan.rows * 4)
    parts = (plan.stages * stage, *tables, WGRAD_FACTS)
    return sum(_round16(part) for part in parts)


def _round16(size: int) -> int:
    return -(-size // 16) * 16


def _odd16(size: int) -> int:
    return size + 16 if size // 16 % 2 == 0 else size


# -- what a plan may be ------------------------------------------------------------------------------------------------


def why_not(problem: Problem, plan: Plan, chip: Chip) -> str | None:
    """Why ``plan`` can't run ``problem`` on this GPU, or None."""
    if (reason := unfit(problem)) is not None:
        return reason
    families = ("wgrad",) if problem.step == "wgrad" else ("stationary", "streamed")
    if plan.family not in families:
        return f"family: expected {' or '.join(families)}, got {plan.family}"
    if min(*plan.tile, plan.splits) < 1:
        return f"tile, splits: expected 1 and more, got {plan.tile} and {plan.splits}"
    if not 2 <= plan.stages <= 4:
        return f"stages: expected 2 to 4, got {plan.stages}"
    if (reason := _RULES[plan.family](problem, plan)) is not None:
        return reason
    limit = chip.shared_per_block
    if (shared := shared_bytes(problem, plan)) > limit:
        return f"shared memory: {shared} bytes, the limit is {limit}"
    return None


def unfit(problem: Problem) -> str | None:
    """Why no plan can run ``problem``, or None."""
    if problem.step not in STEPS:
        return f"no CUDA kernel for {problem.op}"
    if problem.dtype not in DTYPES:
        return f"dtype: expected bfloat16, float16 or TF32, got {problem.dtype}"
    if not set(problem.block) <= set(EDGES):
        return f"block: expected edges among {', '.join(map(str, EDGES))}, got {problem.block[0]}x{problem.block[1]}"
    window = window_of(problem)
    if window is None:
        return "the exact geometry of the convolution is not known"
    if min(window.height, window.width, *window.out) < 1:
        return "the image is empty"
    return None


def _why_not_stationary(problem: Problem, plan: Plan) -> str | None:
    if plan.bm not in (32, 64, 128):
        return f"tile: expected 32, 64 or 128 pixels, got {plan.bm}"
    allowed = stationary_warps(problem, plan.bm)
    if plan.warps not in allowed:
        return f"warps: expected one of {', '.join(map(str, allowed))}, got {plan.warps}"
    if (size := tile_bytes(problem, plan)) > TILE_LIMIT:
        return f"tile: {size} bytes, the limit is {TILE_LIMIT}"
    return None


def stationary_warps(problem: Problem, bm: int) -> tuple[int, ...]:
    """Accumulators beyond 64 a thread leave room for 8 warps."""
    return (4, 8, 16) if bm * unit(problem) // 32 <= 64 else (4, 8)


def _why_not_streamed(problem: Problem, plan: Plan) -> str | None:
    if plan.warps not in (2, 4, 8) or plan.bm != 32 * plan.warps:
        return f"streamed: expected 2, 4 or 8 warps of 32 pixels each, got {plan.warps} and {plan.bm} pixels"
    if plan.splits != 1:
        return f"splits: expected 1, got {plan.splits}"
    window = window_of(problem)
    assert window is not None
    if sum(window.kernel) > FILTER_SIDES:
        return f"streamed: expected a filter of at most {FILTER_SIDES} rows and columns together, got {window.kernel}"
    return None


def _why_not_wgrad(problem: Problem, plan: Plan) -> str | None:
    if min(plan.rows, plan.cols) < 1 or not 1 <= plan.warps <= 16:
        return f"wgrad: expected a window and 1 to 16 warps, got {plan.rows}x{plan.cols} and {plan.warps}"
    if plan.bm % 16:
        return f"tile: expected a multiple of 16 pixels, got {plan.bm}"
    if plan.rows * problem.block[0] > 128 * plan.warps:
        return f"rows: {plan.rows} block rows of {problem.block[0]} outputs are too many for {plan.warps} warps"
    if (size := _wgrad_bytes(problem, plan)) > MOST_SHARED:
        return f"shared memory: {size} bytes, the limit is {MOST_SHARED}"
    return None


_RULES = {"stationary": _why_not_stationary, "streamed": _why_not_streamed, "wgrad": _why_not_wgrad}


# -- which plans are worth trying --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def candidates(problem: Problem, chip: Chip) -> tuple[Plan, ...]:
    """Plans that can run ``problem`` on this GPU, some for each family."""
    if unfit(problem) is not None:
        return ()
    if problem.step == "wgrad":
        listed: Iterator[Plan] = _wgrad(problem, chip)
    else:
        listed = itertools.chain(_stationary(problem, chip), _streamed(problem))
    return tuple(dict.fromkeys(plan for plan in listed if why_not(problem, plan, chip) is None))


def boxes(problem: Problem, pixels: int) -> list[tuple[int, int, int]]:
    """Tiles of ``pixels`` (a power of two), those that compute least beyond the image first, then the smallest halo.

    Small images leave a tile room for several.
    """
    window = window_of(problem)
    assert window is not None
    down, across = axes(window, problem.step == "dgrad")
    sides = [1 << i for i in range(pixels.bit_length())]
    pairs = itertools.product(
        (h for h in sides if h < 2 * down.per_phase), (w for w in sides if w < 2 * across.per_phase)
    )
    every = [(pixels // (h * w), h, w) for h, w in pairs if h * w <= pixels]
    return sorted(every, key=lambda tile: (tiles_of(problem, tile), pixels_of_box(problem, tile), tile))


def resident(problem: Problem, plan: Plan, chip: Chip) -> int:
    """Blocks of this plan that one multiprocessor holds at a time, at least 1."""
    threads = 32 * plan.warps
    fits = (chip.shared_per_sm // (shared_bytes(problem, plan) + RESERVE), chip.threads // threads)
    return max(min(*fits, chip.registers // (registers(problem, plan) * threads)), 1)


def registers(problem: Problem, plan: Plan) -> int:
    """Of a thread, at most: the kernels' launch bounds."""
    if plan.family == "stationary":
        return REGISTERS if plan.bm * unit(problem) // 32 <= 64 else 2 * REGISTERS
    if plan.family == "streamed":
        return REGISTERS if problem.edges[0] == 64 else 2 * REGISTERS  # 128 accumulators but for panels of 64 outputs
    return REGISTERS


def _stationary(problem: Problem, chip: Chip) -> Iterator[Plan]:
    """Large tiles read weights least often; smaller ones fit where the channels are many, and leave room for a second
    block whose products hide the first one's loads."""
    units = problem.walked[0] // problem.groups * (problem.edges[0] // unit(problem))
    for bm in (128, 64, 32):
        for warps in reversed(stationary_warps(problem, bm)):
            if warps > 4 and warps >= 2 * units:
                continue  # warps without a unit of their own
            for stages in (4, 2):
                listed = [Plan("stationary", tile, warps, stages) for tile in boxes(problem, bm)]
                fitting = [plan for plan in listed if why_not(problem, plan, chip) is None]
                if not fitting:
                    continue
                loads = min(fitting, key=lambda plan: _loaded(problem, plan.tile))
                for plan in dict.fromkeys((fitting[0], loads)):
                    blocks = tiles_of(problem, plan.tile) * problem.groups
                    room = chip.sms * resident(problem, plan, chip)
                    splits = max(min(room // max(blocks, 1), -(-units // warps)), 1)
                    for count in sorted({1, splits}):
                        yield Plan("stationary", plan.tile, warps, stages, count)
                break  # the deepest ring that fits


def _loaded(problem: Problem, tile: tuple[int, int, int]) -> tuple[int, int]:
    """Pixels that all tiles load, and tiles."""
    tiles = tiles_of(problem, tile)
    return tiles * pixels_of_box(problem, tile), tiles


def _streamed(problem: Problem) -> Iterator[Plan]:
    for warps in (8, 4, 2):
        tile = boxes(problem, 32 * warps)[0]
        for stages in (4, 3, 2):
            yield Plan("streamed", tile, warps, stages)


def _wgrad(problem: Problem, chip: Chip) -> Iterator[Plan]:
    """Windows that fill the accumulators, as near to a square of traffic as the block rows allow; large ones read each
    pixel least often, small ones make more blocks. Pixels are split so that the blocks fill the chip."""
    for warps in (8, 16, 4):
        for rows, cols in _windows(problem, warps):
            for pixels in (64, 32, 128, 16):
                plan = _deepest(problem, chip, rows, cols, warps, pixels)
                if plan is None:
                    continue
                for count in _splits(problem, plan, chip):
                    yield Plan("wgrad", plan.tile, warps, plan.stages, count, rows, cols)
                break


def _deepest(problem: Problem, chip: Chip, rows: int, cols: int, warps: int, pixels: int) -> Plan | None:
    for stages in (3, 2):
        for tile in _wgrad_tiles(problem, pixels)[:6]:
            plan = Plan("wgrad", tile, warps, stages, 1, rows, cols)
            if why_not(problem, plan, chip) is None:
                return plan
    return None


def _wgrad_tiles(problem: Problem, pixels: int) -> list[tuple[int, int, int]]:
    """As :func:`boxes`, and whole images where a multiple of 16 pixels is within the size."""
    window = window_of(problem)
    assert window is not None
    whole, listed = math.prod(window.out), boxes(problem, pixels)
    fewest = 16 // math.gcd(whole, 16)
    if whole > 1 and whole * fewest <= pixels:
        listed = [(pixels // (whole * fewest) * fewest, *window.out), *listed]
    return sorted(listed, key=lambda tile: _computed(problem, tile))


def _computed(problem: Problem, tile: tuple[int, int, int]) -> tuple[int, int]:
    """Pixels that the tiles compute, and that they load."""
    tiles = tiles_of(problem, tile)
    return tiles * math.prod(tile), tiles * wgrad_box(problem, Plan("wgrad", tile, 1, 2, 1, 1, 1))


def _windows(problem: Problem, warps: int) -> list[tuple[int, int]]:
    """(rows, cols) whose stored blocks fill ``FILL`` of the accumulators, the least traffic first."""
    bo, bi = problem.block
    rows, every_column = problem.grid
    columns = every_column // problem.taps
    per_place = problem.taps * max(problem.density, 1e-6) * bo * bi
    places = max(FILL * warps * WARP_ACCUMULATORS / per_place, 1.0)
    most = min(rows, max(128 * warps // bo, 1))
    sides = {min(1 << i, most) for i in range(11) if 1 << i <= places}
    windows = {(r, min(columns, max(int(places / r), 1))) for r in sides}
    traffic = {window: rows * columns / math.prod(window) * _per_pixel(problem, window) for window in windows}
    return sorted(windows, key=lambda window: (traffic[window], window))[:2]


def _per_pixel(problem: Problem, window: tuple[int, int]) -> float:
    """Elements loaded per output pixel, the halo left out."""
    (bo, bi), (rows, cols) = problem.block, window
    return rows * bo + cols * bi * min(problem.stride_area, problem.taps)


def wgrad_windows(problem: Problem, plan: Plan) -> int:
    """Windows of all groups."""
    rows, columns = problem.grid
    return problem.groups * -(-rows // plan.rows) * -(-(columns // problem.taps) // plan.cols)


def _splits(problem: Problem, plan: Plan, chip: Chip) -> tuple[int, ...]:
    """1, and what fills the chip once or twice."""
    blocks, room = wgrad_windows(problem, plan), chip.sms * resident(problem, plan, chip)
    partial = 4 * max(problem.capacity, 1) * math.prod(problem.block)
    most = min(max(tiles_of(problem, plan.tile) // (2 * plan.stages), 1), max(WORKSPACE // partial, 1), 1024)
    return tuple(sorted({max(min(room * times // blocks, most), 1) for times in (0, 1, 2)}))
