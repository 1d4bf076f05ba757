"""Plots of a report. Each figure is drawn twice: as PNG on white, and as SVG whose colours follow the page's theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.patches
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from sparsekern.report.results import PassRow, PeerRow, Results, TrainRow
from sparsekern.report.summary import break_even, grouped, main_shape
from sparsekern.report.tables import place, significant

_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}
# In order of block size; of middle lightness, so that they stand out on white and on black.
_BLOCK_COLOURS = ("#d1495b", "#e58a2e", "#b59a00", "#3a9d5d", "#2e7fd0", "#8659c9", "#5f6b7a")
_PARTS = {"forward": "#2e7fd0", "loss": "#8a8f98", "backward": "#3a9d5d", "optimizer": "#e58a2e"}


@dataclass(frozen=True)
class Theme:
    """Colours of what is not data."""

    ink: str
    muted: str
    grid: str


_ON_WHITE = Theme("#1c2026", "#6a717c", "#d9dde3")
# Colours no one would pick, replaced by CSS variables in the SVG.
_MARKED = Theme("#010203", "#020304", "#030405")
_VARIABLES = {"#010203": "var(--ink)", "#020304": "var(--muted)", "#030405": "var(--line)"}

Draw = Callable[[Theme], Figure]


def figures(results: Results) -> dict[str, Draw]:
    """Every figure that these results have the rows for: ``{file name without suffix: function that draws it}``."""
    out: dict[str, Draw] = {}
    if results.training:
        out["training"] = lambda theme: training(results.training, theme)
    kinds = grouped(results.passes, lambda row: (row.op, row.memory_format, row.device, row.dtype, row.mode))
    for (op, memory_format, *where), rows in kinds.items():
        name = op if memory_format == "row-major" else f"{op}-{memory_format}"
        name = "-".join([name, *(w for w, usual in zip(where, ("cpu", "float32", "auto"), strict=True) if w != usual)])
        if len({row.sparsity for row in rows}) > 1:
            out[f"speedup-{name}"] = lambda theme, rows=rows: curves(rows, theme)  # type: ignore[misc]
        out[f"heatmap-{name}"] = lambda theme, rows=rows: heatmap(rows, theme)  # type: ignore[misc]
    if results.peers:
        out["peers"] = lambda theme: peers(results.peers, theme)
    return out


def save_png(draw: Draw, path: Path) -> None:
    with matplotlib.rc_context(_STYLE):
        draw(_ON_WHITE).savefig(path, dpi=140, facecolor="white")


def to_svg(draw: Draw, name: str) -> str:
    """An ``<svg>`` element for inlining; ``name`` keeps its internal ids apart from other figures'."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name, "svg.id": f"figure-{name}"}):
        buffer = io.StringIO()
        draw(_MARKED).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(
        r'\bid="(axes|patch|text|line2d|matplotlib|xtick|ytick|legend|LineCollection|PolyCollection)[^"]*"', "", svg
    )
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def _block_colours(blocks: Sequence[int]) -> dict[int, str]:
    return {block: _BLOCK_COLOURS[i % len(_BLOCK_COLOURS)] for i, block in enumerate(sorted(blocks))}


def _dress(axes: Any, theme: Theme) -> None:
    axes.tick_params(colors=theme.muted, which="both", labelcolor=theme.ink)
    for spine in axes.spines.values():
        spine.set_color(theme.grid)
    axes.title.set_color(theme.ink)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    axes.set_axisbelow(True)


def _legend(axes: Any, theme: Theme, **options: Any) -> None:
    axes.legend(frameon=False, labelcolor=theme.ink, **options)


