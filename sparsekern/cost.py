"""What a sparse layer will cost against its dense twin: tuned entries first, then a model of the device.

On a CPU one training step of a layer (forward, dgrad, wgrad) is modelled as
``dense = F / R + o_d`` and ``sparse = F * stored / (R * e) + bytes / B + o_s`` with F the dense FLOPs, R and B the
rates of this processor, ``e`` the efficiency of the block shape and ``o`` the overhead of the calls. ``e``, R, B and o
come from ``backends/tables/cpu.json``; ``bytes`` are the activations that every pass streams whatever the sparsity.

On a GPU every pass is predicted by the choice of its kernel, measured or modelled (``backends/gpu/choose.py``); a pass
whose kernel would be slower counts as dense compute on the materialised weight.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekern.backends import GPU, ConvGeometry, OpDesc, choice, families, native, user_cache
from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.choose import choose
from sparsekern.backends.gpu.problem import Problem, layer_problem
from sparsekern.layout import BlockGrid

AUTO_BLOCKS = (4, 8, 16, 32)
GPU_BLOCKS = (16, 32, 64, 128)
# A predicted speed-up below this stays dense: most benchmark rows are within 30 % of the model, and with this margin it
# chose no sparse layer that was slower. A tuned entry is a measurement and needs no margin.
BREAK_EVEN = {"model": 1.1, "tuned": 1.0}
NEAR_BEST = 0.9  # "near full efficiency" for block="auto"
WITHOUT_KERNEL = 0.95  # dense compute plus building the weight
PASSES = 3  # forward, dgrad, wgrad
ASSUMED_ROWS = 2048  # without an example input: a large batch
ASSUMED_IMAGE = (32, 16, 16)  # N, P, Q


@dataclass(frozen=True)
class Case:
    """One layer at one input shape.

    Attributes:
        x_shape: [..., I] or [N, C, H, W] as the layer sees it.
        positions: rows of the implicit product: M, or N * P * Q.
        geometry: what else distinguishes the call (stride, padding, ...), as text.
        conv: the same of a convolution, for models; None: stride 1 and padding that keeps the image's size.
    """

    kind: str
    weight_shape: tuple[int, ...]
    groups: int
    x_shape: tuple[int, ...]
    positions: int
    geometry: str = ""
    channels_last: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    conv: ConvGeometry | None = None

    def key(self, block: tuple[int, int]) -> str:
        """Identity of a tuned entry."""
        threads = f"t{torch.get_num_threads()}" if self.device == "cpu" else ""
        parts = (
            self.kind,
            "x".join(map(str, self.weight_shape)),
            f"g{self.groups}",
            "x".join(map(str, self.x_shape)),
            self.geometry,
            "nhwc" if self.channels_last else "",
            self.dtype,
            f"b{block[0]}x{block[1]}",
            threads,
        )
        return " ".join(part for part in parts if part)

    @property
    def dense_flops(self) -> float:
        """Of all three passes."""
        return 2.0 * PASSES * self.positions * math.prod(self.weight_shape)

    @property
    def activation_bytes(self) -> float:
        """x and y once per pass."""
        outputs = self.positions * self.weight_shape[0]
        return 4.0 * PASSES * (math.prod(self.x_shape) + outputs)


@functools.lru_cache(maxsize=4)
def _table(isa: str) -> dict[str, Any]:
    text = importlib.resources.files("sparsekern").joinpath("backends/tables/cpu.json").read_text()
    return json.loads(text)[isa]


def _isa() -> str:
    return str(native.load().build_info()["isa"])


def efficiency(kind: str, block: tuple[int, int], isa: str) -> float:
    """Asymptotic fraction of the ideal speed of a block shape; the harmonic mean over its two sides."""
    known = {int(size): e for size, e in _table(isa)[kind]["efficiency"].items()}

    def of(size: int) -> float:
        below = max(s for s in known if s <= size)
        above = min((s for s in known if s >= size), default=below)
        if above == below:
            return known[below]
        share = math.log(size / below) / math.log(above / below)
        return known[below] + share * (known[above] - known[below])

    return 2.0 / (1.0 / of(block[0]) + 1.0 / of(block[1]))


def predict(case: Case, block: tuple[int, int], nnz: int) -> tuple[float, str]:
    """Speedup of forward and backward over dense, and where the figure comes from.

    Tuned entries answer within 25 % of their density; the model answers everything else. A device without kernels for
    this dtype computes on the materialised weight, which is never faster than dense.
    """
    stored = nnz * block[0] * block[1] / math.prod(case.weight_shape)
    tuned = _tuned(case, block, stored)
    if tuned is not None:
        return tuned, "tuned"
    problems = gpu_problems(case, block, nnz)
    if problems is not None:
        return _predict_gpu(problems, case, block), "model"
    if case.device != "cpu" or case.dtype == "float64" or not native.available():
        return WITHOUT_KERNEL, "no kernel: dense compute on the masked weight"
    table = _table(_isa())
    threads = max(torch.get_num_threads(), 1)
    rate = table[case.kind]["dense_gflops"] * 1e9 * threads
    bandwidth = table[case.kind]["bandwidth_gbs"] * 1e9 * threads
    dense = case.dense_flops / rate + table["dense_overhead_us"] * 1e-6
    work = case.dense_flops * stored / (rate * efficiency(case.kind, block, _isa()))
    sparse = work + case.activation_bytes / bandwidth + table["sparse_overhead_us"] * 1e-6
    return dense / sparse, "model"


def _linear_problems(case: Case, block: tuple[int, int], nnz: int) -> list[Problem]:
    """The passes of a linear layer as kernels on a GPU see them."""
    return _problems(case, block, nnz, None, (case.positions, case.weight_shape[1]))


def conv_geometry(case: Case) -> ConvGeometry:
    """Of a convolution, assumed where the case does not say."""
    if case.conv is not None:
        return case.conv
    top, left = (edge - 1 for edge in case.weight_shape[2:])
    return ConvGeometry((1, 1), (top // 2, top - top // 2, left // 2, left - left // 2), (1, 1))


def _conv_problems(case: Case, block: tuple[int, int], nnz: int) -> list[Problem]:
    """The passes of a convolution; linear ones where it is a linear layer over its pixels."""
    return _problems(case, block, nnz, conv_geometry(case), case.x_shape)


def _problems(
    case: Case, block: tuple[int, int], nnz: int, geometry: ConvGeometry | None, x_shape: tuple[int, ...]
) -> list[Problem]:
    grid, dtype = BlockGrid(case.weight_shape, block, case.groups), getattr(torch, case.dtype)
    return [layer_problem(step, dtype, grid, geometry, x_shape, nnz) for step in ("forward", "dgrad", "wgrad")]


# Kinds with kernels on a GPU: (case, block, nnz) -> the problems of one training step.
GPU_KINDS: dict[str, Callable[[Case, tuple[int, int], int], list[Problem]]] = {
    "linear": _linear_problems,
    "conv2d": _conv_problems,
}


def gpu_problems(case: Case, block: tuple[int, int], nnz: int) -> list[Problem] | None:
    """What one training step asks of kernels on a GPU; None where there are none for this case."""
    if case.device != "cuda" or case.kind not in GPU_KINDS:
        return None
    try:
        backend = choice(case.kind, case.device, getattr(torch, case.dtype), block)
    except RuntimeError:  # a forced backend that can't do it: said where the layer runs
        return None
    return GPU_KINDS[case.kind](case, block, nnz) if backend in GPU else None


def _predict_gpu(problems: list[Problem], case: Case, block: tuple[int, int]) -> float:
    chip = chips.current(case.device)
    names = families(OpDesc(case.kind, case.device, getattr(torch, case.dtype), block))
    choices = [choose(problem, chip, names) for problem in problems]
    return sum(c.dense_seconds for c in choices) / sum(c.taken_seconds for c in choices)


def pays(speedup: float, source: str) -> bool:
    """Whether a layer predicted at ``speedup`` by ``source`` should be sparse."""
    return speedup >= BREAK_EVEN.get(source, 1.0)


def auto_blocks(case: Case) -> tuple[int, ...]:
    """Edges that ``block="auto"`` considers on the case's device."""
    return GPU_BLOCKS if case.device == "cuda" else AUTO_BLOCKS


