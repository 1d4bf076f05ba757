"""What to sparsify and how much: :class:`SparsityConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from sparsekern.layout import as_block

PATTERNS = ("random", "balanced", "butterfly", "fan_in")
BUDGETS = ("params", "macs")
BELOW_BREAK_EVEN = ("dense", "masked", "sparse")

Selector = type | str | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class SparsityConfig:
    """How to sparsify a model.

    Attributes:
        sparsity: fraction of weights (or of MACs, see ``budget``) removed over the sparsified layers, in [0, 1).
        block: int, (bo, bi), or "auto": per layer the smallest block that runs near full efficiency by the cost model.
        allocation: a scheme of :func:`sparsekern.allocate`, a scored one (snip, grasp, synflow, lamp, magnitude), or
            {layer name: sparsity}.
        budget: "params", or "macs" (needs an example input).
        pattern: "random" (exact count), "balanced" (equal per block row and column), "butterfly" or "fan_in" (equal per
            block row).
        include, exclude: types, name globs, or callables ``(name, module) -> bool``. Types match exactly.
        overrides: {name glob: sparsity}; such layers leave the budget, 0.0 keeps a layer dense.
        seed: of the masks.
        capacity: block slots over stored blocks, at least 1.0; room for methods that move blocks between layers.
        rescale: multiply kept weights by 1/sqrt(density).
        below_break_even: what becomes of a layer that would be slower than dense: "dense" (left alone), "masked"
            (sparse weights, dense compute) or "sparse" (sparse all the same).

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    sparsity: float = 0.9
    block: int | tuple[int, int] | str = "auto"
    allocation: str | Mapping[str, float] = "erk"
    budget: str = "params"
    pattern: str = "random"
    include: Sequence[Selector] = (nn.Linear, nn.Conv2d)
    exclude: Sequence[Selector] = ()
    overrides: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    capacity: float = 1.0
    rescale: bool = False
    below_break_even: str = "dense"

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity: expected a fraction in [0, 1), got {self.sparsity}")
        if self.block != "auto":
            if isinstance(self.block, str):
                raise ValueError(f"block: expected an int, (bo, bi) or 'auto', got {self.block!r}")
            as_block(self.block)
        for name, value in self.overrides.items():
            if not 0.0 <= value < 1.0:
                raise ValueError(f"overrides[{name!r}]: expected a sparsity in [0, 1), got {value}")
        for what, choices in (
            ("budget", BUDGETS),
            ("pattern", PATTERNS),
            ("below_break_even", BELOW_BREAK_EVEN),
        ):
            if getattr(self, what) not in choices:
                raise ValueError(f"{what}: expected one of {', '.join(choices)}, got {getattr(self, what)!r}")
        if self.capacity < 1.0:
            raise ValueError(f"capacity: expected a factor of 1.0 or more, got {self.capacity}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; types become their names."""

        def plain(selector: Selector) -> str:
            return selector if isinstance(selector, str) else getattr(selector, "__name__", repr(selector))

        out = asdict(self)
        out["include"] = [plain(s) for s in self.include]
        out["exclude"] = [plain(s) for s in self.exclude]
        return out
