"""The few calls into the GPU backends' own tables and launches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.device import one_line
from benchmarks.problems import Problem
from sparsekern.backends import GPU, ConvGeometry, OpDesc, cuda, dense, families
from sparsekern.backends.cuda.plan import Plan
from sparsekern.backends.gpu import chips, table
from sparsekern.backends.gpu.choose import choose
from sparsekern.backends.gpu.problem import layer_problem
from sparsekern.backends.triton.tile import Tile


def chip_name() -> str:
    """The name of the current GPU in the tables of GPUs."""
    return chips.current("cuda").name


def remember(figures: dict[str, Any]) -> str:
    """Keep measured limits for the models of this GPU; returns what was done."""
    if not figures:
        return "nothing to keep"
    try:
        chips.remember(chip_name(), **figures)
    except Exception as error:
        return f"not kept: {one_line(error)}"
    return f"kept for {chip_name()}: {', '.join(figures)}"


_LAUNCHES = {
    "linear": ("forward", "dgrad"),
    "linear_wgrad": ("wgrad",),
    "conv2d": ("forward", "dgrad"),
    "conv2d_wgrad": ("wgrad",),
}
Launch = Callable[[], object]


def _triton(name: str) -> Any:
    """A module of launches, None without Triton."""
    try:
        return importlib.import_module(f"sparsekern.backends.triton.launch.{name}")
    except ImportError:
        return None


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, Launch]]]:
    """The kernel launches that calls within the context come down to, each ready to be made again by itself.

    They are those of the kernels, or of the dense backend where that was chosen: ``("linear.forward", call)``.
    """
    launches: list[tuple[str, Launch]] = []
    with contextlib.ExitStack() as undo:
        found = {name: _triton(name) for name in _LAUNCHES}
        wrapped = [(module, f, f"{name}.{f}") for name, module in found.items() if module for f in _LAUNCHES[name]]
        steps = ("forward", "dgrad", "wgrad")
        wrapped += [(cuda, step, f"cuda.{step}") for step in steps]
        wrapped += [(dense, f"{op}_{step}", f"dense {op}.{step}") for op in ("linear", "conv2d") for step in steps]
        for module, function, name in wrapped:
            original = getattr(module, function, None)
            if original is not None:
                undo.callback(setattr, module, function, original)
                setattr(module, function, _recording(launches, name, original))
        yield launches


def _recording(launches: list[tuple[str, Launch]], name: str, original: Callable[..., object]) -> Callable[..., object]:
    def call(*args: Any, **more: Any) -> object:
        launches.append((name, functools.partial(original, *args, **more)))
        return original(*args, **more)

    return call


def kernel_of(launch: Launch) -> Any:
    """The kernel among a recorded launch's arguments as plain data, None where there is none."""
    assert isinstance(launch, functools.partial)
    given = (*launch.args, *launch.keywords.values())
    return next((dataclasses.asdict(a) for a in given if isinstance(a, Tile | Plan)), None)


def choices(problem: Problem, pass_: str, fallback: bool) -> dict[str, Any]:
    """The kernel that runs each op of a pass, where it comes from, and the times expected.

    Args:
        fallback: whether the dense op may run instead.
    """
    names = families(OpDesc(problem.op, problem.device, problem.dtype, problem.layout.grid.block)) or GPU[:1]
    out: dict[str, Any] = {}
    for op in ("forward", "dgrad", "wgrad") if pass_ == "step" else (pass_,):
        try:
            found = choose(_asked(problem, op), chips.current(problem.device), names, fallback)
            kernel = None if found.kernel is None else dataclasses.asdict(found.kernel)
            times = {"seconds": found.seconds, "dense": found.dense_seconds}
            out[op] = {"backend": found.backend, "kernel": kernel, "source": found.source, **times}
        except Exception as error:
            out[op] = one_line(error)
    return out


def _asked(problem: Problem, op: str) -> Any:
    """What the passes would ask for."""
    shape, geometry = problem.shape, None
    if problem.op == "conv2d":
        geometry = ConvGeometry((shape.stride,) * 2, (shape.padding,) * 4, (1, 1))
    capacity, grid = problem.values.shape[0], problem.layout.grid
    return layer_problem(op, problem.dtype, grid, geometry, tuple(problem.operands.x.shape), capacity)


def kept(device: str) -> dict[str, int]:
    """How many entries of this GPU's table name a kernel of each family."""
    entries = table.tuned(chips.current(device).name).values()
    counts = {name: 0 for name in GPU}
    for entry in entries:
        counts["cuda" if "family" in entry else "triton"] += 1
    return counts


def export_tiles(path: Path) -> str:
    """Write the table of tuned kernels, the user's measurements merged in; returns what was done."""
    try:
        table.export(path, (chip_name(),))
    except Exception as error:
        return f"not exported: {one_line(error)}"
    return f"exported to {path.name}"
