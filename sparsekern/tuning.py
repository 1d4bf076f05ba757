"""Measure on this machine what the cost models only predict: sparse layers against dense, and kernels on a GPU.

Contenders take turns within a round and medians count, so a busy or throttling machine shifts all of them.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern import cost
from sparsekern.backends import GPU, ConvGeometry, OpDesc, families, get
from sparsekern.backends.gpu import chips, table
from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.choose import winner
from sparsekern.backends.gpu.families import Kernel, family_of
from sparsekern.backends.gpu.problem import Problem
from sparsekern.config import SparsityConfig
from sparsekern.layout import BlockGrid, BlockLayout
from sparsekern.masks import make_block_masks
from sparsekern.nn import HOOKS
from sparsekern.sparsify import Planner, to_sparse

LEAST_ROUNDS, MOST_ROUNDS = 3, 50
SECONDS_PER_LAYER = 2.0

Call = Callable[[], Any]
Clock = Callable[[Call], float]  # seconds of one call
# A problem's contenders: a given kernel, and the dense op.
Launch = Callable[[Problem], tuple[Callable[[Kernel], Any], Call]]


def tune(
    model: nn.Module,
    example_input: Any,
    cfg: SparsityConfig | None = None,
    *,
    seconds_per_layer: float = SECONDS_PER_LAYER,
    save: bool = True,
) -> dict[str, float]:
    """Time forward and backward of every layer that ``cfg`` would make sparse, against its dense twin.

    On a GPU the candidate kernels of each pass are timed first, with a cold L2: Triton's tiles, and plans of the CUDA
    kernels where those are built. The best one is kept for every later call near these shapes; a CUDA kernel where it
    is at least 5 % faster than the best tile. Results are kept in the user's cache and used by every later plan at
    these shapes, block and density.

    Returns:
        {layer name: speedup}.
    """
    planner = Planner(model, cfg, None, None, example_input, None, None)
    plan = planner.plan()
    modules = {c.name: c.module for c in planner.candidates}
    cases = {c.name: planner.case_of(c) for c in planner.candidates}
    found: dict[str, float] = {}
    timed: dict[tuple[str, str], float] = {}
    clocks: dict[str, Clock] = {}
    for layer in plan.layers:
        if layer.name not in planner.grids:
            continue
        grid, count, case = planner.grids[layer.name], planner.counts[layer.name], cases[layer.name]
        density = count * grid.block[0] * grid.block[1] / layer.params_dense
        same = (case.key(grid.block), f"{density:.2f}")
        if same not in timed:
            if case.device not in clocks:
                clocks[case.device] = clock_of(case.device)
            clock = clocks[case.device]
            problems = cost.gpu_problems(case, grid.block, count)
            if problems is not None:
                operands = LAUNCHES[case.kind](modules[layer.name], case, grid, count)
                desc = OpDesc(case.kind, case.device, getattr(torch, case.dtype), grid.block)
                chip, names = chips.current(case.device), families(desc)
                tune_kernels(problems, operands, clock, chip, seconds_per_layer / 2, names)
                del operands
            timed[same] = measure(modules[layer.name], case, grid, count, seconds_per_layer, clock)
        found[layer.name] = timed[same]
        cost.remember(case, grid.block, density, timed[same])
    if save:
        for device in clocks or ("cpu",):
            cost.save_tuned(device)
            if device == "cuda":
                table.save(chips.current(device).name)
    return found


def measure(
    dense: nn.Module,
    case: cost.Case,
    grid: BlockGrid,
    count: int,
    seconds: float = SECONDS_PER_LAYER,
    clock: Clock | None = None,
) -> float:
    """Median over interleaved rounds of dense time over sparse time, forward and backward, on random data."""
    clock = clock or clock_of(case.device)
    dense = _without_hooks(dense)
    sparse = to_sparse(dense, _layout(grid, count).mask(), grid.block)
    x = _random(case.x_shape, case)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    dy = torch.randn_like(dense(x))
    rounds = _race([functools.partial(_step, module, x, dy) for module in (dense, sparse)], clock, seconds)
    return statistics.median(one / other for one, other in rounds)


# -- clocks ------------------------------------------------------------------------------------------------------------


def wall_clock(call: Call) -> float:
    """Seconds on the wall."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class EventClock:
    """Seconds between two events on the current CUDA stream, with nothing of the operands left in L2.

    The buffer that empties L2 is written just before the first event, without waiting for it: meanwhile the host
    queues the call, so the events hold device time.
    """

    def __init__(self, device: str = "cuda") -> None:
        size = max(4 * int(chips.current(device).l2_bytes), 256 * 2**20)
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def clock_of(device: str) -> Clock:
    """How calls on this kind of device are timed."""
    return EventClock(device) if device == "cuda" else wall_clock


