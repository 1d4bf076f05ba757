"""Measured kernels: the shipped ``tables/kernels.json`` and the user's cache, in one format.

Shipped: ``{"version": 1, "gpus": {gpu: {key: entry}}}``; the user's cache holds ``{key: entry}`` of one GPU as "tiles".
A key names op, dtype, block, tokens (nearest power of two), shape and density (nearest of :data:`DENSITIES`), and of a
convolution also taps, groups and stride area. An entry holds the kernel, a Triton tile or a CUDA plan (which has a
"family"), seconds of the kernel and of the dense op, and the exact tokens, pixels and slots they were measured at.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparsekern.backends import user_cache
from sparsekern.backends.cuda.plan import Plan
from sparsekern.backends.gpu import chips
from sparsekern.backends.gpu.families import Kernel
from sparsekern.backends.gpu.problem import Problem, Window
from sparsekern.backends.triton.tile import Tile

VERSION = 1
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
# An entry answers for other shapes up to these many doublings of tokens, features and density together: assumed, the
# best kernel changes slowly with the shape, and its time is scaled by the model.
REACH = 2.0


@dataclass(frozen=True)
class Found:
    """A measured kernel.

    Attributes:
        problem: what it was measured on.
        source: "tuned" (the user's cache) or "table" (shipped).
    """

    kernel: Kernel
    problem: Problem
    seconds: float
    dense_seconds: float
    source: str


def token_bucket(m: int) -> int:
    """The nearest power of two, by ratio."""
    return 1 << max(round(math.log2(max(m, 1))), 0)


def density_bucket(density: float) -> float:
    """The nearest of :data:`DENSITIES`, by ratio."""
    return min(DENSITIES, key=lambda known: abs(math.log(known / max(density, 1e-9))))


def family(problem: Problem) -> str:
    """What an entry must share with a problem to say anything about it."""
    p = problem
    conv = f" t{p.taps} g{p.groups} s{p.stride_area}" if p.kind == "conv2d" else ""
    return f"{p.op} {p.dtype} b{p.block[0]}x{p.block[1]}{conv}"


def key(problem: Problem) -> str:
    """Identity of an entry."""
    shape = f"{problem.out_features}x{problem.in_features}"
    return f"{family(problem)} m{token_bucket(problem.m)} {shape} d{density_bucket(problem.density):g}"


_shipped: dict[str, dict[str, Any]] | None = None
_tuned: dict[Path, dict[str, Any]] = {}
_generation = 0


def generation() -> int:
    """Grows whenever an entry is added or forgotten; part of the keys of whoever remembers choices."""
    return _generation


def reload() -> None:
    """Read both tables again at the next look-up."""
    global _shipped, _generation
    _shipped = None
    _tuned.clear()
    _generation += 1


def shipped() -> dict[str, dict[str, Any]]:
    """{gpu: {key: entry}} of the package; empty if its version is another."""
    global _shipped
    if _shipped is None:
        content = json.loads(
            importlib.resources.files("sparsekern").joinpath("backends/tables/kernels.json").read_text()
        )
        _shipped = content["gpus"] if content.get("version") == VERSION else {}
    return _shipped


def tuned(gpu: str) -> dict[str, Any]:
    """{key: entry} of the user's cache."""
    path = chips.cache_file(gpu)
    if path not in _tuned:
        _tuned[path] = chips.read_cache(gpu)["tiles"]
    return _tuned[path]


def lookup(gpu: str, problem: Problem) -> Iterator[Found]:
    """Entries that answer for ``problem``, best first.

    An entry of the same key, the user's before the shipped one; then the nearest others of the same op, dtype and
    block: those of the same O and I first, then by the distance :data:`REACH` bounds.
    """
    sources = (("tuned", tuned(gpu)), ("table", shipped().get(gpu, {})))
    near: list[tuple[bool, float, int, Found]] = []
    for order, (source, entries) in enumerate(sources):
        for text, entry in entries.items():
            if not text.startswith(family(problem) + " "):
                continue
            found = _read(problem, entry, source)
            if found is None:
                continue
            distance = _distance(problem, found.problem)
            same = text == key(problem)
            if same or distance <= REACH:
                own = found.problem
                reshaped = (own.out_features, own.in_features) != (problem.out_features, problem.in_features)
                near.append((reshaped, -1.0 if same else distance, order, found))
    near.sort(key=lambda candidate: candidate[:3])
    return (found for *_, found in near)


def _read(problem: Problem, entry: Any, source: str) -> Found | None:
    """None for an entry that is not what this version writes: caches outlive versions."""
    try:
        kernel = _kernel(entry)
        sizes = {name: int(entry[name]) for name in ("m", "out_features", "in_features", "capacity")}
        if problem.kind == "conv2d":
            sizes["source"] = int(entry["source"])
        times = float(entry["seconds"]), float(entry["dense_seconds"])
        window = _window(entry["window"]) if entry.get("window") else None
    except (KeyError, TypeError, ValueError):
        return None
    if kernel is None or min(*sizes.values(), *times) <= 0:
        return None
    if isinstance(kernel, Plan) and (problem.window is None) != (window is None):
        return None  # plans of a convolution depend on its exact geometry
    own = replace(
        problem,
        m=sizes["m"],
        out_features=sizes["out_features"],
        in_features=sizes["in_features"],
        capacity=sizes["capacity"],
        source=sizes.get("source", 0),
        window=window,
    )
    return Found(kernel, own, *times, source)


def _kernel(entry: Any) -> Kernel | None:
    """The kernel of an entry; None where a number is not one."""
    if "family" in entry:
        fields = {name: entry[name] for name in Plan.__dataclass_fields__}
        fields["tile"] = tuple(fields["tile"])
        numbers = [*fields["tile"], *(value for name, value in fields.items() if name not in ("family", "tile"))]
        plan = Plan(**fields)
        return plan if len(plan.tile) == 3 and all(type(number) is int for number in numbers) else None
    tile = Tile(**{name: entry[name] for name in Tile.__dataclass_fields__})
    return tile if all(type(value) is int for name, value in asdict(tile).items() if name != "variant") else None


def _window(entry: Mapping[str, Any]) -> Window:
    return Window(**{name: _size(entry[name]) for name in Window.__dataclass_fields__})


def _size(value: Any) -> Any:
    return tuple(int(side) for side in value) if isinstance(value, list | tuple) else int(value)


def _distance(a: Problem, b: Problem) -> float:
    pairs = (
        (a.m, b.m),
        (a.out_features, b.out_features),
        (a.in_features, b.in_features),
        (a.density, b.density),
    )
    return sum(abs(math.log2(max(x, 1e-9) / max(y, 1e-9))) for x, y in pairs)


def remember(
    gpu: str,
    problem: Problem,
    kernel: Kernel,
    seconds: float,
    dense_seconds: float,
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Add the best measured kernel; :func:`save` writes it. ``skipped`` keeps why others could not run."""
    global _generation
    entry: dict[str, Any] = {
        **asdict(kernel),
        "m": problem.m,
        "out_features": problem.out_features,
        "in_features": problem.in_features,
        "capacity": problem.capacity,
        "seconds": seconds,
        "dense_seconds": dense_seconds,
    }
    if problem.kind == "conv2d":
        entry["source"] = problem.source
    if problem.window is not None:
        entry["window"] = asdict(problem.window)
    if skipped:
        entry["skipped"] = dict(skipped)
    tuned(gpu)[key(problem)] = entry
    _generation += 1


def save(gpu: str) -> Path:
    """Write the user's cache of one GPU, keeping entries that another process added meanwhile."""
    merged = {**chips.read_cache(gpu)["tiles"], **tuned(gpu)}
    _tuned[chips.cache_file(gpu)] = merged
    return chips.write_cache(gpu, tiles=merged)


def export(path: Path | str, gpus: tuple[str, ...]) -> Path:
    """Write the shipped table with the user's entries for ``gpus`` merged in, in the shipped format."""
    merged = {gpu: dict(entries) for gpu, entries in shipped().items()}
    for gpu in gpus:
        own = {text: {k: v for k, v in entry.items() if k != "skipped"} for text, entry in tuned(gpu).items()}
        merged.setdefault(gpu, {}).update(own)
    about = "Tuned kernels by GPU, measured by sparsekern.tune; seconds are medians with a cold L2."
    return user_cache.write(Path(path), {"about": about, "version": VERSION, "gpus": merged})
