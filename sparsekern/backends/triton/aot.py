"""Compile the shipped tiles for GPUs that need not be there, and check what came out.

``python -m sparsekern.backends.triton.aot --arch 80 90 100`` prints a table and fails if a check does. The checks are
those of :func:`problems`; ``--sample`` compiles a part that has every variant, dtype and extreme block.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.problem import Problem
from sparsekern.backends.triton import model, tiles
from sparsekern.backends.triton.compiled import Compiled, compile_all, jobs_here, key
from sparsekern.backends.triton.recorded import Call, calls
from sparsekern.backends.triton.tile import (
    SHARED_RESERVE,
    Tile,
    rows,
    shared_bytes,
    stage_elements,
    warpgroups,
)

ARCHS = (80, 90, 100)
CHIP = {80: "a100", 90: "h200", 100: "b200"}  # whose figures the predictions take
# The call whose efficiency the table predicts.
TOKENS, FEATURES, DENSITY = 8192, 4096, 0.1
# Copies of 4 bytes that fetch indices of later stages; operands come by 16 bytes, or 8 where a thread has no more.
INDEX_COPIES = 4
# The dgrad of "union" fetches a slot per column as well: 8 a thread and turn of the loop with Triton 3.6.
SLOT_COPIES = 16
# ptxas puts a few values aside well below the limit of registers. In the machine code of four such kernels one to four
# were written once and read once per output tile or, in an fp32 wgrad, per stage of a thousand multiply-adds. Bytes
# stored and loaded; more than this, or any at the limit of registers, is a spill.
PUT_ASIDE = 32
MOST_REGISTERS = 255
PER_SM = 32  # programs that one multiprocessor holds at most

SAMPLE_BLOCKS = ((16, 16), (128, 128), (16, 128), (128, 16))
SAMPLE_DTYPES = ("bfloat16", "tf32", "float32")


@dataclass(frozen=True)
class Row:
    """One kernel of one shipped tile, as compiled."""

    problem: Problem
    tile: Tile
    arch: int
    kernel: str
    compiled: Compiled

    @property
    def main(self) -> bool:
        """Whether this kernel multiplies; the other one adds up the chunks of wgrad."""
        return self.kernel != "sum_chunks_kernel"

    @property
    def unit(self) -> str:
        """What multiplies: "wgmma", "mma.sync", "tcgen05", "fma", several or none of them."""
        c = self.compiled
        counts = (("wgmma", c.wgmma), ("mma.sync", c.mma), ("tcgen05", c.tcgen05))
        return "+".join(name for name, count in counts if count) or ("fma" if c.fma else "none")

    @property
    def resident(self) -> int:
        """Programs that registers, shared memory and threads let one multiprocessor hold at a time."""
        chip, threads = chips.get(CHIP.get(self.arch, f"sm{self.arch}")), 32 * self.tile.warps
        registers = -(-self.compiled.registers // 8) * 8 * threads
        shared = self.compiled.shared + 1024  # the driver's own
        return min(chip.shared_per_sm // shared, chip.registers // max(registers, 1), chip.threads // threads, PER_SM)

    @property
    def efficiency(self) -> float:
        """Predicted by the model for the table's call."""
        chip = chips.get(CHIP.get(self.arch, f"sm{self.arch}"))
        p = self.problem
        pixels = TOKENS * p.stride_area if p.kind == "conv2d" else 0
        standard = replace(p, m=TOKENS, out_features=FEATURES, in_features=FEATURES, source=pixels).at_density(DENSITY)
        return model.efficiency(standard, self.tile, chip)


def expected_unit(problem: Problem, tile: Tile, arch: int) -> str:
    """What must multiply: warpgroups need 64 rows, plain fp32 has no tensor cores."""
    if problem.dtype == "float32":
        return "fma"
    if not warpgroups(arch) or rows(problem, tile) < 64:
        return "mma.sync"
    return "wgmma" if arch < 100 else "tcgen05"


def small_copies(problem: Problem, tile: Tile, arch: int) -> bool:
    """Whether operands may come by 4 bytes: ``wgmma`` and ``tcgen05`` want the reduction along the rows of TF32
    operands, so one that lies the other way is transposed on its way to shared memory."""
    transposing = expected_unit(problem, tile, arch) in ("wgmma", "tcgen05")
    return problem.dtype == "tf32" and problem.step != "forward" and transposing