def curves(rows: Sequence[PassRow], theme: Theme) -> Figure:
    """Speed-up against density, log-log, a line per block; panels are passes (across) and threads (down)."""
    shape = main_shape(rows)
    rows = [row for row in rows if row.shape == shape]
    passes, threads = list(dict.fromkeys(row.pass_ for row in rows)), sorted({row.threads for row in rows})
    colours = _block_colours(sorted({row.block for row in rows}))
    densities = sorted({row.density for row in rows})
    sparsities = sorted({row.sparsity for row in rows})
    figure = Figure(figsize=(3.3 * max(2, len(passes)), 3.1 * len(threads) + 0.4), layout="constrained")
    panels = figure.subplots(len(threads), len(passes), squeeze=False, sharex=True, sharey=True)
    figure.suptitle(f"{rows[0].op} {shape}, {rows[0].memory_format}: speed-up over dense", color=theme.ink, fontsize=10)
    for across, pass_ in enumerate(passes):
        for down, count in enumerate(threads):
            axes = panels[down][across]
            here = [row for row in rows if row.pass_ == pass_ and row.threads == count]
            ends = [densities[0] * 0.9, densities[-1] * 1.1]
            axes.plot(ends, [1 / d for d in ends], "--", color=theme.muted, linewidth=1, label="ideal 1/density")
            axes.axhline(1.0, color=theme.ink, linewidth=1)
            for block, members in grouped(sorted(here, key=lambda r: r.block), lambda row: row.block).items():
                points = sorted((row.density, row.speedup) for row in members)
                crossing, label = break_even(points)
                axes.plot(
                    *zip(*points, strict=True),
                    *("o-",),
                    color=colours[block],
                    markersize=3,
                    linewidth=1.4,
                    label=f"block {block}, break-even {label}",
                )
                if crossing is not None:
                    axes.plot([crossing], [1.0], "D", color=colours[block], markersize=5, markeredgecolor=theme.ink)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(True, which="major", color=theme.grid, linewidth=0.5)
            axes.set_title(f"{pass_}, {place(rows[0].device, count)}")
            if down == len(threads) - 1:
                axes.set_xlabel("density")
            if across == 0:
                axes.set_ylabel("dense time / sparse time")
            _legend(axes, theme, fontsize=6.5, loc="upper left")
            _dress(axes, theme)
    ticks = [(100 - s) / 100 for s in sparsities]
    panels[0][0].set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    panels[0][0].set_xticks([], minor=True)
    panels[0][0].invert_xaxis()
    marks = [mark for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if _within(mark, panels[0][0].get_ylim())]
    panels[0][0].set_yticks(marks, [f"{mark:g}x" if mark != 1 else "1x = dense" for mark in marks])
    panels[0][0].set_yticks([], minor=True)
    return figure


def _within(value: float, limits: tuple[float, float]) -> bool:
    return min(limits) <= value <= max(limits)


def heatmap(rows: Sequence[PassRow], theme: Theme) -> Figure:
    """Speed-up by shape and block (down) and sparsity (across), a panel per pass, at the highest thread count."""
    threads = max(row.threads for row in rows)
    rows = [row for row in rows if row.threads == threads]
    passes = list(dict.fromkeys(row.pass_ for row in rows))
    lines = list(dict.fromkeys((row.shape, row.block) for row in sorted(rows, key=lambda r: r.block)))
    lines.sort(key=lambda line: [row.shape for row in rows].index(line[0]))
    sparsities = sorted({row.sparsity for row in rows})
    cells = {(row.pass_, row.shape, row.block, row.sparsity): row.speedup for row in rows}
    figure = Figure(
        figsize=(1.9 + 0.55 * len(sparsities) * len(passes) + 0.6, 1.0 + 0.24 * len(lines)), layout="constrained"
    )
    panels = figure.subplots(1, len(passes), squeeze=False, sharey=True)[0]
    what = f"{rows[0].op}, {rows[0].memory_format}: speed-up over dense, {place(rows[0].device, threads)}"
    what += "" if rows[0].dtype == "float32" else f", {rows[0].dtype}"
    figure.suptitle(what, color=theme.ink, fontsize=10)
    norm = TwoSlopeNorm(0.0, min(-2.0, math.log2(min(cells.values()))), max(2.0, math.log2(max(cells.values()))))
    colours = matplotlib.colormaps["RdBu"]
    for axes, pass_ in zip(panels, passes, strict=True):
        for y, (shape, block) in enumerate(lines):
            for x, sparsity in enumerate(sparsities):
                speedup = cells.get((pass_, shape, block, sparsity))
                if speedup is None:
                    continue
                # The ends of the map are too dark to read on: use its middle 70 %.
                face = colours(0.15 + 0.7 * float(norm(math.log2(speedup))))
                axes.add_patch(matplotlib.patches.Rectangle((x, y), 0.96, 0.92, facecolor=face, edgecolor="none"))
                luminance = 0.299 * face[0] + 0.587 * face[1] + 0.114 * face[2]
                ink = "#101317" if luminance > 0.5 else "#ffffff"
                label = significant(speedup, 2 if speedup < 10 else 3)
                axes.text(x + 0.48, y + 0.46, label, ha="center", va="center", fontsize=6.5, color=ink)
        axes.set_xlim(0, len(sparsities))
        axes.set_ylim(len(lines), 0)
        axes.set_xticks([i + 0.48 for i in range(len(sparsities))], [f"{s} %" for s in sparsities])
        axes.set_yticks([i + 0.46 for i in range(len(lines))], [f"{shape}  block {block}" for shape, block in lines])
        axes.set_title(pass_)
        axes.tick_params(length=0)
        _dress(axes, theme)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def peers(rows: Sequence[PeerRow], theme: Theme) -> Figure:
    """Speed-up over dense of sparsekern and peers at the sparsity nearest 90 %, at the least thread count."""
    threads = min(row.threads for row in rows)
    sparsity = min((row.sparsity for row in rows), key=lambda s: abs(s - 90))
    rows = [row for row in rows if row.threads == threads and row.sparsity == sparsity]
    passes, blocks = list(dict.fromkeys(row.pass_ for row in rows)), sorted({row.block for row in rows})
    most = max(len(row.speedups) for row in rows) + 1
    figure = Figure(figsize=(4.4 * len(passes), (0.5 + 0.2 * most) * len(blocks) + 0.4), layout="constrained")
    panels = figure.subplots(len(blocks), len(passes), squeeze=False)
    where = place(rows[0].device, threads)
    what = f"linear {rows[0].shape}, {sparsity} % sparse, {where}: speed-up over dense"
    figure.suptitle(what, color=theme.ink, fontsize=10)
    for down, block in enumerate(blocks):
        for across, pass_ in enumerate(passes):
            axes = panels[down][across]
            row = next((row for row in rows if row.block == block and row.pass_ == pass_), None)
            if row is None:
                axes.set_visible(False)
                continue
            bars = sorted([("sparsekern", row.speedup), *row.speedups.items()], key=lambda bar: bar[1])
            names, values = [name for name, _ in bars], [value for _, value in bars]
            colours = ["#2e7fd0" if name == "sparsekern" else "#8a8f98" for name in names]
            axes.barh(names, values, color=colours, height=0.7)
            for y, value in enumerate(values):
                axes.text(value, y, f" {significant(value, 2)}x", va="center", color=theme.ink, fontsize=7)
            axes.axvline(1.0, color=theme.ink, linewidth=1)
            axes.set_xlim(0, max(1.2, max(values) * 1.15))
            axes.set_title(f"{pass_}, block {block}")
            axes.tick_params(axis="y", length=0)
            _dress(axes, theme)
    return figure


