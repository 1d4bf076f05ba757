"""Facts per GPU, each with where it comes from: the shipped ``tables/gpus.json``, overridden by what was measured here.

:func:`remember` keeps measured figures in the user's cache, beside the tuned kernels of the same GPU.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekern.backends import user_cache

STAND_IN = "h200"  # for tensors that are not on a GPU (the interpreter)
NUMBERS = (
    "sms",
    "clock",
    "shared_per_block",
    "shared_per_sm",
    "registers",
    "threads",
    "l2_bytes",
    "hbm_bandwidth",
    "l2_bandwidth",
    "l2_port",
    "launch",
    "program_latency",
    "stage_latency",
    "conv_share",
    "mma_sync",
    "shared_bytes_per_clock",
    "step_instructions",
    "step_latency",
)
BY_DTYPE = ("dense_flops", "kernel_rate")
VERSION = 1

ByDtype = tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)  # by identity: every call of an op looks choices up by it
class Chip:
    """One GPU, in SI units (bytes, bytes/s, FLOP/s, Hz, s).

    Attributes:
        name: key of its tables and cache file.
        arch: compute capability as 80, 86, 89, 90, 100, ...
        sms: streaming multiprocessors.
        shared_per_block, shared_per_sm: shared memory one program may use, and all of one multiprocessor.
        registers, threads: of one multiprocessor.
        hbm_bandwidth: usable, reads and writes together.
        l2_bandwidth: from L2 to shared memory, the whole chip.
        l2_port: bytes per clock that one multiprocessor takes from L2.
        launch: of one kernel, with the queue kept full.
        program_latency: prologue and epilogue of one program that nothing hides.
        stage_latency: from asking for a stage to having it.
        conv_share: share of ``dense_flops`` that cuDNN sustains in dense convolutions.
        mma_sync: share of ``dense_flops`` that kernels of ``mma.sync`` reach; cuBLAS uses wgmma on sm_90 and tcgen05 on
            sm_100, at a multiple of the rate.
        shared_bytes_per_clock: of one multiprocessor.
        step_instructions: a CUDA kernel's besides loads and multiplies, per step of one multiply instruction's depth.
        step_latency: of such a step that waits for the one before.
        dense_flops: what cuBLAS sustains, by dtype.
        kernel_rate: share of ``dense_flops`` that the sparse kernels reach with all operands at hand, by dtype.
        sources: (figure, "datasheet" | "measured" | "assumed").
    """

    name: str
    arch: int
    sms: int
    clock: float
    shared_per_block: int
    shared_per_sm: int
    registers: int
    threads: int
    l2_bytes: float
    hbm_bandwidth: float
    l2_bandwidth: float
    l2_port: float
    launch: float
    program_latency: float
    stage_latency: float
    conv_share: float
    mma_sync: float
    shared_bytes_per_clock: int
    step_instructions: int
    step_latency: float
    dense_flops: ByDtype
    kernel_rate: ByDtype
    sources: tuple[tuple[str, str], ...]

    def rate(self, dtype: str) -> float:
        """FLOP/s of cuBLAS; raises ``KeyError`` for a dtype without kernels."""
        return dict(self.dense_flops)[dtype]

    def share(self, dtype: str) -> float:
        """``kernel_rate`` of one dtype."""
        return dict(self.kernel_rate)[dtype]

    def source(self, figure: str) -> str:
        """Where a figure comes from; "dense_flops.bfloat16" for those by dtype."""
        return dict(self.sources)[figure]


@functools.lru_cache(maxsize=1)
def shipped() -> dict[str, Any]:
    """The content of ``tables/gpus.json``."""
    return json.loads(importlib.resources.files("sparsekern").joinpath("backends/tables/gpus.json").read_text())


def names() -> tuple[str, ...]:
    """GPUs with figures of their own."""
    return tuple(shipped()["gpus"])


def nearest_architecture(arch: int) -> dict[str, Any]:
    """Figures of the newest known architecture that is not newer than ``arch``; of the oldest for older ones."""
    known = {int(a): facts for a, facts in shipped()["architectures"].items()}
    return known[max((a for a in known if a <= arch), default=min(known))]


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one program may use on this architecture."""
    return int(nearest_architecture(arch)["shared_per_block"][0])


def cache_file(name: str) -> Path:
    """The user's cache of one GPU: measured figures and tuned kernels."""
    return user_cache.folder() / f"kernels-{name}.json"


def read_cache(name: str) -> dict[str, Any]:
    """{"figures": {...}, "tiles": {...}} of one GPU; empty if the file is missing, torn or of another version."""
    found = user_cache.read(cache_file(name))
    if found.get("version") != VERSION:
        found = {}
    return {part: found[part] if isinstance(found.get(part), dict) else {} for part in ("figures", "tiles")}


def write_cache(name: str, **parts: dict[str, Any]) -> Path:
    """Replace "figures" or "tiles" of one GPU's cache, keeping the other."""
    return user_cache.write(cache_file(name), {**read_cache(name), **parts, "version": VERSION, "gpu": name})


def get(name: str) -> Chip:
    """A GPU of the shipped table ("h200", "h100", "a100", "b200") or "sm80", "sm90", ... for its architecture alone.

    Raises:
        ValueError: for any other name.
    """
    return _named(name, user_cache.folder())


