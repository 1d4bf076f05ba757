"""The topology scheduler: used like a learning-rate scheduler, it moves the stored blocks of sparse layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.nn import SparseModule
from sparsekern.topology import exploration, probes, ranks
from sparsekern.topology.layer import Layer
from sparsekern.topology.method import Change, Method, Update
from sparsekern.topology.set import Static
from sparsekern.topology.slots import block_state, compact_, draw_, move_blocks_
from sparsekern.topology.streams import Stream

FORMAT = 1
SlotMaps = Mapping[str, Tensor]


@dataclass(frozen=True)
class UpdateRecord:
    """One update that was made.

    Attributes:
        number: from 0.
        step: optimizer steps done.
        fraction: share of blocks that the schedule gave.
        dropped, grown: blocks by layer.
        compacted: spare slots were given back: layers have new Parameters.
    """

    number: int
    step: int
    fraction: float
    dropped: dict[str, int]
    grown: dict[str, int]
    compacted: bool = False


class TopologyScheduler:
    """Moves the stored blocks of every sparse layer during training.

    ::

        topo = sk.TopologyScheduler(model, optimizer, sk.SET(), total_steps=n)
        loss.backward(); optimizer.step(); topo.step(); optimizer.zero_grad()

    ``topo.step()`` counts optimizer steps: called after every micro-batch of an accumulated gradient, or after a step
    that a gradient scaler skipped, it does nothing. On update steps it rewrites layouts in place: no Parameter is
    replaced (but by gradual pruning at its compaction points), nothing recompiles, and optimizer state follows its
    blocks. Grown blocks start at zero (or random, see ``Method.new_values``), their state at zero. Methods that grow by
    gradient get their scores inside the backward of the update step. Random numbers depend on ``seed``, layer and
    update alone.

    Args:
        model: with sparse layers; may be wrapped in DDP or compiled.
        optimizer: that holds the layers' ``values``.
        method: :class:`Static`, :class:`SET`, :class:`RigL`, :class:`SRigL`, :class:`SNFS`, :class:`DSR` or
            :class:`GradualMagnitude`.
        total_steps: optimizer steps of the run; schedules refer to it.
        seed: of random drops and growth and of ties; the same on every rank.
        process_group: over which scores are added up and layouts compared; by default the default group wherever
            ``torch.distributed`` is initialised.

    Raises:
        ValueError: no sparse layers, values that the optimizer does not hold, or a method that does not fit.
        NotImplementedError: FSDP-sharded values.
        RuntimeError: layouts that differ between ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        total_steps: int,
        *,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        if not isinstance(method, Method):
            raise ValueError(f"method: expected a topology method such as SET(), got {method!r}")
        if total_steps < 1:
            raise ValueError(f"total_steps: expected 1 or more optimizer steps, got {total_steps}")
        self.optimizer, self.method, self.total_steps, self.seed = optimizer, method, int(total_steps), seed
        self.group = ranks.find(process_group)
        self.layers = _layers(unwrapped(model), optimizer, method)
        method.check(self.layers)
        if self.group is not None and method.replaces_parameters:
            raise ValueError(
                f"{type(method).__name__}: compact_at replaces Parameters, which data-parallel wrappers do not follow; "
                "pass compact_at=()"
            )
        self.steps = 0
        self.updates = 0
        self.memory: dict[str, Any] = {}
        self.last_update: UpdateRecord | None = None
        self._pending = False
        self._stepped = False
        self._callbacks: list[Callable[[SlotMaps], None]] = []
        for layer in self.layers.values():
            exploration.begin(layer)
        optimizer.register_step_post_hook(self._note_step)
        self._check_ranks("at the start")
        self._arm()

    # -- stepping --------------------------------------------------------------------------------------------------

    def step(self) -> UpdateRecord | None:
        """Call after every ``optimizer.step()``, before ``zero_grad``. Returns the update if one was made."""
        if not self._stepped:
            return None
        self._stepped = False
        self.steps += 1
        if self.method.probe_always:
            self._observe()
        self.last_update = None
        if self._pending or self.method.due(self.steps, self.total_steps):
            self._pending = not self._update()
        elif self.steps % self.method.update_every == 0:
            self._check_ranks(f"after step {self.steps}")
        self._arm()
        return self.last_update

    def on_update(self, callback: Callable[[SlotMaps], None]) -> None:
        """Call ``callback({layer: slot map})`` after every update, for tensors that follow blocks.

        A slot map, int64 [capacity], holds the old slot of each new one, or -1 for a grown or spare one; see
        :func:`sparsekern.topology.remap_` and :func:`sparsekern.topology.follow`. A compaction then cuts every tensor
        to the layer's new capacity.
        """
        self._callbacks.append(callback)

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Fused optimizers are called after an overflow too and skip the step themselves (one host sync to know).
        overflow = getattr(optimizer, "found_inf", None)
        self._stepped |= overflow is None or not bool(overflow)

    def _update(self) -> bool:
        """Make an update; False if it has to wait for a step with usable gradients."""
        found: dict[str, Tensor] = {}
        if self.method.probe is not None and not self.method.probe_always:
            gathered = self._gather()
            if gathered is None:
                return False
            found = gathered
        self._check_ranks(f"before the update after step {self.steps}")
        update = Update(
            self.updates,
            self.steps,
            self.method.fraction(self.steps, self.total_steps),
            self.steps / self.total_steps,
            self.seed,
            self.layers,
            found,
            self.memory,
            lambda tensor: ranks.sum_(tensor.clone(), self.group),
        )
        nnz_before = self._nnz()
        changes = self.method.changes(update)
        self._check_changes(changes)
        for name in changes:  # raises before anything has moved
            block_state(self.optimizer, self.layers[name].values)
        slot_maps = {name: self._apply(self.layers[name], change) for name, change in changes.items()}
        for name, layer in self.layers.items():
            if name not in changes:  # its blocks were kept too
                exploration.record(layer, layer.stored(), layer.stored())
        compacted = self.method.compacts(nnz_before, update)
        if compacted:
            for name, layer in self.layers.items():
                if name not in slot_maps:  # its tensors get smaller too
                    slot_maps[name] = torch.arange(layer.capacity, device=layer.device).where(layer.used(), -1)
                compact_(layer.module, self.optimizer, layer.nnz)
            self.method.compacted(self.layers)
        self.updates += 1
        self.last_update = UpdateRecord(
            update.number,
            self.steps,
            update.fraction,
            {name: change.dropped for name, change in changes.items()},
            {name: change.grown for name, change in changes.items()},
            compacted,
        )
        for callback in self._callbacks:
            callback(slot_maps)
        self._check_ranks(f"after the update after step {self.steps}")
        return True

    def _apply(self, layer: Layer, change: Change) -> Tensor:
        kept = layer.stored_but(change.drop)
        now = kept.index_fill(0, change.grow, True)
        slot_map = move_blocks_(layer.module, self.optimizer, now)
        layer.nnz += change.grown - change.dropped
        if self.method.new_values == "random" and change.grown:
            draw_(layer, slot_map, change.grown, Stream(self.seed, layer.name, self.updates, "values"))
        exploration.record(layer, kept, now)
        return slot_map

    def _check_changes(self, changes: Mapping[str, Change]) -> None:
        for name, change in changes.items():
            nnz = self.layers[name].nnz + change.grown - change.dropped
            if not 0 <= nnz <= self.layers[name].capacity or change.grow.numel() != change.grown:
                raise RuntimeError(
                    f"{type(self.method).__name__}: {name}: expected at most {self.layers[name].capacity} blocks after "
                    f"an update, got {nnz}"
                )

    def _nnz(self) -> int:
        return sum(layer.nnz for layer in self.layers.values())

    # -- probes ----------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Set probes where the next step needs them; those that have collected something already stay."""
        method, following = self.method, self.steps + 1
        wanted = method.probe is not None and (
            method.probe_always or self._pending or method.due(following, self.total_steps)
        )
        for layer in self.layers.values():
            if not wanted:
                probes.disarm(layer)
            elif layer.module.probe is None:
                assert method.probe is not None
                probes.arm(layer, method.probe)

    def _gather(self) -> dict[str, Tensor] | None:
        """Growth scores by layer, or None if a gradient was not finite; probes then start again."""
        found, usable = {}, True
        for name, layer in self.layers.items():
            collected = probes.collected(layer)
            if collected is None:
                # A layer that the loss does not reach has no gradient anywhere.
                collected = torch.zeros_like(layer.module.probe)  # type: ignore[arg-type]
                if collected.dim() == 1:
                    collected.masked_fill_(layer.stored(), -torch.inf)
            found[name] = probes.scores(layer, collected, self.group)
            usable = usable and probes.usable(found[name])
            probes.disarm(layer)
        return found if usable else None

    def _observe(self) -> None:
        for layer in self.layers.values():
            collected = probes.collected(layer)
            if collected is not None:
                self.method.observe(layer, collected, self.memory)
                probes.clear(layer)

    # -- ranks -----------------------------------------------------------------------------------------------------

    def _check_ranks(self, when: str) -> None:
        if self.group is None:
            return
        digests = ((name, layer.layout.digest()) for name, layer in self.layers.items())
        ranks.check_equal(digests, next(iter(self.layers.values())).device, self.group, when)

    # -- exploration -----------------------------------------------------------------------------------------------

    def exploration_rate(self) -> float:
        """R_s: share of the sparse layers' weights that were stored at any time (Liu et al. 2021)."""
        return exploration.rate(self.layers.values())

    def exploration_rates(self) -> dict[str, float]:
        """R_s of every layer."""
        return {name: exploration.rate([layer]) for name, layer in self.layers.items()}

    def reliably_explored(self) -> float:
        """Share of the weights whose blocks were kept by at least one update."""
        return exploration.rate(self.layers.values(), "reliable")

    # -- saving ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters, explored blocks and the method's memory: tensors and plain containers.

        Layouts, values and optimizer state are in the state dicts of model and optimizer.
        """
        return {
            "format": FORMAT,
            "method": type(self.method).__name__,
            "options": asdict(self.method),
            "total_steps": self.total_steps,
            "seed": self.seed,
            "steps": self.steps,
            "updates": self.updates,
            "pending": self._pending,
            "memory": dict(self.memory),
            "layers": {
                name: {
                    "digest": layer.layout.digest(),
                    "explored": exploration.pack(layer.explored),
                    "reliable": exploration.pack(layer.reliable),
                }
                for name, layer in self.layers.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; load the model's and the optimizer's state first.

        Raises:
            ValueError: the state is of another method, other layers, or other layouts than the model has now.
        """
        _check_state(self, state)
        for name, saved in state["layers"].items():
            layer = self.layers[name]
            layer.nnz = layer.layout.nnz
            layer.explored = exploration.unpack(saved["explored"], layer.grid.blocks, layer.device)
            layer.reliable = exploration.unpack(saved["reliable"], layer.grid.blocks, layer.device)
        self.steps, self.updates, self._pending = state["steps"], state["updates"], state["pending"]
        self.last_update = None
        device = next(iter(self.layers.values())).device
        self.memory = {
            key: item.to(device, copy=True) if isinstance(item, Tensor) else item
            for key, item in state["memory"].items()
        }
        for layer in self.layers.values():
            probes.disarm(layer)
        self._arm()


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _layers(model: nn.Module, optimizer: Optimizer, method: Method) -> dict[str, Layer]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, SparseModule) or not module.values.requires_grad:
            continue
        if type(module.values.data).__name__ == "DTensor":
            raise NotImplementedError(
                f"{name}: values are sharded (FSDP): blocks of one layer cannot move between ranks yet; use DDP"
            )
        if id(module.values) not in held:
            raise ValueError(
                f"optimizer: expected the values of {name!r} among its parameters; build the optimizer after "
                "sparsify_, or pass it to sparsify_(..., optimizer=optimizer)"
            )
        if module.element_mask is not None and not isinstance(method, Static):
            raise ValueError(
                f"{name}: {type(method).__name__} moves whole blocks, and this layer has pruned elements inside its "
                "blocks; use masks made of whole blocks, or block=1"
            )
        block_state(optimizer, module.values)
        layers[name] = Layer(name, module)
    if not layers:
        raise ValueError("model: expected sparse layers with trainable values, got none; call sparsify_ first")
    return layers


def _check_state(topo: TopologyScheduler, state: Mapping[str, Any]) -> None:
    if state.get("format") != FORMAT:
        raise ValueError(f"topology state: expected format {FORMAT}, got {state.get('format')!r}")
    mine = {
        "method": type(topo.method).__name__,
        "options": _plain(asdict(topo.method)),
        "total_steps": topo.total_steps,
        "seed": topo.seed,
    }
    for key, value in mine.items():
        saved = _plain(state[key])
        if saved != value:
            raise ValueError(f"topology state: expected {key} {value}, got {saved}; build the scheduler as before")
    if set(state["layers"]) != set(topo.layers):
        missing = sorted(set(state["layers"]) ^ set(topo.layers))
        raise ValueError(f"topology state: expected the layers of this model, got others: {', '.join(missing[:4])}")
    for name, saved in state["layers"].items():
        if saved["digest"] != topo.layers[name].layout.digest():
            raise ValueError(
                f"topology state: {name} has another layout than when the state was saved; load the model's state "
                "dict of the same step first"
            )


def _plain(value: Any) -> Any:
    """Tuples as lists, as a checkpoint may give them back."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