def problems(row: Row) -> tuple[str, ...]:
    """What is wrong with a compiled kernel; empty if nothing is.

    It compiles, without spilled registers (:data:`PUT_ASIDE`); it fits the chip's shared memory; and if it multiplies:
    by the expected instruction, no wgmma waiting for another, operands copied asynchronously by 16 bytes (8 where a
    thread has no more) or by descriptor, within the shared memory that the tile is counted with.
    """
    c, p, t = row.compiled, row.problem, row.tile
    if c.error:
        return (c.error,)
    found = []
    if c.spilled > (PUT_ASIDE if c.registers < MOST_REGISTERS else 0):
        found.append(f"{c.spilled} bytes of registers spilled")
    if c.shared > chips.shared_limit(row.arch):
        found.append(f"shared memory: {c.shared} bytes, the limit is {chips.shared_limit(row.arch)}")
    if not row.main:
        return tuple(found)
    if c.serialized:
        found.append("wgmma instructions wait for one another")
    counted = shared_bytes(p, t, row.arch) + SHARED_RESERVE
    if c.shared > counted:
        found.append(f"shared memory: {c.shared} bytes, counted {counted}")
    if row.unit != expected_unit(p, t, row.arch):
        found.append(f"multiplies by {row.unit}, expected {expected_unit(p, t, row.arch)}")
    if t.variant == "tma":
        if not c.boxes:
            found.append("no copies by descriptor")
    elif not small_copies(p, t, row.arch):
        slots = SLOT_COPIES if (t.variant, p.op) == ("union", "linear_dgrad") else 0
        if c.copies4 > INDEX_COPIES + slots:
            found.append(f"{c.copies4} copies of 4 bytes")
        stage = stage_elements(p, t) * p.itemsize // (32 * t.warps)
        if 16 * c.copies16 + 8 * c.copies8 < stage:
            found.append(f"copies of 16 and 8 bytes bring less than a stage, {stage} bytes per thread")
    return tuple(found)


def sampled(shipped: Iterable[tuple[Problem, Tile]]) -> Iterator[tuple[Problem, Tile]]:
    """The part of the shipped tiles that has every op and variant: blocks :data:`SAMPLE_BLOCKS` in bf16, the square
    ones of them in the other :data:`SAMPLE_DTYPES`, the first tile of each variant."""
    inside = (
        (p, tile)
        for p, tile in shipped
        if p.block in SAMPLE_BLOCKS and p.dtype in SAMPLE_DTYPES and (p.dtype == "bfloat16" or p.block[0] == p.block[1])
    )
    return first_of_variants(inside)


def first_of_variants(shipped: Iterable[tuple[Problem, Tile]]) -> Iterator[tuple[Problem, Tile]]:
    """One tile per op, dtype, block and variant."""
    seen = set()
    for problem, tile in shipped:
        group = (problem.op, problem.dtype, problem.block, tile.variant)
        if group not in seen:
            seen.add(group)
            yield problem, tile


def kernels(shipped: Iterable[tuple[Problem, Tile]], arch: int) -> Iterator[tuple[Problem, Tile, Call]]:
    """The kernels of some tiles; the wgrad that writes chunks differs in its stores alone, so square blocks stand for
    all."""
    for problem, tile in shipped:
        seen = set()
        for call in calls(problem, tile, arch):
            if call.kernel not in seen or problem.block[0] == problem.block[1]:
                yield problem, tile, call
            seen.add(call.kernel)


def gate(
    found: Sequence[tuple[Problem, Tile, Call]], cache: Path, jobs: int = 1, progress: bool = False
) -> tuple[Row, ...]:
    """Compile each distinct call once; a row per kernel and tile."""
    distinct = len({key(call) for *_, call in found})
    results: dict[str, Compiled] = {}
    start = shown = time.monotonic()
    for name, result in compile_all([call for *_, call in found], cache, jobs):
        results[name] = result
        if progress and time.monotonic() - shown > 20:
            shown = time.monotonic()
            print(f"{len(results)} of {distinct} compiled after {shown - start:.0f} s", file=sys.stderr, flush=True)
    return tuple(Row(problem, tile, call.target.arch, call.kernel, results[key(call)]) for problem, tile, call in found)


HEADINGS = (
    "op", "dtype", "block", "tile", "sm", "multiplies", "registers", "spilled", "shared KB", "per SM",
    "copies 16/8/4 B", "boxes", "predicted",
)  # fmt: skip


