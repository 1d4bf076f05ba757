"""Probes of a GPU's limits: ``python -m benchmarks.probes l2 --out l2.json``.

What the sparse kernels can reach is set by the rate at which random boxes of x come from L2 into shared memory, by the
memory, by the dense product, and by the cost of a launch. Each part writes a list of figures with their unit and the
configuration that gave the best one; on a GPU they are also kept for the backend's model of it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from benchmarks import adapters, files, machine
from benchmarks.device import one_line
from benchmarks.timing import CpuTimer, CudaTimer, Timer, sample

PARTS = ("l2", "memory", "gemm", "ceiling")
WIDTHS = (64, 32, 16)  # features of a box: 128, 64 and 32 bytes in bfloat16


@dataclass
class Figure:
    """One measured number; ``config`` is what gave it, ``others`` the same of the configurations that lost."""

    name: str
    value: float
    unit: str
    config: str = ""
    others: dict[str, float] | None = None


@dataclass(frozen=True)
class Scale:
    """Sizes of the probes: those of a GPU, or tiny ones that the interpreter can run."""

    device: str
    tokens: int
    features: int
    rows: int  # of one box
    boxes: int  # of one program
    copy_bytes: int
    gemm: int
    shapes: tuple[tuple[int, int, int], ...]  # tokens, in, out
    rounds: int
    tma: bool

    @classmethod
    def of(cls, device: str) -> Scale:
        if device == "cpu":
            return cls("cpu", 64, 128, 16, 2, 1 << 16, 64, ((64, 64, 96),), 2, True)
        shapes = (
            *((8192, n, n) for n in (1024, 2048, 4096)),
            *((8192, 768, 3072), (8192, 3072, 768)),
        )
        tma = torch.cuda.get_device_capability()[0] >= 9
        return cls("cuda", 8192, 1024, 256, 512, 1 << 30, 8192, shapes, 15, tma)

    @property
    def programs(self) -> int:
        return torch.cuda.get_device_properties(0).multi_processor_count if self.device == "cuda" else 2

    def timer(self) -> Timer:
        return CudaTimer() if self.device == "cuda" else CpuTimer()


def _seconds(call: Callable[[], object], timer: Timer, rounds: int, *, cold: bool = True) -> float:
    """Median device seconds; ``cold`` empties L2 before each call."""
    call()
    times = []
    for _ in range(rounds):
        if cold:
            times.append(sample(timer, call, 1))
            continue
        start = timer.mark()
        for _ in range(3):
            call()
        times.append(timer.seconds(start, timer.mark()) / 3)
    return statistics.median(times)


def _best(name: str, unit: str, tried: dict[str, float]) -> Figure:
    config = max(tried, key=lambda key: tried[key])
    return Figure(name, tried[config], unit, config, {key: value for key, value in tried.items() if key != config})


# The interpreter multiplies bit patterns of bfloat16: there alone operands go through float32, which is exact.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


# -- boxes from L2 -----------------------------------------------------------------------------------------------------


@triton.jit
def gather_probe(
    x, place, out, boxes,
    STRIDE: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    o_m = tl.arange(0, BM)
    o_k = tl.arange(0, WIDTH)
    b_ones = tl.full((WIDTH, 16), 1.0, x.dtype.element_ty)
    b_acc = tl.zeros((BM, 16), tl.float32)
    row = tl.load(place + 2 * pid * boxes)
    col = tl.load(place + 2 * pid * boxes + 1)
    for i in tl.range(0, boxes, num_stages=STAGES):
        o_x = tl.max_contiguous(tl.multiple_of(col * WIDTH + o_k, WIDTH), WIDTH)
        b_x = tl.load(x + (row * BM + o_m)[:, None] * STRIDE + o_x[None, :])
        k = pid * boxes + (i + 1) % boxes
        row = tl.load(place + 2 * k)
        col = tl.load(place + 2 * k + 1)
        b_acc = dot(b_x, b_ones, b_acc)
    tl.store(out + (pid * BM + o_m)[:, None] * 16 + tl.arange(0, 16)[None, :], b_acc)


@triton.jit
def tma_probe(x, place, out, boxes, BM: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):
    pid = tl.program_id(0)
    b_ones = tl.full((WIDTH, 16), 1.0, tl.bfloat16)
    b_acc = tl.zeros((BM, 16), tl.float32)
    row = tl.load(place + 2 * pid * boxes)
    col = tl.load(place + 2 * pid * boxes + 1)
    for i in tl.range(0, boxes, num_stages=STAGES):
        b_x = x.load([row * BM, col * WIDTH])
        k = pid * boxes + (i + 1) % boxes
        row = tl.load(place + 2 * k)
        col = tl.load(place + 2 * k + 1)
        b_acc = dot(b_x, b_ones, b_acc)
    o_m = tl.arange(0, BM)
    tl.store(out + (pid * BM + o_m)[:, None] * 16 + tl.arange(0, 16)[None, :], b_acc)


def _boxes_expected(x: Tensor, place: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Row sums over the boxes of program 0, and of their absolute values: [rows] float64."""
    total = torch.zeros(rows, dtype=torch.float64, device=x.device)
    absolute = torch.zeros_like(total)
    for row, col in place[0].tolist():
        box = x[row * rows : (row + 1) * rows, col * width : (col + 1) * width].double()
        total, absolute = total + box.sum(1), absolute + box.abs().sum(1)
    return total, absolute