def _race(calls: Sequence[Call], clock: Clock, seconds: float) -> list[tuple[float, ...]]:
    """Times of all calls, round by round, after one round that does not count."""
    for call in calls:
        clock(call)
    deadline = time.perf_counter() + seconds
    rounds: list[tuple[float, ...]] = []
    while len(rounds) < LEAST_ROUNDS or (time.perf_counter() < deadline and len(rounds) < MOST_ROUNDS):
        rounds.append(tuple(clock(call) for call in calls))
    return rounds


# -- kernels on a GPU --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelTimes:
    """Median seconds of each kernel that ran and of the dense op, and why the other kernels could not run."""

    seconds: dict[Kernel, float]
    dense_seconds: float
    skipped: dict[Kernel, str]

    @property
    def best(self) -> Kernel | None:
        """The kernel to remember, the first of equals; None if none ran."""
        return winner(self.seconds)


def measure_kernels(
    listed: Iterable[Kernel], run: Callable[[Kernel], Any], dense: Call, clock: Clock, seconds: float
) -> KernelTimes:
    """Time ``run(kernel)`` for all kernels and ``dense()``; a kernel that raises at its first call is skipped."""
    skipped: dict[Kernel, str] = {}
    calls: dict[Kernel, Call] = {}
    for kernel in listed:
        call = functools.partial(run, kernel)
        try:
            clock(call)
        except Exception as error:  # too much shared memory, a tile this compiler refuses, ...: others may run
            skipped[kernel] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            calls[kernel] = call
    medians = [statistics.median(times) for times in zip(*_race([dense, *calls.values()], clock, seconds))]
    return KernelTimes(dict(zip(calls, medians[1:])), medians[0], skipped)


def tune_kernels(
    problems: Iterable[Problem],
    launch: Launch,
    clock: Clock,
    chip: Chip,
    seconds: float,
    names: tuple[str, ...] = GPU,
) -> dict[Problem, KernelTimes]:
    """Measure the candidates of the families ``names`` for each problem and remember the best in the table
    (:func:`table.save` writes it)."""
    problems = list(problems)
    measured: dict[Problem, KernelTimes] = {}
    for problem in problems:
        run, dense = launch(problem)
        listed = [kernel for name in names for kernel in get(name).candidates(problem, chip)]
        times = measured[problem] = measure_kernels(listed, run, dense, clock, seconds / len(problems))
        if times.best is not None:
            reasons = {str(kernel): reason for kernel, reason in times.skipped.items()}
            fastest = times.seconds[times.best]
            table.remember(chip.name, problem, times.best, fastest, times.dense_seconds, reasons)
    return measured


class LinearLaunch:
    """Kernel calls of a linear layer on random data, with the dense ops they stand for."""

    def __init__(self, dense: nn.Module, case: cost.Case, grid: BlockGrid, count: int) -> None:
        layout = _layout(grid, count, case.device)
        self.grid, self.index = grid, layout.index
        out_features, in_features = case.weight_shape
        self.x, self.dy = _random((case.positions, in_features), case), _random((case.positions, out_features), case)
        self.weight = _random(case.weight_shape, case)
        self.values = layout.from_dense(self.weight)
        self.bias = _random((out_features,), case) if getattr(dense, "bias", None) is not None else None

    def __call__(self, problem: Problem) -> tuple[Callable[[Kernel], Any], Call]:
        x, dy = self.x, self.dy
        run = functools.partial(_run, problem.step, x, dy, self.values, self.index, self.bias, self.grid, None)
        if problem.step == "forward":
            return run, lambda: F.linear(x, self.weight, self.bias)
        if problem.step == "dgrad":
            return run, lambda: dy @ self.weight
        return run, lambda: (dy.t() @ x, None if self.bias is None else dy.sum(0))