def describe(tile: Tile) -> str:
    """A tile in a few characters: variant, bm x bk, panel, warps, stages."""
    size = f"{tile.bm}x{tile.bk}" if tile.bk else str(tile.bm)
    return f"{tile.variant} {size} p{tile.panel} w{tile.warps} s{tile.stages}"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, in the order of :data:`HEADINGS`."""
    p, c = row.problem, row.compiled
    name = p.op if row.main else f"{p.op} sums"
    own = (name, p.dtype, f"{p.block[0]}x{p.block[1]}", describe(row.tile), str(row.arch))
    if c.error:
        return (*own, "no code", *[""] * (len(HEADINGS) - len(own) - 1))
    return (
        *own,
        row.unit,
        str(c.registers),
        str(c.spilled),
        f"{c.shared / 1024:.1f}",
        str(row.resident) if row.main else "",
        f"{c.copies16}/{c.copies8}/{c.copies4}",
        str(c.boxes),
        f"{row.efficiency:.0%}" if row.main else "",
    )


def markdown(rows: Sequence[Row], triton_version: str) -> str:
    """The table and what is wrong, as a document."""
    head = (
        f"Triton {triton_version}: {len(rows)} kernels compiled without a GPU. Copies are instructions in the PTX; "
        f"per SM: programs that registers, shared memory and threads allow; predicted: efficiency by the model for "
        f"{TOKENS} tokens, {FEATURES} x {FEATURES}, {1 - DENSITY:.0%} sparse on "
        f"{', '.join(CHIP[arch].upper() for arch in sorted({row.arch for row in rows}) if arch in CHIP)}, not measured."
    )
    lines = [head, "", "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(line) + " |" for line in dict.fromkeys(map(cells, rows))]
    return "\n".join([*lines, ""])


def as_json(rows: Sequence[Row], triton_version: str) -> dict[str, Any]:
    """Everything in the rows, one object per kernel and tile; what is 0 or empty is left out."""
    listed = []
    for row in rows:
        content = {
            "op": row.problem.op,
            "dtype": row.problem.dtype,
            "block": list(row.problem.block),
            "tile": asdict(row.tile),
            "arch": row.arch,
            "kernel": row.kernel,
            "multiplies": row.unit,
            "per_sm": row.resident,
            "predicted_efficiency": round(row.efficiency, 3) if row.main else 0,
            "problems": list(problems(row)),
            **asdict(row.compiled),
        }
        listed.append({name: value for name, value in content.items() if value})
    return {"triton": triton_version, "kernels": listed}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One kernel a line, so that two files compare."""
    lines = ",\n".join(json.dumps(kernel, separators=(",", ":")) for kernel in content["kernels"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"triton": {json.dumps(content["triton"])}, "kernels": [\n{lines}\n]}}\n', encoding="utf-8")


def _block(text: str) -> tuple[int, int]:
    bo, _, bi = text.partition("x")
    return int(bo), int(bi)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sparsekern.backends.triton.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities, as 90")
    parser.add_argument("--dtype", nargs="+", default=tiles.DTYPES, choices=tiles.DTYPES)
    parser.add_argument("--op", nargs="+", default=tiles.OPS, choices=tiles.OPS)
    parser.add_argument("--block", nargs="+", default=tiles.BLOCKS, type=_block, help="as 64x64")
    parser.add_argument("--sample", action="store_true", help="a part with every variant, dtype and extreme block")
    parser.add_argument("--sample-tiles", action="store_true", help="one tile of each variant")
    parser.add_argument("--jobs", type=int, default=jobs_here(), help="processes")
    parser.add_argument("--cache", type=Path, default=Path("build/aot/cache"), help="folder of earlier results")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--quiet", action="store_true", help="print what is wrong, not the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a check fails."""
    import triton

    options = _options(arguments)
    found: list[tuple[Problem, Tile, Call]] = []
    for arch in options.arch:
        shipped: Iterable[tuple[Problem, Tile]] = (
            (p, tile)
            for p, tile in tiles.shipped(arch)
            if p.dtype in options.dtype and p.op in options.op and p.block in options.block
        )
        if options.sample:
            shipped = sampled(shipped)
        elif options.sample_tiles:
            shipped = first_of_variants(shipped)
        found += kernels(shipped, arch)
    if not found:
        print("no shipped tile is selected", file=sys.stderr)
        return 1
    start = time.monotonic()
    rows = gate(found, options.cache, options.jobs, progress=True)
    document = markdown(rows, triton.__version__)
    if options.json:
        write_json(options.json, as_json(rows, triton.__version__))
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(document, encoding="utf-8")
    if not options.quiet:
        print(document)
    wrong = dict.fromkeys(
        f"sm_{row.arch} {row.kernel} {row.problem.op} {row.problem.dtype} "
        f"{row.problem.block[0]}x{row.problem.block[1]} {describe(row.tile)}: {'; '.join(problems(row))}"
        for row in rows
        if problems(row)
    )
    print(*wrong, sep="\n", end="\n" if wrong else "")
    distinct = len({key(call) for *_, call in found})
    print(
        f"Triton {triton.__version__}: {len(rows)} kernels of shipped tiles, {distinct} distinct, "
        f"{len(wrong)} with problems, {time.monotonic() - start:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