def choose_block(case: Case, density: float) -> tuple[int, int]:
    """``block="auto"``: the smallest of :func:`auto_blocks` whose predicted speed is within 10 % of the best one's."""
    speed = {}
    for size in auto_blocks(case):
        grid = BlockGrid(case.weight_shape, (size, size), case.groups)
        nnz = max(round(density * math.prod(case.weight_shape) / size**2), 1)
        speed[size] = predict(case, grid.block, min(nnz, grid.blocks))[0]
    best = max(speed.values())
    size = min(size for size, s in speed.items() if s >= NEAR_BEST * best)
    return size, size


# -- tuned entries: measured on this machine, kept in the user's cache ------------------------------------------------


def cache_file(device: str = "cpu") -> Path:
    """Where tuned entries of this processor or GPU live (``SPARSEKERN_CACHE`` or the XDG cache folder)."""
    if device == "cuda":
        return user_cache.folder() / f"tuned-{chips.current(device).name}.json"
    return user_cache.folder() / f"tuned-{_processor()}-{_isa() if native.available() else 'none'}.json"


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            name = next(line.split(":", 1)[1] for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return user_cache.slug(name)


_entries: dict[Path, dict[str, dict[str, float]]] | None = None


def tuned_entries(device: str = "cpu") -> dict[str, dict[str, float]]:
    """{case key: {density: speedup}} of this machine's device; an unreadable file counts as empty."""
    global _entries
    if _entries is None:
        _entries = {}
    path = cache_file(device)
    if path not in _entries:
        _entries[path] = user_cache.read(path)
    return _entries[path]


def remember(case: Case, block: tuple[int, int], density: float, speedup: float) -> None:
    """Add a tuned entry; :func:`save_tuned` writes the file."""
    tuned_entries(case.device).setdefault(case.key(block), {})[f"{density:.4f}"] = round(speedup, 4)


def save_tuned(device: str = "cpu") -> Path:
    """Write the tuned entries of one device, atomically."""
    return user_cache.write(cache_file(device), tuned_entries(device))


def _tuned(case: Case, block: tuple[int, int], density: float) -> float | None:
    entries = tuned_entries(case.device).get(case.key(block))
    if not entries or density <= 0:
        return None
    known: Iterator[tuple[float, float]] = ((float(d), s) for d, s in entries.items())
    nearest, speedup = min(known, key=lambda entry: abs(math.log(max(entry[0], 1e-9) / density)))
    return speedup if abs(math.log(max(nearest, 1e-9) / density)) < math.log(1.25) else None
