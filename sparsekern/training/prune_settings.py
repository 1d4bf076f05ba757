"""How to prune a run and what to do afterwards: one validated record, as :class:`TrainConfig` is for training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsekern.training.config import TrainConfig, suggest
from sparsekern.training.errors import ConfigError

STRATEGIES = {
    "none": "prune only",
    "finetune": "keep the weights, a few epochs at a small constant rate",
    "lottery": "rewind the weights to an early snapshot, then the whole schedule",
    "lr-rewind": "keep the weights, replay the schedule or its last epochs",
    "reinit": "fresh weights under the same mask, then the whole schedule",
    "scratch-e": "fresh weights, as many epochs as the large network",
    "scratch-b": "fresh weights, as many MACs as the large network",
    "redense": "fine-tune sparse, return the pruned weights as zeros, fine-tune dense",
}
FRESH = ("reinit", "scratch-e", "scratch-b")
NEEDS_DATA = ("snip", "grasp", "gradient")

# What the runs after pruning may do differently from the run that is pruned, without being another experiment.
RUN_OPTIONS = ("data_dir", "device", "threads", "checkpoint_every", "checkpoint_minutes")


@dataclass(frozen=True)
class PruneSettings:
    """How a run is pruned and trained on. Checked on construction; :class:`ConfigError` names the field and the fix.

    Attributes:
        then: one of :data:`STRATEGIES`.
        criterion: of :func:`sparsekern.pruning.prune_`.
        scope: "global" or "layer"; None is "layer" with an allocation and "global" without.
        sparsity: of the pruned layers; None is 0.9 without ``levels``.
        block: ``"B"`` or ``"BOxBI"``; None keeps the blocks of sparse layers and is 1 for dense ones.
        allocation: how scope "layer" spreads the sparsity; None is uniform.
        layers: globs of layers to prune, classifier and stem too where they match; empty: all but those.
        exclude: globs of layers that are left as they are, beside those the run excluded.
        levels: levels of a ladder, 0 prunes once.
        fraction: of the remaining weights, what each level removes.
        one_shot: prune every level from the run itself, not from the level before.
        rewind_step: of the snapshot that "lottery" goes back to.
        epochs, lr: in place of the strategy's own; None leaves them.
        cap: most times as long that "scratch-b" trains; None is no limit.
        rescale: multiply fresh weights by 1/sqrt(density of the layer).
        seed: of random scores and fresh weights; level k uses ``seed + k``. None is the run's seed.
        score_batches: batches of the training set for criteria that need data.
        below_break_even: "sparse" or "masked", for layers whose sparse kernel would be slower.
    """

    then: str = "finetune"
    criterion: str = "magnitude"
    scope: str | None = None
    sparsity: float | None = None
    block: str | None = None
    allocation: str | None = None
    layers: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    levels: int = 0
    fraction: float = 0.2
    one_shot: bool = False
    rewind_step: int | None = None
    epochs: int | None = None
    lr: float | None = None
    cap: float | None = None
    rescale: bool = False
    seed: int | None = None
    score_batches: int = 4
    below_break_even: str = "sparse"

    def __post_init__(self) -> None:
        from sparsekern.allocation import SCHEMES
        from sparsekern.allocation.scores import CRITERIA

        self._choice("then", self.then, STRATEGIES)
        self._choice("criterion", self.criterion, CRITERIA)
        self._choice("below_break_even", self.below_break_even, ("sparse", "masked"))
        if self.allocation is not None:
            self._choice("allocation", self.allocation, SCHEMES)
        if self.scope is None:
            object.__setattr__(self, "scope", "layer" if self.allocation is not None else "global")
        self._choice("scope", str(self.scope), ("global", "layer"))
        if self.allocation is not None and self.scope != "layer":
            raise ConfigError("allocation: spreads the sparsity over layers, so it goes with scope layer; got global")
        if self.block is not None:
            object.__setattr__(self, "block", self._checked_block())
        for name in ("layers", "exclude"):
            value = getattr(self, name)
            parts = value.split(",") if isinstance(value, str) else [p for item in value for p in str(item).split(",")]
            object.__setattr__(self, name, tuple(part.strip() for part in parts if part.strip()))
        self._check_ladder()
        self._check_training()

    @staticmethod
    def _choice(name: str, value: str, allowed: Any) -> None:
        if value not in allowed:
            raise ConfigError(suggest(name, value, allowed))

    def _checked_block(self) -> str:
        text = TrainConfig(block=self.block).block  # type: ignore[arg-type]
        if text == "auto":
            raise ConfigError("block: pruning drops whole blocks of one size, so expected B or BOxBI, got auto")
        return str(text)

    def _check_ladder(self) -> None:
        if self.levels < 0:
            raise ConfigError(f"levels: expected 1 and more levels, or 0 to prune once, got {self.levels}")
        if not 0.0 < self.fraction < 1.0:
            raise ConfigError(f"fraction: expected a fraction within (0, 1), got {self.fraction:g}")
        if self.levels and self.sparsity is not None:
            raise ConfigError(
                f"levels: a ladder goes to {self._of_ladder(self.levels):.4g} by itself, so expected no sparsity, got "
                f"{self.sparsity:g}; give one of the two"
            )
        if self.sparsity is None and not self.levels:
            object.__setattr__(self, "sparsity", 0.9)
        if self.sparsity is not None and not 0.0 < self.sparsity < 1.0:
            raise ConfigError(f"sparsity: expected a fraction within (0, 1), got {self.sparsity:g}")
        if self.one_shot and not self.levels:
            raise ConfigError("one_shot: goes with levels; without, pruning is in one shot anyway")

    def _check_training(self) -> None:
        if self.then == "lottery" and self.rewind_step is None:
            raise ConfigError("rewind_step: lottery needs the step to rewind to, got none; give --rewind-step")
        given = {
            "rewind_step": (self.rewind_step is not None, ("lottery",)),
            "cap": (self.cap is not None, ("scratch-b",)),
            "rescale": (self.rescale, FRESH),
            "epochs": (self.epochs is not None, tuple(s for s in STRATEGIES if s not in ("none", "scratch-b"))),
            "lr": (self.lr is not None, tuple(s for s in STRATEGIES if s not in ("none", "lr-rewind"))),
        }
        for name, (is_given, takers) in given.items():
            if is_given and self.then not in takers:
                raise ConfigError(f"{name}: {self.then} takes none; it goes with {', '.join(takers)}")
        lowest = {"epochs": 1, "rewind_step": 0, "seed": 0, "score_batches": 1, "cap": 1.0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ConfigError(f"{name}: expected {low:g} and more, got {value:g}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"lr: expected a learning rate above 0, got {self.lr:g}")

    @property
    def block_value(self) -> int | tuple[int, int] | None:
        if self.block is None:
            return None
        value = TrainConfig(block=self.block).block_value
        assert not isinstance(value, str)
        return value

    def at(self, level: int) -> float:
        """Sparsity of a level, 1 and up: ``1 - (1 - fraction)^level`` in a ladder."""
        return float(self.sparsity) if self.sparsity is not None else self._of_ladder(level)

    def _of_ladder(self, level: int) -> float:
        return 1.0 - (1.0 - self.fraction) ** level

    def describe(self) -> str:
        """What happens, in one line."""
        where = f"by {self.allocation or 'uniform'} in every layer" if self.scope == "layer" else "over all layers"
        if self.levels:
            how_often = (
                f"in {self.levels} levels of {100 * self.fraction:g} % each to {100 * self.at(self.levels):.4g} %"
            )
            how_often += ", each from the run itself" if self.one_shot else ""
        else:
            how_often = f"to {100 * self.at(1):.4g} %"
        block = "single weights, or the blocks stored" if self.block is None else f"blocks of {self.block}"
        return f"prune by {self.criterion} {where} {how_often}, {block}; then {self.then}: {STRATEGIES[self.then]}"

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only; ``from_dict`` is the inverse."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "settings") -> PruneSettings:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"{source}: {suggest('key', str(name), known)}")
        plain: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**plain)

    def differences(self, other: PruneSettings) -> list[str]:
        """Names of the fields in which a continued pruning would differ; more levels only make the ladder longer."""
        names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        longer = self.levels and other.levels > self.levels
        return [name for name in names if not (name == "levels" and longer)]