class ConvLaunch:
    """Kernel calls of a convolution on random images in channels_last memory, with the dense ops they stand for."""

    def __init__(self, dense: nn.Module, case: cost.Case, grid: BlockGrid, count: int) -> None:
        layout = _layout(grid, count, case.device)
        self.grid, self.index = grid, layout.index
        self.geometry = cost.conv_geometry(case)
        n, _, h, w = case.x_shape
        y_shape = (n, case.weight_shape[0], *self.geometry.output_size(h, w, grid.kernel_size))
        self.x, self.dy, self.weight = (
            _random(shape, case).contiguous(memory_format=torch.channels_last)
            for shape in (case.x_shape, y_shape, case.weight_shape)
        )
        self.values = layout.from_dense(self.weight)
        self.bias = _random((case.weight_shape[0],), case) if getattr(dense, "bias", None) is not None else None

    def __call__(self, problem: Problem) -> tuple[Callable[[Kernel], Any], Call]:
        operands = self.x, self.dy, self.values, self.index, self.bias
        run = functools.partial(_run, problem.step, *operands, self.grid, self.geometry)
        if problem.step == "forward":
            return run, functools.partial(self._dense, *self._dense_operands())
        leaves = [None if operand is None else operand.requires_grad_() for operand in self._dense_operands()]
        y, (x_dense, *parameters) = self._dense(*leaves), leaves
        wanted = [x_dense] if problem.step == "dgrad" else parameters
        inputs = [operand for operand in wanted if operand is not None]
        return run, lambda: torch.autograd.grad(y, inputs, self.dy, retain_graph=True)

    def _dense_operands(self) -> list[Tensor | None]:
        """x, weight and bias; x is padded beforehand where cuDNN can't, which flatters it."""
        top, bottom, left, right = self.geometry.padding
        x = self.x.detach()
        if (top, left) != (bottom, right):
            x = F.pad(x, (left, right, top, bottom)).contiguous(memory_format=torch.channels_last)
        return [x, self.weight.detach(), None if self.bias is None else self.bias.detach()]

    def _dense(self, x: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert x is not None and weight is not None
        top, bottom, left, right = self.geometry.padding
        padding = (top, left) if (top, left) == (bottom, right) else (0, 0)
        return F.conv2d(x, weight, bias, self.geometry.stride, padding, self.geometry.dilation, self.grid.groups)


def _run(
    step: str,
    x: Tensor,
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    kernel: Kernel,
) -> Any:
    """One pass of a layer by a given kernel."""
    family = family_of(kernel)
    if step == "forward":
        return family.forward(x, values, index, bias, grid, geometry, kernel)
    if step == "dgrad":
        return family.dgrad(dy, values, index, tuple(x.shape), grid, geometry, kernel)
    return family.wgrad(dy, x, index, None, bias is not None, grid, geometry, kernel)


# By kind of layer; a kind of cost.GPU_KINDS needs its entry here.
LAUNCHES: dict[str, Callable[[nn.Module, cost.Case, BlockGrid, int], Launch]] = {
    "linear": LinearLaunch,
    "conv2d": ConvLaunch,
}


# -- data --------------------------------------------------------------------------------------------------------------


def _layout(grid: BlockGrid, count: int, device: str = "cpu") -> BlockLayout:
    block_mask = make_block_masks({"layer": grid}, {"layer": count}, seed=0)["layer"]
    return BlockLayout.from_block_mask(grid, block_mask.to(device))


def _random(shape: tuple[int, ...], case: cost.Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device=case.device, dtype=getattr(torch, case.dtype))


def _without_hooks(module: nn.Module) -> nn.Module:
    bare = copy.copy(module)
    for name in HOOKS:
        bare.__dict__[name] = OrderedDict()
    return bare


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    parameters = [p for p in module.parameters() if p.requires_grad]
    torch.autograd.grad(module(x), [x, *parameters], dy)