def l2(scale: Scale, failed: dict[str, str]) -> list[Figure]:
    """Bytes per second from L2 to shared memory in random boxes; x fits into L2 and is warm there."""
    generator, timer = torch.Generator().manual_seed(0), scale.timer()
    x = torch.randn(scale.tokens, scale.features, generator=generator).to(scale.device, torch.bfloat16)
    figures = []
    for kind, width in itertools.product(("tma", "gather"), WIDTHS):
        if kind == "tma" and not scale.tma:
            failed[f"l2 tma {width}"] = "descriptors need compute capability 9.0"
            continue
        tried: dict[str, float] = {}
        settings = itertools.product((4, 8), (3, 5), (1, 2)) if scale.device == "cuda" else [(4, 2, 1)]
        for warps, stages, per_sm in settings:
            config = f"{warps} warps, {stages} stages, {per_sm} programs per SM"
            programs = scale.programs * per_sm
            where = [scale.tokens // scale.rows, scale.features // width]
            place = torch.stack(
                [torch.randint(n, (programs, scale.boxes), generator=generator) for n in where], dim=2
            ).to(scale.device, torch.int32)
            out = torch.zeros(programs, scale.rows, 16, device=scale.device)
            options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
            try:
                call = _box_call(kind, x, place, out, scale, width, stages, options)
                call()
                want, absolute = _boxes_expected(x, place, scale.rows, width)
                error = float(((out[0, :, 0].double() - want).abs() / absolute).max())
                if not error < 1e-4:
                    raise ValueError(f"wrong sums, relative error {error:.1e}")
                seconds = _seconds(call, timer, scale.rounds, cold=False)
            except Exception as error:
                failed[f"l2 {kind} {width}: {config}"] = one_line(error)
                continue
            tried[config] = programs * scale.boxes * scale.rows * width * 2 / seconds
        if tried:
            figures.append(_best(f"L2 to shared memory, {kind}, boxes {scale.rows}x{width}", "bytes/s", tried))
    return figures


def _box_call(
    kind: str, x: Tensor, place: Tensor, out: Tensor, scale: Scale, width: int, stages: int, options: dict[str, Any]
) -> Callable[[], object]:
    grid, boxes = (place.shape[0],), place.shape[1]
    if kind == "tma":
        from triton.tools.tensor_descriptor import TensorDescriptor

        box = TensorDescriptor.from_tensor(x, [scale.rows, width])
        return lambda: tma_probe[grid](box, place, out, boxes, scale.rows, width, stages, **options)
    stride = x.stride(0)
    return lambda: gather_probe[grid](x, place, out, boxes, stride, scale.rows, width, stages, **options)


# -- memory and launches -----------------------------------------------------------------------------------------------


@triton.jit
def empty_probe(x):
    pass


def memory(scale: Scale, failed: dict[str, str]) -> list[Figure]:
    """Copy bandwidth of the memory; host and device cost of launching a kernel that does nothing."""
    timer = scale.timer()
    source = torch.randint(256, (scale.copy_bytes,), dtype=torch.uint8).to(scale.device)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), timer, scale.rounds)
    figures = [Figure("memory copy, reads and writes", 2 * scale.copy_bytes / seconds, "bytes/s")]
    x = torch.zeros(16, device=scale.device)
    launches = 300 if scale.device == "cuda" else 3

    def launch() -> None:
        empty_probe[(1,)](x)

    for name, call in {"Triton kernel": launch, "torch operator": lambda: x.add_(1)}.items():
        call()
        start = time.perf_counter()
        for _ in range(launches):
            call()
        figures.append(Figure(f"launch from the host, {name}", (time.perf_counter() - start) / launches, "s"))
    if scale.device == "cuda":
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(launches):
                    launch()
            per_replay = _seconds(graph.replay, timer, scale.rounds)
            figures.append(Figure("launch in a CUDA graph, empty kernel", per_replay / launches, "s"))
        except Exception as error:
            failed["launch in a CUDA graph"] = one_line(error)
    return figures


