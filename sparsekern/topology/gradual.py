"""Gradual magnitude pruning: from many blocks to few during one training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from sparsekern.allocation import block_counts
from sparsekern.topology.layer import Layer
from sparsekern.topology.method import Change, DropAndGrow, Method, Update, lowest_of_all
from sparsekern.topology.redistribute import check_same_block
from sparsekern.topology.select import lowest

NOT_TAKEN = ("drop_fraction", "stop_fraction", "drop_schedule", "new_values")


@dataclass(frozen=True)
class GradualMagnitude(DropAndGrow):
    """Gradual magnitude pruning (Zhu & Gupta 2017, arXiv:1710.01878, equation 1): blocks go, none grow.

    Sparsity follows s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_f - t_0))^3 from what the layers hold at the start.
    Each layer stores f + round((i - f) (1 - x)^3) blocks after the update at progress x; the last update, at ``end``
    whether or not ``update_every`` divides it, leaves exactly the final counts.

    Slots of pruned blocks stay, so a step gets faster as blocks go, but memory shrinks at the compaction points alone:
    there every layer gets a smaller Parameter. (Code that holds the old Parameters has to fetch them again, compiled
    models recompile, and data-parallel wrappers do not follow.)

    Attributes:
        sparsity: final share of the sparse layers' weights that is not stored; every layer loses the same factor. Or
        targets: {layer: final blocks}; layers not named keep what they have. With scope "global" every layer is named,
            and the sum counts.
        begin, end: where pruning starts and ends, as shares of the run.
        scope: "layer" holds every layer to its own schedule; "global" removes the smallest blocks of all layers
            together (one block size), and each layer keeps at least one.
        compact_at: shares of the pruning done, such as (0.5, 0.75, 0.9, 1.0), after which spare slots are given back.
        sparse_below: masked layers (dense compute on the materialised weight, the faster way near density 1) compute
            sparsely from the compaction point on where their density is at most this; 0 leaves them.
        always_masked: layers that ``sparse_below`` leaves masked, as sparse compute never pays for them.

    ``drop_fraction``, ``stop_fraction``, ``drop_schedule`` and ``new_values`` mean nothing here and have to stay at
    their defaults.

    Raises:
        ValueError: an option out of range; neither or both of ``sparsity`` and ``targets``.
    """

    sparsity: float | None = None
    targets: Mapping[str, int] | None = None
    begin: float = 0.0
    end: float = 0.75
    compact_at: tuple[float, ...] = ()
    sparse_below: float = 0.0
    always_masked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        who = type(self).__name__
        defaults = {field.name: field.default for field in fields(Method)}
        for name in NOT_TAKEN:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{who}: takes no {name}: begin, end and the final counts give the schedule")
        if (self.sparsity is None) == (self.targets is None):
            raise ValueError(f"{who}: expected one of sparsity=0.9 and targets={{layer: blocks}}")
        if self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"{who}: sparsity: expected a fraction within [0, 1), got {self.sparsity!r}")
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise ValueError(
                f"{who}: begin, end: expected shares of the run, 0 <= begin < end <= 1, got {self.begin!r} and "
                f"{self.end!r}"
            )
        if self.drop_by == "signed":
            raise ValueError(f"{who}: drop_by: 'signed' drops in proportion to the signs, use 'l1'")
        if not all(0.0 < share <= 1.0 for share in self.compact_at):
            raise ValueError(f"{who}: compact_at: expected shares within (0, 1], got {self.compact_at!r}")
        if not 0.0 <= self.sparse_below <= 1.0:
            raise ValueError(f"{who}: sparse_below: expected a density within [0, 1], got {self.sparse_below!r}")
        object.__setattr__(self, "compact_at", tuple(sorted(self.compact_at)))
        object.__setattr__(self, "always_masked", tuple(self.always_masked))

    def check(self, layers: Mapping[str, Layer]) -> None:
        super().check(layers)
        if self.scope == "global":
            check_same_block(f"{type(self).__name__}(scope='global')", layers)
        if unknown := [name for name in self.always_masked if name not in layers]:
            raise ValueError(
                f"{type(self).__name__}: always_masked: expected names of sparse layers ({', '.join(layers)}), got "
                f"{unknown[0]!r}"
            )
        self._finals(layers)

    # -- when ------------------------------------------------------------------------------------------------------

    def due(self, step: int, total_steps: int) -> bool:
        first, last = self._span(total_steps)
        return step == last or (first < step < last and step % self.update_every == 0)

    def fraction(self, step: int, total_steps: int) -> float:
        """Share of the pruning that is done after the update at ``step``."""
        first, last = self._span(total_steps)
        left = min(1.0, max(0.0, (last - step) / (last - first)))
        return 1.0 - left**3

    def _span(self, total_steps: int) -> tuple[int, int]:
        first = round(self.begin * total_steps)
        return first, max(first + 1, round(self.end * total_steps))

    # -- what ------------------------------------------------------------------------------------------------------

    def changes(self, update: Update) -> dict[str, Change]:
        layers, memory = update.layers, update.memory
        if "initial" not in memory:  # a resumed run has fewer blocks by now
            memory["initial"] = {name: layer.nnz for name, layer in layers.items()}
            memory["final"] = self._finals(layers)
        initial, final = memory["initial"], memory["final"]
        left = 1.0 - update.fraction
        wanted = {name: final[name] + round((initial[name] - final[name]) * left) for name in layers}
        if self.scope == "global":
            first, last = sum(initial.values()), sum(final.values())
            count = max(0, sum(layer.nnz for layer in layers.values()) - last - round((first - last) * left))
            drops = lowest_of_all(update, {n: self.scores_but_best(update, layers[n]) for n in layers}, count)
        else:
            drops = {}
            for name, layer in layers.items():
                count = max(0, layer.nnz - wanted[name])
                drops[name] = lowest(self.drop_scores(update, layer), count, update.stream(name, "drop ties")), count
        nothing = {name: torch.empty(0, dtype=torch.int64, device=layer.device) for name, layer in layers.items()}
        return {name: Change(drop, nothing[name], count, 0) for name, (drop, count) in drops.items() if count}

    def _finals(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        """Final blocks of every layer.

        Raises:
            ValueError: more than a layer has, or a target of a layer that is not there.
        """
        who = type(self).__name__
        if self.targets is not None:
            if unknown := [name for name in self.targets if name not in layers]:
                raise ValueError(
                    f"{who}: targets: expected names of sparse layers ({', '.join(layers)}), got {unknown[0]!r}"
                )
            unnamed = [name for name in layers if name not in self.targets]
            if self.scope == "global" and unnamed:
                raise ValueError(
                    f"{who}: targets: scope='global' prunes every sparse layer, got none of {unnamed[0]!r}"
                )
            for name, count in self.targets.items():
                # Globally the sum counts: a resumed run may find a layer below its own target.
                most = layers[name].nnz if self.scope == "layer" else layers[name].grid.blocks
                if not 1 <= count <= most:
                    raise ValueError(f"{who}: targets[{name!r}]: expected 1..{most} blocks (those it has), got {count}")
            finals = {name: int(self.targets.get(name, layer.nnz)) for name, layer in layers.items()}
            have, wanted = sum(layer.nnz for layer in layers.values()), sum(finals.values())
            if wanted > have:
                raise ValueError(f"{who}: targets: expected at most {have} blocks in all (those stored), got {wanted}")
            return finals
        assert self.sparsity is not None
        area = {name: layer.grid.block[0] * layer.grid.block[1] for name, layer in layers.items()}
        stored = sum(layer.nnz * area[name] for name, layer in layers.items())
        whole = sum(layer.grid.blocks * area[name] for name, layer in layers.items())
        factor = (1.0 - self.sparsity) * whole / stored
        if (1.0 - self.sparsity) * whole > stored + sum(area.values()):  # a block per layer: final counts are rounded
            raise ValueError(
                f"{who}: sparsity: expected at least {1 - stored / whole:.4g} (that of the layers now), got "
                f"{self.sparsity:g}; pruning starts from denser layers"
            )
        densities = {name: min(1.0, factor) * layer.nnz / layer.grid.blocks for name, layer in layers.items()}
        counts = block_counts(densities, {name: layer.grid for name, layer in layers.items()})
        return {name: min(count, layers[name].nnz) for name, count in counts.items()}

    # -- giving back -----------------------------------------------------------------------------------------------

    @property
    def replaces_parameters(self) -> bool:
        return bool(self.compact_at)

    def compacts(self, before: int, update: Update) -> bool:
        initial, final = (sum(update.memory[key].values()) for key in ("initial", "final"))
        after = sum(layer.nnz for layer in update.layers.values())
        if initial == final:
            return False
        was, now = ((initial - nnz) / (initial - final) for nnz in (before, after))
        return any(was < share <= now for share in self.compact_at)

    def compacted(self, layers: Mapping[str, Layer]) -> None:
        for name, layer in layers.items():
            if name not in self.always_masked and layer.nnz <= self.sparse_below * layer.grid.blocks:
                layer.module.masked = False
