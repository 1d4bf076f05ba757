"""Tune the shapes of the benchmarks: ``python -m benchmarks.tune --out tune.json``.

Goes through ``sparsekern.tune``, which measures Triton's tiles and the CUDA plans of each pass and keeps the winner in
the user's cache (``SPARSEKERN_CACHE``), and exports the table of kernels beside the results. The shapes of the targets
come first; the rest is tuned as long as the time lasts.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsekern as sk
from benchmarks import adapters, files, machine
from benchmarks.device import one_line
from benchmarks.shapes import BLOCKS_GPU, CONV_GPU, LINEAR_GPU, LINEAR_GPU_MORE, ConvShape, LinearShape

SPARSITIES = (90, 80, 95, 50)
TINY = LinearShape(64, 64, 64)
TINY_CONV = ConvShape(2, 32, 32, 6)


def layer_of(shape: LinearShape | ConvShape, device: str) -> tuple[nn.Module, torch.Tensor]:
    """The dense layer in bfloat16 and an input of it; images in channels_last memory."""
    options: dict[str, Any] = {"bias": shape.bias, "device": device, "dtype": torch.bfloat16}
    if isinstance(shape, LinearShape):
        return nn.Linear(shape.i, shape.o, **options), torch.randn(shape.m, shape.i).to(device, torch.bfloat16)
    conv: nn.Module = nn.Conv2d(shape.c, shape.o, shape.r, shape.stride, shape.padding, **options)
    x = torch.randn(shape.n, shape.c, shape.h, shape.h).to(device, torch.bfloat16)
    return conv.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def tune_one(shape: LinearShape | ConvShape, block: int, sparsity: int, device: str, seconds: float) -> dict[str, Any]:
    """Speed-up that ``sparsekern.tune`` reports for one layer, or why it could not."""
    row: dict[str, Any] = {"shape": shape.name, "block": block, "sparsity": sparsity}
    start = time.perf_counter()
    try:
        layer, x = layer_of(shape, device)
        model = nn.Sequential(layer)
        config = sk.SparsityConfig(sparsity=sparsity / 100, block=block, exclude=())
        row["speedup"] = sk.tune(model, x, config, seconds_per_layer=seconds, save=device == "cuda")["0"]
    except Exception as error:
        row["failed"] = one_line(error)
    return {**row, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=240.0)
    want = parser.parse_args()
    tiny = want.device == "cpu"
    cases = (
        [(TINY, 16, 50), (TINY_CONV, 16, 50)]
        if tiny
        else [
            *((LINEAR_GPU, block, sparsity) for sparsity, block in itertools.product(SPARSITIES, BLOCKS_GPU)),
            *itertools.product(CONV_GPU, (64, 32), (90, 80)),
            *itertools.product(LINEAR_GPU_MORE, (64, 32, 128), (90, 80, 95)),
        ]
    )
    deadline, rows = time.perf_counter() + want.budget_s, []
    for shape, block, sparsity in cases:
        if time.perf_counter() > deadline:
            break
        rows.append(tune_one(shape, block, sparsity, want.device, 0.05 if tiny else 1.0))
        print(rows[-1], flush=True)
    exported = adapters.export_tiles(want.out.with_name("tiles.json")) if not tiny else "not exported: a rehearsal"
    print(f"table: {exported}")
    content = {"kind": "tune", "device": want.device, "machine_info": machine.machine_info(), "exported": exported}
    content["kept"] = adapters.kept(want.device)
    print(f"kernels kept: {content['kept']}")
    files.write_json(want.out, {**content, "rows": rows, "left": len(cases) - len(rows)})
    print(f"{sum('speedup' in row for row in rows)} of {len(cases)} layers tuned")
    if all("failed" in row for row in rows):
        raise SystemExit(f"tune: expected at least one tuned layer, all failed: {rows[:1]}")


if __name__ == "__main__":
    main()