def training(rows: Sequence[TrainRow], theme: Theme) -> Figure:
    """Step time relative to dense, stacked by part: dense, narrow dense of equal MACs, sparse; a panel per threads."""
    by_threads = grouped(sorted(rows, key=lambda row: row.threads), lambda row: row.threads)
    groups = max(len(members) for members in by_threads.values())
    figure = Figure(figsize=(max(7.0, 1.2 + 0.85 * groups), 3.3 * len(by_threads)), layout="constrained")
    panels = figure.subplots(len(by_threads), 1, squeeze=False)[:, 0]
    who = ("dense", "narrow", "sparse")
    for axes, (threads, members) in zip(panels, by_threads.items(), strict=True):
        for g, row in enumerate(members):
            dense = row.contenders["dense"].seconds
            for b, name in enumerate(who):
                bottom, x = 0.0, g + (b - 1) * 0.28
                for part, colour in _PARTS.items():
                    height = row.contenders[name].parts[part] / dense
                    label = part if g == 0 and b == 0 else None
                    axes.bar(x, height, 0.25, bottom, color=colour, label=label)
                    bottom += height
                if name != "dense":
                    speedup = dense / row.contenders[name].seconds
                    colour = "#d1495b" if speedup < 1 and name == "sparse" else theme.ink
                    axes.text(x, bottom + 0.02, f"{significant(speedup, 2)}x", ha="center", color=colour, fontsize=6.5)
        labels = [f"{row.model}\n{row.sparsity} %, block {row.block}" for row in members]
        axes.set_xticks(range(len(members)), labels, fontsize=6.5)
        axes.axhline(1.0, color=theme.muted, linewidth=0.7)
        axes.set_ylabel("step time / dense step time")
        axes.set_ylim(0, max(1.35, axes.get_ylim()[1] * 1.1))
        order = "bars from the left: dense, narrow dense of the sparse net's MACs, sparse"
        axes.set_title(f"training step, {place(members[0].device, threads)} ({order})")
        _legend(axes, theme, fontsize=7, ncols=4, loc="upper right")
        _dress(axes, theme)
    return figure
