"""Static, dynamic and gradual sparsity against dense nets, at equal parameters and MACs: which runs that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsekern.training.config import TrainConfig, option_names, suggest
from sparsekern.training.errors import ConfigError
from sparsekern.training.method_options import METHOD_FIELDS, METHODS, TAKES

DENSE, SMALL = "dense", "small"
BASELINES = (DENSE, SMALL)

# What a cell decides by itself; `init` and `channels` would start every cell from one and the same net.
VARIED = ("method", "sparsity", "block", "seed", "override", "init", "channels")

# Unlike a single run: all layers that may be sparse are stored sparse at every block, so that the densities agree, and
# one thread, so that results do not depend on how many workers there are.
BASE = {"schedule": "cosine", "below_break_even": "sparse", "threads": 1, "checkpoint_minutes": 1.0}

# Of methods that move blocks between layers, where `capacity` is not given.
CAPACITY = 2.0


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        method: a method, "dense", or "small" for the narrower dense net with the MACs of ``sparsity``.
        sparsity: 0 for "dense".
        block: "" for both dense nets.
    """

    method: str
    sparsity: float
    block: str
    seed: int

    @property
    def name(self) -> str:
        parts = [self.method]
        parts += [f"s{self.sparsity:g}"] if self.sparsity else []
        parts += [f"b{self.block}"] if self.block else []
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def row(self) -> tuple[str, float, str]:
        """What the cells of all seeds share."""
        return self.method, self.sparsity, self.block


@dataclass(frozen=True)
class DstStudy:
    """The matrix method x sparsity x block x seed, the dense net, and per sparsity the narrower dense net.

    Attributes:
        base: values of :class:`TrainConfig` that all cells share, over those of :data:`BASE`. Options of methods
            (``update_every``, ...) reach the methods that take them.
        widths: by sparsity, the width factor of the narrower dense net, as far as known.

    Raises:
        ConfigError: an empty list, an unknown method, or an option that does not fit a cell.
    """

    methods: tuple[str, ...] = ("static", "set", "rigl", "gradual")
    sparsities: tuple[float, ...] = (0.8, 0.9)
    blocks: tuple[str, ...] = ("1", "8", "16")
    seeds: tuple[int, ...] = (0, 1, 2)
    base: Mapping[str, Any] = field(default_factory=dict)
    widths: Mapping[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("methods", "sparsities", "blocks", "seeds"):
            values = tuple(dict.fromkeys(getattr(self, name)))
            if not values:
                raise ConfigError(f"{name}: expected at least one, got none")
            object.__setattr__(self, name, values)
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(suggest("methods", method, METHODS))
        if any(not 0 < sparsity < 1 for sparsity in self.sparsities):
            shown = ", ".join(f"{s:g}" for s in self.sparsities)
            raise ConfigError(f"sparsities: expected fractions above 0 and below 1, got {shown}")
        for name in self.base:
            if name not in option_names():
                raise ConfigError(suggest("base", name, option_names()))
            if name in VARIED:
                raise ConfigError(f"{name}: the cells of a study differ in it; leave it out of base")
            takers = [method for method in self.methods if name in TAKES[method]]
            if name in METHOD_FIELDS and not takers:
                raise ConfigError(f"{name}: none of the methods {', '.join(self.methods)} takes it; leave it out")
        object.__setattr__(self, "blocks", tuple(dict.fromkeys(str(self._sparse_block(b)) for b in self.blocks)))
        for cell in self.cells():
            if cell.method != SMALL or cell.sparsity in self.widths:
                self.config(cell)

    @staticmethod
    def _sparse_block(block: Any) -> Any:
        normal = TrainConfig(block=block).block
        if normal == "auto":
            raise ConfigError("blocks: expected sizes such as 1, 8 or 16x32, got auto")
        return normal

    def cells(self) -> list[Cell]:
        """All cells, one seed after the other, so that a study that is not finished shows every method."""
        cells = []
        for seed in self.seeds:
            for sparsity in self.sparsities:
                for block in self.blocks:
                    cells += [Cell(method, sparsity, block, seed) for method in self.methods]
            cells.append(Cell(DENSE, 0.0, "", seed))
            cells += [Cell(SMALL, sparsity, "", seed) for sparsity in self.sparsities]
        return cells

    def config(self, cell: Cell) -> TrainConfig:
        """The training run of ``cell``."""
        shared = {**BASE, **self.base, "seed": cell.seed}
        taken = TAKES.get(cell.method, ())
        values = {name: value for name, value in shared.items() if name not in METHOD_FIELDS or name in taken}
        if cell.method == DENSE:
            return TrainConfig(**{**values, "sparsity": 0.0, "sparse_lr": False, "tune": False})
        if cell.method == SMALL:
            width = float(values.get("width", 1.0)) if cell.sparsity not in self.widths else self.widths[cell.sparsity]
            return TrainConfig(**{**values, "sparsity": 0.0, "sparse_lr": False, "tune": False, "width": width})
        if "capacity" in taken:
            values.setdefault("capacity", CAPACITY)
        try:
            return TrainConfig(**{**values, "method": cell.method, "sparsity": cell.sparsity, "block": cell.block})
        except ConfigError as error:
            raise ConfigError(f"{cell.name}: {error}") from None

    def differences(self, other: DstStudy) -> list[str]:
        """Options that change what a cell computes and differ; which cells there are is not compared."""
        kinds = [Cell(m, self.sparsities[0], self.blocks[0], 0) for m in dict.fromkeys((*self.methods, *other.methods))]
        kinds.append(Cell(DENSE, 0.0, "", 0))
        names = [name for cell in kinds for name in self.config(cell).differences(other.config(cell))]
        return list(dict.fromkeys(names))

    def united(self, other: DstStudy) -> DstStudy:
        """This study with the cells of ``other`` added, and its values of options that change no result."""
        lists = {n: (*getattr(self, n), *getattr(other, n)) for n in ("methods", "sparsities", "blocks", "seeds")}
        base = {**self.base, **other.base}
        return dataclasses.replace(self, **lists, base=base, widths={**other.widths, **self.widths})

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only; :meth:`from_dict` is the inverse."""
        return {
            "methods": list(self.methods),
            "sparsities": list(self.sparsities),
            "blocks": list(self.blocks),
            "seeds": list(self.seeds),
            "base": {name: _plain(value) for name, value in self.base.items()},
            "widths": [[sparsity, width] for sparsity, width in self.widths.items()],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DstStudy:
        """Inverse of :meth:`to_dict`."""
        lists = {name: tuple(values[name]) for name in ("methods", "sparsities", "blocks", "seeds")}
        return cls(**lists, base=values["base"], widths={float(s): float(w) for s, w in values["widths"]})


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