# -- dense products ----------------------------------------------------------------------------------------------------


def gemm(scale: Scale, failed: dict[str, str]) -> list[Figure]:
    """FLOP/s of the dense product of torch in bfloat16, random data, cold L2."""
    timer, figures, n = scale.timer(), [], scale.gemm
    generator = torch.Generator(scale.device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=scale.device).to(torch.bfloat16)

    for m, i, o in ((n, n, n), *scale.shapes):
        x, w, dy, bias = draw(m, i), draw(o, i), draw(m, o), draw(o)
        products: dict[str, Callable[[], object]] = {
            "forward": lambda x=x, w=w, bias=bias: F.linear(x, w, bias),
            "dgrad": lambda dy=dy, w=w: dy @ w,
            "wgrad": lambda dy=dy, x=x: dy.t() @ x,
        }
        for name, call in products.items():
            try:
                seconds = _seconds(call, timer, scale.rounds)
                figures.append(Figure(f"dense {name} {m}x{i}->{o}", 2.0 * m * i * o / seconds, "FLOP/s"))
            except Exception as error:
                failed[f"dense {name} {m}x{i}->{o}"] = one_line(error)
    return figures


@triton.jit
def gemm_probe(
    x, w, y, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m_tiles = tl.cdiv(M, BM)
    n_tiles = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        in_group = GROUP * n_tiles
        first = tile // in_group * GROUP
        height = tl.minimum(m_tiles - first, GROUP)
        i_m = first + tile % in_group % height
        i_n = tile % in_group // height
        b_acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
            b_x = x.load([i_m * BM, k * BK])
            b_w = w.load([i_n * BN, k * BK])
            b_acc = dot(b_x, b_w.T, b_acc)
        y.store([i_m * BM, i_n * BN], b_acc.to(tl.bfloat16))


CEILING_TILES = ((128, 256, 64, 8, 3, 1), (256, 128, 64, 8, 3, 1), (128, 128, 64, 4, 3, 2), (128, 128, 64, 8, 4, 1))


def ceiling(scale: Scale, failed: dict[str, str]) -> list[Figure]:
    """FLOP/s of a dense persistent Triton kernel with descriptors: what a sparse one of the same kind can't pass."""
    if not scale.tma:
        failed["ceiling"] = "descriptors need compute capability 9.0"
        return []
    timer, figures, n = scale.timer(), [], scale.gemm
    generator = torch.Generator(scale.device).manual_seed(0)
    for m, i, o in ((n, n, n), *scale.shapes[-1:]) if scale.device == "cpu" else ((n, n, n), (8192, 4096, 4096)):
        x = torch.randn(m, i, generator=generator, device=scale.device).to(torch.bfloat16)
        w = torch.randn(o, i, generator=generator, device=scale.device).to(torch.bfloat16)
        y = torch.empty(m, o, device=scale.device, dtype=torch.bfloat16)
        want = F.linear(x, w)
        tried: dict[str, float] = {}
        for bm, bn, bk, warps, stages, per_sm in CEILING_TILES if scale.device == "cuda" else [(32, 32, 32, 4, 2, 1)]:
            config = f"{bm}x{bn}x{bk}, {warps} warps, {stages} stages, {per_sm} programs per SM"
            try:
                call = _gemm_call(x, w, y, (bm, bn, bk), scale.programs * per_sm, warps, stages)
                call()
                error = float((y.float() - want.float()).abs().max() / want.float().abs().max())
                if not error < 1e-2:
                    raise ValueError(f"wrong product, relative error {error:.1e}")
                tried[config] = 2.0 * m * i * o / _seconds(call, timer, scale.rounds)
            except Exception as error:
                failed[f"ceiling {m}x{i}->{o}: {config}"] = one_line(error)
        if tried:
            figures.append(_best(f"dense Triton {m}x{i}->{o}", "FLOP/s", tried))
    return figures


def _gemm_call(
    x: Tensor, w: Tensor, y: Tensor, tile: tuple[int, int, int], programs: int, warps: int, stages: int
) -> Callable[[], object]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), (n, _), (bm, bn, bk) = x.shape, w.shape, tile
    boxes = [TensorDescriptor.from_tensor(t, box) for t, box in ((x, [bm, bk]), (w, [bn, bk]), (y, [bm, bn]))]
    return lambda: gemm_probe[(programs,)](*boxes, m, n, k, *tile, 8, stages, num_warps=warps, num_stages=stages)


