"""Predicted times against the roofline, kernel by kernel: ``python -m sparsekern.backends.cuda.predicted``.

Everything is a prediction by the models of both families (``cuda/model.py``, ``triton/model.py``) with the figures of
``tables/gpus.json``; nothing was measured. ``--out DIR`` writes a page and the numbers for each GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsekern.backends import ConvGeometry
from sparsekern.backends.cuda import model, plans
from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.dense_model import dense_seconds, ideal_seconds
from sparsekern.backends.gpu.problem import Problem, conv_problem
from sparsekern.backends.triton import model as triton_model
from sparsekern.backends.triton import tiles
from sparsekern.layout import BlockGrid

TOKENS = 8192
LINEARS = ((1024, 1024), (768, 3072), (4096, 4096))  # I -> O
IMAGES = 128
CONVS = ((160, 32), (320, 16), (640, 8))  # channels, height: the 3x3 layers of WRN-28-10
STEPS = ("forward", "dgrad", "wgrad")
BLOCKS = (16, 32, 64, 128)
SPARSITIES = (50, 80, 90, 95)
DTYPES = ("bfloat16", "tf32")
CHIPS = ("h200", "a100")


@dataclass(frozen=True)
class Row:
    """One pass of one layer; times in microseconds, ``triton`` and ``cuda`` of their best candidate each.

    Attributes:
        bound: the limit that holds for the CUDA kernel.
        roofline: stored multiply-adds at the rate of cuBLAS, or everything once through device memory.
    """

    layer: str
    step: str
    dtype: str
    block: int
    sparsity: int
    plan: str
    bound: str
    cuda: float
    roofline: float
    triton: float
    dense: float


def layers() -> dict[str, Callable[[str, str, int, float], Problem]]:
    """{name: problem of (step, dtype, block edge, density)}."""

    def linear(inputs: int, outputs: int) -> Callable[[str, str, int, float], Problem]:
        def problem(step: str, dtype: str, block: int, density: float) -> Problem:
            return Problem(f"linear_{step}", dtype, (block, block), TOKENS, outputs, inputs, 1).at_density(density)

        return problem

    def conv(channels: int, height: int) -> Callable[[str, str, int, float], Problem]:
        def problem(step: str, dtype: str, block: int, density: float) -> Problem:
            grid = BlockGrid((channels, channels, 3, 3), (block, block))
            geometry = ConvGeometry((1, 1), (1, 1, 1, 1), (1, 1))
            shape = (IMAGES, channels, height, height)
            return conv_problem(f"conv2d_{step}", dtype, grid, geometry, shape, 1).at_density(density)

        return problem

    found = {f"Linear {i} -> {o}, {TOKENS} tokens": linear(i, o) for i, o in LINEARS}
    return found | {f"Conv 3x3, {IMAGES} images, {c} channels at {h}x{h}": conv(c, h) for c, h in CONVS}


def rows(chip: Chip) -> Iterator[Row]:
    for (name, of), dtype, step, block, sparsity in itertools.product(
        layers().items(), DTYPES, STEPS, BLOCKS, SPARSITIES
    ):
        problem = of(step, dtype, block, 1 - sparsity / 100)
        found = {plan: model.predict(problem, plan, chip) for plan in plans.candidates(problem, chip)}
        best = min(found, key=lambda plan: found[plan].seconds)
        listed = tiles.candidates(problem, chip.arch)
        triton = min(triton_model.seconds(problem, tile, chip) for tile in listed)
        times = (found[best].seconds, ideal_seconds(problem, chip), triton, dense_seconds(problem, chip))
        microseconds = (round(seconds * 1e6, 2) for seconds in times)
        yield Row(name, step, dtype, block, sparsity, str(best), found[best].bound, *microseconds)


def markdown(chip: Chip, table: Sequence[Row]) -> str:
    """A page with a table for each layer and dtype; cells hold predicted microseconds and the limit that holds."""
    assumed = sorted(figure for figure, source in chip.sources if source == "assumed")
    page = [f"# Predicted on {chip.name.upper()}", "", "**Predictions. No CUDA kernel has run on a GPU yet.**", ""]
    page += [
        "Microseconds of one pass, by the models of `sparsekern/backends/cuda/model.py` and "
        "`sparsekern/backends/triton/model.py`. Each cell: CUDA kernel (its bound) / roofline / Triton / dense cuBLAS "
        "or cuDNN. `python -m sparsekern.backends.cuda.predicted` makes these pages.",
        "",
        f"Assumed of this GPU: {', '.join(assumed)}.",
        "",
    ]
    for (layer, dtype), group in itertools.groupby(table, key=lambda row: (row.layer, row.dtype)):
        page += [f"## {layer}, {dtype}", "", f"| pass | block | {' | '.join(f'{s} %' for s in SPARSITIES)} |"]
        page += ["|---|---|" + "---|" * len(SPARSITIES)]
        for (step, block), cells in itertools.groupby(group, key=lambda row: (row.step, row.block)):
            page.append(f"| {step} | {block} | {' | '.join(_cell(row) for row in cells)} |")
        page.append("")
    return "\n".join(page)


def _cell(row: Row) -> str:
    times = (row.roofline, row.triton, row.dense)
    return f"**{row.cuda:.0f}** ({row.bound}) / {' / '.join(f'{time:.0f}' for time in times)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", default=CHIPS, help=f"GPUs of tables/gpus.json (default: {CHIPS})")
    parser.add_argument("--out", type=Path, help="folder for <chip>.md and <chip>.json instead of the terminal")
    want = parser.parse_args(arguments)
    for name in want.chip:
        chip = chips.get(name)
        table = list(rows(chip))
        if want.out is None:
            print(markdown(chip, table))
            continue
        want.out.mkdir(parents=True, exist_ok=True)
        content = {"kind": "predicted", "chip": chip.name, "sources": dict(chip.sources)}
        lines = ",\n  ".join(json.dumps(asdict(row)) for row in table)
        head = json.dumps(content, indent=1)[:-2]
        (want.out / f"{name}.json").write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')
        (want.out / f"{name}.md").write_text(markdown(chip, table))
        print(f"{want.out / name}.md: {len(table)} rows")


if __name__ == "__main__":
    main()