def current(device: torch.device | str | int | None = None) -> Chip:
    """The GPU behind ``device``; figures the table lacks follow from its architecture, clock and multiprocessors.

    Without a GPU these are the figures of an H200, so that the same code runs under Triton's interpreter.
    """
    if not isinstance(device, torch.device):
        device = torch.device("cuda" if device is None else device)
    if device.type != "cuda":
        return get(STAND_IN)
    index: Any = device.index  # None for "cuda", whatever torch's annotations say
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _device(index, user_cache.folder())


def remember(chip_name: str, **measured: Any) -> Path:
    """Keep measured figures of a GPU, in the units of :class:`Chip`; from now on they replace the table's.

    Args:
        chip_name: ``Chip.name``.
        measured: numbers of :class:`Chip` by name; ``dense_flops`` and ``kernel_rate`` as {dtype: value}, or
            ``dense_tflops`` as {dtype: TFLOP/s}. None is skipped.

    Raises:
        ValueError: for an unknown figure or one that is not above zero.
    """
    figures = read_cache(chip_name)["figures"]
    for figure, value in measured.items():
        if value is None:
            continue
        if figure == "dense_tflops":
            figure, value = "dense_flops", {dtype: rate * 1e12 for dtype, rate in value.items()}
        if figure in BY_DTYPE:
            for dtype, rate in value.items():
                figures[f"{figure}.{dtype}"] = _positive(f"{figure}.{dtype}", rate)
        elif figure in NUMBERS:
            figures[figure] = _positive(figure, value)
        else:
            raise ValueError(f"figure: expected one of {', '.join((*NUMBERS, *BY_DTYPE))}, got {figure!r}")
    path = write_cache(chip_name, figures=figures)
    forget()
    return path


def forget() -> None:
    """Read the user's cache again at the next call."""
    _named.cache_clear()
    _device.cache_clear()


def _positive(figure: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{figure}: expected a number above 0, got {value!r}")
    return float(value)


@functools.lru_cache(maxsize=32)
def _named(name: str, folder: Path) -> Chip:
    known, architectures = shipped()["gpus"], shipped()["architectures"]
    if name in known:
        return _build(name, int(known[name]["arch"]), known[name])
    if name.startswith("sm") and name[2:] in architectures:
        return _build(name, int(name[2:]), {})
    expected = ", ".join((*known, *(f"sm{arch}" for arch in architectures)))
    raise ValueError(f"chip: expected one of {expected}, got {name!r}")


@functools.lru_cache(maxsize=32)
def _device(index: int, folder: Path) -> Chip:
    if not torch.cuda.is_available():
        return _named(STAND_IN, folder)
    properties = torch.cuda.get_device_properties(index)
    found = {"sms": [properties.multi_processor_count, "datasheet"]}
    for figure, attribute, scale in (
        ("shared_per_block", "shared_memory_per_block_optin", 1),
        ("shared_per_sm", "shared_memory_per_multiprocessor", 1),
        ("registers", "regs_per_multiprocessor", 1),
        ("threads", "max_threads_per_multi_processor", 1),
        ("l2_bytes", "L2_cache_size", 1),
        ("clock", "clock_rate", 1000),
    ):
        value = getattr(properties, attribute, 0)
        if value:
            found[figure] = [value * scale, "datasheet"]
    memory_clock, bus = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    if memory_clock and bus:  # two transfers per clock; nine tenths of it usable
        found["hbm_bandwidth"] = [0.9 * 2 * memory_clock * 1000 * bus / 8, "assumed"]
    # AMD's numbering says nothing here: no descriptors, cp.async or wgmma there.
    arch = 80 if torch.version.hip else 10 * properties.major + properties.minor
    for name, facts in shipped()["gpus"].items():
        # A slice of a GPU (MIG) has its name with a suffix, or fewer multiprocessors: it gets figures of its own.
        if properties.name in facts["devices"] and properties.multi_processor_count == facts["sms"][0]:
            return _named(name, folder)
    return _build(user_cache.slug(properties.name), arch, found)


def _build(name: str, arch: int, own: dict[str, Any]) -> Chip:
    """``own`` figures, else the architecture's, else those of the kernels; what was measured here before all."""
    common = shipped()["kernels"]
    labelled = {**common, **nearest_architecture(arch), **own}
    measured = read_cache(name)["figures"]
    clocks = labelled["sms"][0] * labelled["clock"][0]
    if "dense_flops" not in own:
        share = shipped()["generic_rate"][0]
        labelled["dense_flops"] = {
            dtype: [rate * clocks * share, "assumed"] for dtype, (rate, _) in labelled["flops_per_clock"].items()
        }
    if "l2_bandwidth" not in own:
        labelled["l2_bandwidth"] = [labelled["l2_bytes_per_clock"][0] * clocks, "assumed"]
    numbers: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for figure in NUMBERS:
        value, source = labelled[figure]
        if figure in measured:
            value, source = measured[figure], "measured"
        numbers[figure] = int(value) if isinstance(value, int) else value
        sources[figure] = source
    for figure in BY_DTYPE:
        by_dtype = {}
        for dtype, (value, source) in labelled[figure].items():
            key = f"{figure}.{dtype}"
            by_dtype[dtype] = measured.get(key, value)
            sources[key] = "measured" if key in measured else source
        numbers[figure] = tuple(by_dtype.items())
    return Chip(name=name, arch=arch, sources=tuple(sources.items()), **numbers)