def facts(figures: list[Figure]) -> dict[str, Any]:
    """Figures under the names that the backend's model of a GPU has for them."""
    by_name = {figure.name: figure.value for figure in figures}
    out: dict[str, Any] = {}
    boxes = [value for name, value in by_name.items() if name.startswith("L2 to shared memory")]
    if boxes:
        out["l2_bandwidth"] = max(boxes)
    if "memory copy, reads and writes" in by_name:
        out["hbm_bandwidth"] = by_name["memory copy, reads and writes"]
    if "launch in a CUDA graph, empty kernel" in by_name:
        out["launch"] = by_name["launch in a CUDA graph, empty kernel"]
    square = [value for name, value in by_name.items() if name == "dense forward 8192x8192->8192"]
    if square:
        out["dense_flops"] = {"bfloat16": square[0]}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    want = parser.parse_args()
    scale, failed = Scale.of(want.device), {}
    parts: dict[str, Callable[[Scale, dict[str, str]], list[Figure]]] = {
        "l2": l2, "memory": memory, "gemm": gemm, "ceiling": ceiling,
    }  # fmt: skip
    figures = parts[want.part](scale, failed)
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4g} {figure.unit}  {figure.config}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    kept = adapters.remember(facts(figures)) if want.device == "cuda" else "not kept: a rehearsal"
    print(f"for the model of this GPU: {kept}")
    files.write_json(
        want.out,
        {
            "kind": "probes",
            "part": want.part,
            "device": want.device,
            "machine_info": machine.machine_info(),
            "figures": [asdict(figure) for figure in figures],
            "failed": failed,
            "remembered": kept,
        },
    )
    print(f"{len(figures)} figures, {len(failed)} failures")
    if not figures:
        raise SystemExit(f"probe {want.part}: expected at least one figure, all failed")


if __name__ == "__main__":
    main()
