"""What every topology method keeps, on layers, optimizers and options drawn at random.

Before each update, values, gradients and optimizer state are overwritten with numbers that occur once, so that a block
that lands in a wrong slot shows in the dense tensors.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import sparsekern as sk
from sparsekern import topology
from sparsekern.layout import BlockGrid
from sparsekern.masks import make_block_masks
from sparsekern.nn import SparseModule
from sparsekern.topology.redistribute import redistribute

TOTAL = 8  # optimizer steps of a run
OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, lr=1e-3),
    "momentum": lambda parameters: SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda parameters: Adam(parameters, lr=1e-3),
    "adamw": lambda parameters: AdamW(parameters, lr=1e-3, amsgrad=True),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=1e-3, momentum=0.9, centered=True),
}
few = settings(max_examples=20, deadline=None)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the layers are tiny


# -- layers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A layer: (out, in) or (out, in per group, R, S); stored blocks and spare slots as shares of its grid."""

    weight: tuple[int, ...]
    block: int
    groups: int
    density: float
    spare: float
    masked: bool
    stride: int

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid(self.weight, (self.block, self.block), self.groups)

    @property
    def nnz(self) -> int:
        return max(1, round(self.density * self.grid.blocks))

    @property
    def capacity(self) -> int:
        return self.nnz + math.ceil(self.spare * self.grid.blocks)

    def build(self, seed: int) -> SparseModule:
        mask = make_block_masks({"": self.grid}, {"": self.nnz}, seed=seed)[""]
        kept = self.grid.from_blocks(mask.reshape(-1, 1, 1).expand(-1, self.block, self.block))
        if len(self.weight) == 2:
            out = sk.SparseLinear.from_dense(
                nn.Linear(self.weight[1], self.weight[0]), kept, self.block, capacity=self.capacity
            )
        else:
            dense = nn.Conv2d(
                self.weight[1] * self.groups, self.weight[0], self.weight[2:], self.stride, groups=self.groups
            )
            out = sk.SparseConv2d.from_dense(dense, kept, self.block, capacity=self.capacity)
        out.masked = self.masked
        assert out.layout.nnz == self.nnz and out.element_mask is None
        return out


def layer(block: int = 2, density: float = 0.5, spare: float = 0.0) -> Shape:
    return Shape((16, 16), block, 1, density, spare, False, 1)


@st.composite
def shapes(draw, block: int, spare: float = 0.0, dense: bool = True) -> Shape:
    groups = 1
    weight: tuple[int, ...] = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    if draw(st.booleans()):
        groups = draw(st.sampled_from([1, 2]))
        kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 2)]))
        weight = (groups * draw(st.integers(1, 9)), draw(st.integers(1, 9)), *kernel)
    density = draw(st.floats(0.05, 1.0 if dense else 0.7))
    return Shape(weight, block, groups, density, spare, draw(st.booleans()), draw(st.sampled_from([1, 2])))


@st.composite
def nets(draw, spare: float = 0.0, block: int | None = None) -> list[Shape]:
    """Two or three layers of one block size."""
    edge = draw(st.sampled_from([1, 2, 8])) if block is None else block
    return draw(st.lists(shapes(edge, spare), min_size=2, max_size=3))


class Bag(nn.Module):
    """Layers side by side, each with an input of its own."""

    def __init__(self, chosen: list[Shape], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shapes = chosen
        self.layers = nn.ModuleDict({f"l{k}": shape.build(seed) for k, shape in enumerate(chosen)})

    def inputs(self, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        sizes = [
            (5, s.weight[1]) if len(s.weight) == 2 else (3, s.weight[1] * s.groups, s.weight[2] + 2, s.weight[3] + 1)
            for s in self.shapes
        ]
        return [torch.randn(size, generator=generator) for size in sizes]

    def loss(self, step: int) -> Tensor:
        outputs = [layer(x) for layer, x in zip(self.layers.values(), self.inputs(step), strict=True)]
        return sum(((y + 0.3).square().sum() for y in outputs), torch.zeros(()))

    def dense_gradients(self, step: int) -> dict[str, Tensor]:
        """Of the same loss, by autograd on dense weights."""
        gradients = {}
        for (name, layer), x, shape in zip(self.layers.items(), self.inputs(step), self.shapes, strict=True):
            weight, bias = dense(layer).requires_grad_(), layer.bias.detach()
            y = F.linear(x, weight, bias) if x.dim() == 2 else F.conv2d(
                x, weight, bias, shape.stride, groups=shape.groups
            )  # fmt: skip
            gradients[f"layers.{name}"] = torch.autograd.grad((y + 0.3).square().sum(), weight)[0]
        return gradients


def dense(module: SparseModule) -> Tensor:
    return module.layout.to_dense(module.values.detach())


# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One layer around one update.

    Attributes:
        before, after: bool [blocks], stored.
        weight: the dense tensor of unique numbers that the values were taken from.
    """

    before: Tensor
    after: Tensor
    nnz: int
    weight: Tensor
    grid: BlockGrid

    @property
    def dropped(self) -> Tensor:
        return self.before & ~self.after

    @property
    def grown(self) -> Tensor:
        return self.after & ~self.before

    def rows(self, blocks: Tensor) -> Tensor:
        """Count per block row of ``blocks`` bool [blocks]."""
        return blocks.view(self.grid.rows, -1).sum(1)

    def columns(self, blocks: Tensor) -> Tensor:
        return blocks.view(self.grid.shape).sum((1, 2)).flatten()

    def magnitude(self) -> Tensor:
        """Mean |w| of every block of the grid as if it was stored, float64."""
        return self.grid.to_blocks(self.weight).double().abs().mean((1, 2))


class Run:
    def __init__(
        self, chosen: list[Shape], method: topology.Method, optimizer: str = "momentum", seed: int = 0
    ) -> None:
        self.bag = Bag(chosen, seed)
        self.optimizer: Optimizer = OPTIMIZERS[optimizer](self.bag.parameters())
        self.topo = sk.TopologyScheduler(self.bag, self.optimizer, method, TOTAL, seed=seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    @property
    def modules(self) -> dict[str, SparseModule]:
        return {f"layers.{name}": layer for name, layer in self.bag.layers.items()}

    def step(self) -> dict[str, Seen] | None:
        """One step with tagged tensors; what was seen if it was an update. Checks what holds for every method."""
        self.optimizer.zero_grad()
        self.bag.loss(self.steps).backward()
        self.optimizer.step()
        self.steps += 1
        tags = {name: self._tag(module) for name, module in self.modules.items()}
        before = {name: module.layout.block_mask().flatten() for name, module in self.modules.items()}
        record = self.topo.step()
        seen = {}
        for name, module in self.modules.items():
            now = module.layout.block_mask().flatten()
            seen[name] = Seen(before[name], now, module.layout.nnz, tags[name]["values"], module.grid)
            self._check(name, module, seen[name], tags[name])
            assert self.topo.layers[name].nnz == module.layout.nnz == int(now.sum())
            if record is None:
                assert torch.equal(now, before[name])
            else:  # a block that was dropped and came back would be missing in both counts
                assert int(seen[name].dropped.sum()) == record.dropped.get(name, 0)
                assert int(seen[name].grown.sum()) == record.grown.get(name, 0)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in self.bag.parameters()}
        return None if record is None else seen

    def _rows(self, module: SparseModule) -> dict[str, Tensor]:
        """Everything that has one row per slot."""
        state = self.optimizer.state.get(module.values, {})
        found = {key: item for key, item in state.items() if isinstance(item, Tensor) and item.dim() == 3}
        assert module.values.grad is not None
        return {"values": module.values.data, "grad": module.values.grad, **found}

    def _tag(self, module: SparseModule) -> dict[str, Tensor]:
        tags = {}
        for key, rows in self._rows(module).items():
            numbers = 1.0 + torch.randperm(module.grid.from_blocks(torch.zeros(
                module.grid.blocks, *module.block)).numel(), generator=self.generator)  # fmt: skip
            weight = (numbers / numbers.numel()).view(module.grid.weight_shape)
            if key in ("values", "grad"):
                weight = weight * (torch.randint(2, weight.shape, generator=self.generator) * 2 - 1)
            rows.copy_(module.layout.from_dense(weight))
            tags[key] = weight
        return tags

    def _check(self, name: str, module: SparseModule, seen: Seen, tags: Mapping[str, Tensor]) -> None:
        module.layout.validate()
        bo, bi = module.block
        stayed = module.grid.from_blocks((seen.before & seen.after).view(-1, 1, 1).expand(-1, bo, bi))
        rows = self._rows(module)
        assert rows.keys() == tags.keys()
        for key, tensor in rows.items():
            assert tensor.shape[0] == module.layout.capacity
            assert torch.equal(module.layout.to_dense(tensor), tags[key] * stayed), f"{name}: {key}"
            assert not tensor[seen.nnz :].any(), f"{name}: {key} of spare slots"


# -- methods -----------------------------------------------------------------------------------------------------------

DROP_BY = ("l1", "l2", "linf", "gradient", "random")


@st.composite
def shared(draw, *, minima: bool = True) -> dict[str, Any]:
    """Options that all methods share; minima in one direction at a time, where they can be checked exactly."""
    options = {
        "update_every": draw(st.sampled_from([1, 2, 3])),
        "drop_fraction": draw(st.floats(0.02, 1.0)),
        "stop_fraction": draw(st.sampled_from([0.75, 1.0])),
        "drop_schedule": draw(st.sampled_from(["cosine", "linear", "constant"])),
        "drop_by": draw(st.sampled_from(DROP_BY)),
    }
    if minima and draw(st.booleans()):
        options[draw(st.sampled_from(["min_per_row", "min_per_col"]))] = draw(st.sampled_from([1, 2]))
    return options


scopes = st.sampled_from(["layer", "global"])
optimizers = st.sampled_from(sorted(OPTIMIZERS))


@st.composite
def fixed(draw) -> topology.Method:
    """A method that holds the count of every layer."""
    name = draw(st.sampled_from(["static", "set", "unexplored", "rigl", "srigl"]))
    if name == "srigl":
        options = draw(shared(minima=False)) | {"ablation": draw(st.sampled_from([0.0, 0.3, 0.95]))}
        return topology.method(name, **options, exact=draw(st.booleans()))
    if name == "unexplored":
        return topology.method("set", **draw(shared(minima=False)), scope=draw(scopes), growth="unexplored")
    options = draw(shared()) | {"scope": draw(scopes)}
    return topology.method(name, **options, **({"exact": draw(st.booleans())} if name == "rigl" else {}))


@st.composite
def moving(draw) -> topology.Method:
    """A method that moves blocks between layers."""
    options = draw(shared())
    if draw(st.booleans()):
        return topology.method("snfs", **options, scope=draw(scopes), momentum=draw(st.sampled_from([0.0, 0.9])))
    options["drop_by"] = draw(st.sampled_from(["l1", "l2", "linf"]))
    return topology.method("dsr", **options, threshold=draw(st.sampled_from([1e-3, 0.1, 0.4, 2.0])))


def missing(counts: Tensor, least: int) -> int:
    return int((least - counts).clamp(min=0).sum())


def check_minima(method: topology.Method, seen: Seen) -> None:
    """Blocks that a row or column needs do not go while others can, and come first among those that grow."""
    for least, counts, axis in (
        (method.min_per_row, seen.rows, 1),
        (method.min_per_col, seen.columns, 0),
    ):
        places = seen.grid.blocks // (seen.grid.rows if axis else seen.grid.t_rows)
        least = min(least, places)
        before, after = counts(seen.before), counts(seen.after)
        needed = int(before.clamp(max=least).sum())
        if least and int(seen.dropped.sum()) <= int(seen.before.sum()) - needed:
            assert missing(after, least) == max(0, missing(before, least) - int(seen.grown.sum()))


@few
@given(nets(spare=0.2), fixed(), optimizers, st.integers(0, 99))
def test_counts_of_layers_stay(chosen, method, optimizer, seed):
    run = Run(chosen, method, optimizer, seed)
    explored = {name: module.layout.block_mask().flatten() for name, module in run.modules.items()}
    for _ in range(TOTAL):
        seen = run.step()
        for name, layer in run.topo.layers.items():
            explored[name] |= layer.stored()
            assert torch.equal(layer.explored, explored[name])
            assert not (layer.reliable & ~layer.explored).any()
        if seen is not None:
            for layer, shape in zip(seen.values(), chosen, strict=True):
                assert layer.nnz == shape.nnz
                if not isinstance(method, sk.SRigL):
                    check_minima(method, layer)
    assert run.topo.updates == sum(method.due(step, TOTAL) for step in range(1, TOTAL + 1))


@few
@given(nets(block=1), st.floats(0.02, 1.0), optimizers, st.integers(0, 99))
def test_signed_drops_the_same_share_of_both_signs(chosen, fraction, optimizer, seed):
    """Mocanu et al. 2018: the smallest positive and the largest negative weights go."""
    run = Run(chosen, sk.SET(drop_fraction=fraction, update_every=2, drop_by="signed"), optimizer, seed)
    run.step()
    seen = run.step()
    assert seen is not None
    share = run.topo.last_update.fraction
    for layer in seen.values():
        weight = layer.weight.view(layer.grid.shape[0], -1, math.prod(layer.grid.weight_shape[2:]))
        flat = layer.grid.to_blocks(layer.weight).flatten()
        assert weight.numel() == flat.numel()
        wanted = [math.ceil(share * int(((flat < 0) == sign)[layer.before].sum()) - 1e-9) for sign in (True, False)]
        free = int((~layer.before).sum())
        assert int(layer.dropped.sum()) == min(free, sum(wanted))
        for sign, count in zip((True, False), wanted, strict=True):
            of_sign = ((flat < 0) == sign) & layer.before
            gone, stayed = flat[of_sign & layer.dropped].abs(), flat[of_sign & layer.after].abs()
            assert gone.numel() == count or sum(wanted) > free
            assert not gone.numel() or not stayed.numel() or gone.max() < stayed.min()


@few
@given(nets(spare=0.2), moving(), optimizers, st.integers(0, 99))
def test_totals_stay_where_blocks_change_layers(chosen, method, optimizer, seed):
    run = Run(chosen, method, optimizer, seed)
    for _ in range(TOTAL):
        seen = run.step()
        if seen is not None:
            assert sum(layer.nnz for layer in seen.values()) == sum(shape.nnz for shape in chosen)
            for layer, shape in zip(seen.values(), chosen, strict=True):
                assert 1 <= layer.nnz <= shape.capacity
                check_minima(method, layer)
    assert run.topo.updates == sum(method.due(step, TOTAL) for step in range(1, TOTAL + 1))


def test_static_explores_its_density():
    chosen = [Shape((19, 13), 8, 1, 0.4, 0.0, False, 1), Shape((6, 3, 3, 3), 2, 2, 0.3, 0.0, False, 1)]
    run = Run(chosen, sk.Static())
    for _ in range(3):
        run.step()
    masks = [module.mask for module in run.modules.values()]
    stored, weights = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    assert run.topo.exploration_rate() == stored / weights
    assert list(run.topo.exploration_rates().values()) == [int(mask.sum()) / mask.numel() for mask in masks]


# -- gradual pruning ---------------------------------------------------------------------------------------------------


@st.composite
def gradual(draw, chosen: list[Shape]) -> sk.GradualMagnitude:
    options: dict[str, Any] = {
        "update_every": draw(st.sampled_from([1, 2, 3, 100])),
        "begin": draw(st.sampled_from([0.0, 0.2, 0.5])),
        "end": draw(st.sampled_from([0.6, 0.75, 1.0])),
        "scope": draw(scopes),
        "drop_by": draw(st.sampled_from(DROP_BY)),
        "compact_at": draw(st.sampled_from([(), (1.0,), (0.9, 0.3)])),
        "sparse_below": draw(st.sampled_from([0.0, 0.5])),
    }
    if draw(st.booleans()):
        options[draw(st.sampled_from(["min_per_row", "min_per_col"]))] = 1
    if draw(st.booleans()):
        targets = {f"layers.l{k}": draw(st.integers(1, shape.nnz)) for k, shape in enumerate(chosen)}
        return sk.GradualMagnitude(targets=targets, **options)
    stored = sum(shape.nnz for shape in chosen) / sum(shape.grid.blocks for shape in chosen)
    return sk.GradualMagnitude(sparsity=draw(st.floats(1 - stored, 0.99)), **options)


@few
@given(st.data(), nets(), optimizers, st.integers(0, 99))
def test_gradual_pruning_keeps_its_schedule(data, chosen, optimizer, seed):
    method = data.draw(gradual(chosen))
    run = Run(chosen, method, optimizer, seed)
    first, last = round(method.begin * TOTAL), round(method.end * TOTAL)
    initial = {name: module.layout.nnz for name, module in run.modules.items()}
    if method.targets is not None:
        final = dict(method.targets)
    else:
        final = {}
        wanted = (1 - method.sparsity) * sum(shape.grid.blocks for shape in chosen)
    compactions = 0
    for step in range(1, TOTAL + 1):
        seen = run.step()
        due = first < step <= last and (step % method.update_every == 0 or step == last)
        assert (seen is not None) == due
        if seen is None:
            continue
        if not final:
            final = run.topo.memory["final"]
            # One uniform factor; every layer keeps a block.
            assert abs(sum(final.values()) - wanted) <= 1 or min(final.values()) == 1
            for name, count in final.items():
                assert abs(count - max(1.0, wanted * initial[name] / sum(initial.values()))) < len(final) + 1
        left = (1 - (step - first) / (last - first)) ** 3
        now = {name: layer.nnz for name, layer in seen.items()}
        scheduled = {name: final[name] + (initial[name] - final[name]) * left for name in now}
        if method.scope == "layer":
            assert all(abs(now[name] - scheduled[name]) <= 0.5 + 1e-6 for name in now)
        else:
            assert abs(sum(now.values()) - sum(scheduled.values())) <= 0.5 + 1e-6
            assert min(now.values()) >= 1
        for layer in seen.values():
            assert not layer.grown.any()
            check_minima(method, layer)
        if method.drop_by == "l1" and not (method.min_per_row or method.min_per_col):
            check_smallest_go(list(seen.values()), method.scope)
        compactions += run.topo.last_update.compacted
        done = (sum(initial.values()) - sum(now.values())) / max(1, sum(initial.values()) - sum(final.values()))
        for module, shape in zip(run.modules.values(), chosen, strict=True):
            if run.topo.last_update.compacted:
                assert module.layout.capacity == module.layout.nnz
                if method.sparse_below and module.layout.nnz <= method.sparse_below * module.grid.blocks:
                    assert not module.masked
                else:
                    assert module.masked == shape.masked or not module.masked
            elif not compactions:
                assert module.layout.capacity == shape.capacity and module.masked == shape.masked
        if step == last and sum(initial.values()) > sum(final.values()):
            assert done == 1.0 and (compactions > 0) == bool(method.compact_at)
    if method.scope == "layer":
        assert {name: module.layout.nnz for name, module in run.modules.items()} == final
    else:
        assert sum(module.layout.nnz for module in run.modules.values()) == sum(final.values())


@pytest.mark.parametrize("seed", range(4))
def test_global_pruning_leaves_every_layer_a_block(seed):
    """Even where the minima of rows ask for more blocks than are left."""
    method = sk.GradualMagnitude(
        targets={"layers.l0": 1, "layers.l1": 1}, scope="global", min_per_row=1, update_every=1, end=0.5
    )
    run = Run([layer(), layer()], method, seed=seed)
    for _ in range(4):
        run.step()
    assert [module.layout.nnz for module in run.modules.values()] == [1, 1]


def check_smallest_go(seen: list[Seen], scope: str) -> None:
    """No block that went was larger than one that stayed, in its layer or in all."""
    pools = [seen] if scope == "global" else [[layer] for layer in seen]
    for pool in pools:
        gone = torch.cat([layer.magnitude()[layer.dropped] for layer in pool])
        # The one block that a layer is left with may be small.
        stayed = torch.cat([layer.magnitude()[layer.after] for layer in pool if layer.nnz > 1] or [torch.zeros(0)])
        if gone.numel() and stayed.numel():
            assert gone.max() <= stayed.min() * (1 + 1e-6)


# -- SNFS --------------------------------------------------------------------------------------------------------------


@few
@given(nets(spare=0.3), st.floats(0.05, 0.9), optimizers, st.integers(0, 99))
def test_snfs_grows_where_momentum_is_large(chosen, fraction, optimizer, seed):
    run = Run(chosen, sk.SNFS(drop_fraction=fraction, update_every=3, momentum=0.8), optimizer, seed)
    momenta = {name: torch.zeros(module.grid.weight_shape) for name, module in run.modules.items()}
    for _ in range(6):
        for name, gradient in run.bag.dense_gradients(run.steps).items():
            momenta[name] = 0.8 * momenta[name] + gradient
        seen = run.step()
        if seen is None:
            continue
        caps, shares = {}, {}
        for (name, layer), shape in zip(seen.items(), chosen, strict=True):
            blocks = layer.grid.to_blocks(momenta[name].abs()).double()
            inside = layer.grid.to_blocks(torch.ones(layer.grid.weight_shape))
            shares[name] = float(blocks[layer.before].sum() / inside[layer.before].sum())
            norms = blocks.sum((1, 2))
            others = norms[~layer.before & ~layer.grown]
            if layer.grown.any() and others.numel():
                assert norms[layer.grown].min() >= others.max() - 1e-4 * norms.max()
            nnz, free = int(layer.before.sum()), int((~layer.before).sum())
            sparsity, now = free / layer.grid.blocks, run.topo.last_update.fraction
            share = min(sparsity, now) if sparsity < 0.2 else now
            assert int(layer.dropped.sum()) == min(math.ceil(share * nnz - 1e-9), free)
            caps[name] = min(free, shape.capacity - nnz + int(layer.dropped.sum()))
        grown = {name: int(layer.grown.sum()) for name, layer in seen.items()}
        emptied = sum(bool((layer.dropped == layer.before).all()) for layer in seen.values())
        assert_in_proportion(grown, shares, caps, slack=1.01 + emptied)


def test_snfs_leaves_out_gradients_that_are_not_finite():
    chosen = [Shape((12, 12), 2, 1, 0.4, 0.2, False, 1), Shape((12, 9), 2, 1, 0.4, 0.2, False, 1)]
    run = Run(chosen, sk.SNFS(update_every=5, momentum=0.5))
    sound = run.bag.dense_gradients(0)
    run.step()
    with torch.no_grad():
        run.bag.layers["l0"].bias[3] = torch.inf
    run.optimizer.zero_grad()
    run.bag.loss(1).backward()
    for parameter in run.bag.parameters():
        parameter.grad = torch.zeros_like(parameter)
    second = run.bag.dense_gradients(1)["layers.l1"]
    run.optimizer.step()
    run.topo.step()
    memory = run.topo.memory
    torch.testing.assert_close(memory["momentum:layers.l0"], sound["layers.l0"])
    torch.testing.assert_close(memory["momentum:layers.l1"], 0.5 * sound["layers.l1"] + second)


# -- DSR ---------------------------------------------------------------------------------------------------------------


@few
@given(nets(spare=0.3), st.floats(0.05, 0.6), st.sampled_from([1e-3, 0.0513, 0.307, 0.613]), st.integers(0, 99))
def test_dsr_follows_its_target(chosen, fraction, threshold, seed):
    method = sk.DSR(drop_fraction=fraction, update_every=1, drop_schedule="constant", threshold=threshold)
    run = Run(chosen, method, seed=seed)
    total = sum(shape.nnz for shape in chosen)
    target = math.ceil(fraction * total - 1e-9)
    for _ in range(5):
        seen = run.step()
        assert seen is not None
        below = {name: layer.before & (layer.magnitude() < threshold) for name, layer in seen.items()}
        # A layer whose blocks are all below the threshold keeps its best.
        counts = {name: min(int(below[name].sum()), int(seen[name].before.sum()) - 1) for name in seen}
        count = sum(counts.values())
        if count > 1.1 * target:
            threshold /= 2
        elif count < 0.9 * target:
            threshold *= 2
        assert run.topo.memory.get("threshold", method.threshold) == threshold
        dropped = {name: int(layer.dropped.sum()) for name, layer in seen.items()}
        assert sum(dropped.values()) <= min(count, 2 * target)
        caps, shares = {}, {}
        for (name, layer), shape in zip(seen.items(), chosen, strict=True):
            assert not (layer.dropped & ~below[name]).any() and (layer.before & layer.after).any()
            nnz, free = int(layer.before.sum()), int((~layer.before).sum())
            caps[name] = min(free, shape.capacity - nnz + dropped[name])
            shares[name] = float(nnz - dropped[name])
        if count <= 2 * target and all(counts[name] <= caps[name] for name in caps):
            assert sum(dropped.values()) == count
        assert_in_proportion({name: int(layer.grown.sum()) for name, layer in seen.items()}, shares, caps)


# -- SRigL -------------------------------------------------------------------------------------------------------------


def near(scores: Tensor, count: int) -> bool:
    """Whether the ``count`` highest are not clearly higher than the rest."""
    ordered = scores.sort(descending=True).values
    return 0 < count < len(ordered) and bool(ordered[count - 1] - ordered[count] < 1e-4 * ordered[0])


@few
@given(nets(), st.floats(0.05, 0.7), st.sampled_from([0.0, 0.3, 0.95]), st.integers(0, 99))
def test_srigl_keeps_a_constant_fan_in(chosen, fraction, ablation, seed):
    method = sk.SRigL(drop_fraction=fraction, update_every=1, drop_schedule="constant", ablation=ablation, exact=True)
    chosen = [replace(shape, density=min(shape.density, 0.8)) for shape in chosen]
    run = Run(chosen, method, seed=seed)
    for _ in range(4):
        gradients = run.bag.dense_gradients(run.steps)
        seen = run.step()
        assert seen is not None
        for number, (name, layer) in enumerate(seen.items()):
            gradient = layer.grid.to_blocks(gradients[name]).double().flatten(1).norm(dim=1)
            width = layer.grid.blocks // layer.grid.rows
            nnz, free = int(layer.before.sum()), int((~layer.before).sum())
            count = min(math.ceil(fraction * nnz - 1e-9), free)
            if not count:
                continue
            rows = layer.rows(layer.after)
            active = rows > 0
            assert int(rows[active].max() - rows[active].min()) <= 1
            # Who is active: salient blocks of each row.
            magnitude = layer.magnitude().masked_fill(~layer.before, -1.0)
            candidates = gradient.masked_fill(layer.before, -1.0)
            salient = torch.zeros(layer.grid.blocks, dtype=torch.bool)
            salient[magnitude.topk(nnz - count).indices] = True
            salient[candidates.topk(count).indices] = True
            # Means of different numbers may be equal, and gradients nearly so.
            unclear = any(near(scores, rank) for scores, rank in ((magnitude, nnz - count), (candidates, count)))
            enough = max(1, int(ablation * max(1, nnz // int((layer.rows(layer.before) > 0).sum()))))
            if number == len(seen) - 1 or ablation == 0:
                assert int(active.sum()) == min(nnz, layer.grid.rows)
            elif not unclear:
                fit = layer.rows(salient) >= enough
                if int(fit.sum()) * width >= nnz:
                    assert torch.equal(active, fit)
                else:
                    assert int(active.sum()) == math.ceil(nnz / width) and (active | ~fit).all()
            # Within a row, the largest blocks stay and the largest gradients grow.
            for row in range(layer.grid.rows):
                places = slice(row * width, (row + 1) * width)
                stayed = (layer.before & layer.after)[places]
                if layer.dropped[places].any() and stayed.any():
                    assert magnitude[places][stayed].min() >= magnitude[places][layer.dropped[places]].max() - 1e-6
                grown, left = layer.grown[places], ~(layer.before | layer.after)[places]
                if grown.any() and left.any():
                    slack = 1e-4 * gradient.max()
                    assert gradient[places][grown].min() >= gradient[places][left].max() - slack


def test_srigl_drops_by_sign_where_asked():
    """Within a row, what the smallest positive and the largest negative weights do not claim stays first."""
    run = Run([layer(1), layer(1)], sk.SRigL(update_every=1, drop_by="signed", drop_schedule="constant", ablation=0))
    seen = run.step()
    assert seen is not None
    differs = 0
    for one in seen.values():
        flat, claimed = one.grid.to_blocks(one.weight).flatten(), torch.zeros(one.grid.blocks, dtype=torch.bool)
        for sign in (True, False):
            of_sign = ((flat < 0) == sign) & one.before
            count = math.ceil(0.3 * int(of_sign.sum()) - 1e-9)
            claimed[flat.abs().masked_fill(~of_sign, 9.0).topk(count, largest=False).indices] = True
        other_way = flat.abs().masked_fill(~one.before, 9.0).topk(int(claimed.sum()), largest=False).indices
        differs += not claimed[other_way].all()
        for row in range(one.grid.rows):
            places = slice(row * 16, (row + 1) * 16)
            spared, trimmed = one.after & claimed, one.dropped & ~claimed
            assert not (spared[places].any() and trimmed[places].any())
    assert differs  # from dropping by size alone


@few
@given(shapes(2), st.integers(0, 999))
def test_pattern_fan_in_fills_rows_evenly(shape, seed):
    mask = make_block_masks({"a": shape.grid}, {"a": shape.nnz}, "fan_in", seed)["a"]
    rows = mask.reshape(shape.grid.rows, -1).sum(1)
    assert int(mask.sum()) == shape.nnz and int(rows.max() - rows.min()) <= 1


def test_pattern_fan_in_draws_columns_uniformly():
    grid = BlockGrid((400, 12), (1, 1))
    mask = make_block_masks({"a": grid}, {"a": 400 * 3}, "fan_in", 7)["a"].reshape(400, 12)
    assert (mask.sum(1) == 3).all()
    columns = mask.sum(0).double()
    # Hypergeometric: each column is in a row with probability 1/4; 5 standard deviations of 400 rows.
    assert (columns - 100).abs().max() < 5 * math.sqrt(400 * 0.25 * 0.75)


# -- saving, waiting ---------------------------------------------------------------------------------------------------


def train(run: Run, steps: int) -> Run:
    """Without tags."""
    for _ in range(steps):
        run.optimizer.zero_grad()
        run.bag.loss(run.steps).backward()
        run.optimizer.step()
        run.topo.step()
        run.steps += 1
    return run


def resume(run: Run, optimizer: str = "momentum", seed: int = 0) -> Run:
    """A run in new objects, from what a checkpoint of ``run`` holds."""
    file = io.BytesIO()
    torch.save([run.bag.state_dict(), run.optimizer.state_dict(), run.topo.state_dict()], file)
    file.seek(0)
    model, optimizer_state, topology_state = torch.load(file, weights_only=True)
    new = Run.__new__(Run)
    new.bag = Bag(run.bag.shapes, seed + 1)
    new.bag.load_state_dict(model)
    new.optimizer = OPTIMIZERS[optimizer](new.bag.parameters())
    new.optimizer.load_state_dict(optimizer_state)
    new.topo = sk.TopologyScheduler(new.bag, new.optimizer, run.topo.method, TOTAL, seed=seed)
    new.topo.load_state_dict(topology_state)
    new.steps = run.steps
    return new


def everything(run: Run) -> dict[str, Any]:
    out: dict[str, Any] = dict(run.bag.state_dict())
    for name, module in run.modules.items():
        state = run.optimizer.state.get(module.values, {})
        out |= {f"{name} {key}": item for key, item in state.items()}
        out |= {f"{name} explored": run.topo.layers[name].explored, f"{name} reliable": run.topo.layers[name].reliable}
    return out | {f"memory {key}": item for key, item in run.topo.memory.items()}


@few
@given(st.data(), nets(spare=0.2), optimizers, st.integers(1, TOTAL - 2), st.integers(0, 99))
def test_a_resumed_run_is_the_same(data, chosen, optimizer, at, seed):
    method = data.draw(st.one_of(fixed(), moving(), gradual(chosen)))

    whole = train(Run(chosen, method, optimizer, seed), at)
    resumed = resume(whole, optimizer, seed)
    train(whole, TOTAL - at), train(resumed, TOTAL - at)
    one, other = everything(whole), everything(resumed)
    assert one.keys() == other.keys()
    for key, item in one.items():
        assert torch.equal(item, other[key]) if isinstance(item, Tensor) else item == other[key], key
    assert whole.topo.updates == resumed.topo.updates


def test_a_global_schedule_resumes_below_the_target_of_one_layer():
    chosen = [layer(1, 0.9), layer(1, 0.9)]
    count = chosen[0].nnz
    method = sk.GradualMagnitude(targets={"layers.l0": count, "layers.l1": 5}, scope="global", update_every=1, end=1.0)
    run = Run(chosen, method)
    for _ in range(6):
        run.step()
    assert run.modules["layers.l0"].layout.nnz < count
    resumed = train(resume(run), TOTAL - 6)
    assert sum(module.layout.nnz for module in resumed.modules.values()) == count + 5


@few
@given(
    nets(),
    st.sampled_from(["rigl", "srigl"]),
    st.booleans(),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(1, 2),
)
def test_gradients_that_are_not_finite_postpone_growth(chosen, name, exact, bad, times):
    assume(any(shape.nnz < shape.grid.blocks for shape in chosen))  # full layers have no places to look at
    run = Run(chosen, topology.method(name, update_every=2, exact=exact))
    run.step()
    layouts = [module.layout.digest() for module in run.modules.values()]
    for _ in range(times):
        run.optimizer.zero_grad()
        (run.bag.loss(run.steps) * bad).backward()
        for parameter in run.bag.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
        assert run.topo.step() is None
        assert [module.layout.digest() for module in run.modules.values()] == layouts
    assert run.step() is not None
    assert run.topo.last_update.number == 0 and run.topo.last_update.step == 2 + times


# -- arithmetic of redistribution --------------------------------------------------------------------------------------


def filled(total: int, shares: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """Real parts min(cap, level * share) that add up to ``total``, the level by bisection."""
    low, high = 0.0, 1.0
    while np.minimum(caps, high * shares).sum() < total - 1e-9:
        high *= 2
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(caps, level * shares).sum() < total else (low, level)
    return np.minimum(caps, high * shares)


def assert_in_proportion(
    parts: Mapping[str, int], shares: Mapping[str, float], caps: Mapping[str, int], slack: float = 1.01
) -> None:
    wanted = filled(sum(parts.values()), np.array([*shares.values()]), np.array([*caps.values()]))
    for (name, part), real in zip(parts.items(), wanted, strict=True):
        assert part <= caps[name] and abs(part - real) <= slack, (parts, wanted)


amounts = st.lists(st.tuples(st.floats(1e-6, 1e6), st.integers(0, 60)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(amounts, st.floats(0, 1))
def test_redistribution_is_exact_and_in_proportion(pairs, share):
    shares = {str(k): s for k, (s, _) in enumerate(pairs)}
    caps = {str(k): cap for k, (_, cap) in enumerate(pairs)}
    total = round(share * sum(caps.values()))
    parts = redistribute(total, shares, caps)
    assert list(parts) == list(shares) and sum(parts.values()) == total
    assert all(type(part) is int and 0 <= part <= caps[name] for name, part in parts.items())
    assert_in_proportion(parts, shares, caps, slack=1 + 1e-6)
    # Shares count relative to each other alone.
    assert redistribute(total, {name: 4.0 * s for name, s in shares.items()}, caps) == parts


def test_redistribution_by_hand():
    assert redistribute(10, {"a": 1, "b": 1, "c": 2}, {"a": 9, "b": 9, "c": 9}) == {"a": 3, "b": 2, "c": 5}
    # c is full at 2; the other 8 go half and half, and b is full at 3.
    assert redistribute(10, {"a": 1, "b": 1, "c": 2}, {"a": 9, "b": 3, "c": 2}) == {"a": 5, "b": 3, "c": 2}
    # No share, no blocks, unless the others are full.
    assert redistribute(4, {"a": 0, "b": 1}, {"a": 9, "b": 9}) == {"a": 0, "b": 4}
    assert redistribute(6, {"a": 0, "b": 1, "c": 0}, {"a": 9, "b": 3, "c": 0}) == {"a": 3, "b": 3, "c": 0}
    assert redistribute(3, {"a": 0, "b": 0}, {"a": 4, "b": 8}) == {"a": 1, "b": 2}
    assert redistribute(5, {"a": 0, "b": 1}, {"a": 9, "b": 9}, {"a": 1}) == {"a": 1, "b": 4}
    assert redistribute(0, {"a": 0}, {"a": 0}) == {"a": 0}


@pytest.mark.parametrize(
    ("total", "share", "least", "message"),
    [
        (11, 1.0, 0, "expected a total of 0..10 blocks, got 11"),
        (1, 1.0, 2, "expected a total of 2..10 blocks, got 1"),
        (5, math.nan, 0, "expected finite shares of 0 or more, got {'a': nan}"),
        (5, -1.0, 0, "expected finite shares of 0 or more, got {'a': -1.0}"),
    ],
)
def test_redistribution_that_cannot_be(total, share, least, message):
    with pytest.raises(ValueError, match=message):
        redistribute(total, {"a": share, "b": 1.0}, {"a": 4, "b": 6}, {"a": least})


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snfs", {"momentum": 1.0}, r"SNFS: momentum: expected a factor within \[0, 1\), got 1.0"),
        ("dsr", {"scope": "layer"}, "DSR: scope: expected 'global'"),
        ("dsr", {"drop_by": "random"}, "DSR: drop_by: expected one of l1, l2, linf, got 'random'"),
        ("dsr", {"threshold": 0.0}, "DSR: threshold: expected a magnitude above 0, got 0.0"),
        ("srigl", {"ablation": 1.5}, "SRigL: ablation: expected a share within"),
        ("srigl", {"scope": "global"}, "SRigL: scope: expected 'layer'"),
        ("srigl", {"min_per_col": 1}, "SRigL: min_per_row, min_per_col: expected 0"),
        ("gradual", {}, "GradualMagnitude: expected one of sparsity=0.9 and targets="),
        ("gradual", {"sparsity": 0.9, "targets": {"a": 1}}, "GradualMagnitude: expected one of sparsity=0.9 and"),
        ("gradual", {"sparsity": 1.0}, r"sparsity: expected a fraction within \[0, 1\), got 1.0"),
        ("gradual", {"sparsity": 0.9, "begin": 0.8}, "begin, end: expected shares of the run, .* got 0.8 and 0.75"),
        ("gradual", {"sparsity": 0.9, "compact_at": (0.0,)}, "compact_at: expected shares within"),
        ("gradual", {"sparsity": 0.9, "sparse_below": 2.0}, "sparse_below: expected a density within"),
        ("gradual", {"sparsity": 0.9, "drop_by": "signed"}, "drop_by: 'signed' drops in proportion to the signs"),
        ("gradual", {"sparsity": 0.9, "drop_fraction": 0.5}, "GradualMagnitude: takes no drop_fraction"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        topology.method(name, **options)


@pytest.mark.parametrize(
    ("chosen", "method", "message"),
    [
        ([layer(), layer()], sk.SNFS(), r"SNFS: expected spare slots .* SparsityConfig\(capacity=1.5\)"),
        ([layer(), layer()], sk.DSR(), r"DSR: expected spare slots .* SparsityConfig\(capacity=1.5\)"),
        ([layer(spare=1.0), layer(4)], sk.DSR(), r"DSR: expected the same block size .* 2x2 \(layers.l0\), 4x4"),
        (
            [layer(), layer(4)],
            sk.GradualMagnitude(sparsity=0.9, scope="global"),
            r"scope='global'\): expected the same block size",
        ),
        ([layer()], sk.GradualMagnitude(sparsity=0.3), "sparsity: expected at least 0.5 .* got 0.3"),
        ([layer()], sk.GradualMagnitude(targets={"l0": 4}), r"targets: expected names .*layers.l0.* got 'l0'"),
        ([layer()], sk.GradualMagnitude(targets={"layers.l0": 33}), r"expected 1..32 blocks \(those it has\), got 33"),
        (
            [layer(), layer()],
            sk.GradualMagnitude(targets={"layers.l0": 4}, scope="global"),
            "scope='global' prunes every sparse layer, got none of 'layers.l1'",
        ),
        (
            [layer(), layer()],
            sk.GradualMagnitude(targets={"layers.l0": 33, "layers.l1": 32}, scope="global"),
            "targets: expected at most 64 blocks in all .* got 65",
        ),
    ],
)
def test_layers_that_do_not_fit(chosen, method, message):
    with pytest.raises(ValueError, match=message):
        Run(chosen, method)


def test_one_layer_needs_no_spare_slots():
    for method in (sk.SNFS(update_every=2), sk.DSR(update_every=2, threshold=0.5)):
        run = Run([layer()], method)
        assert run.step() is None
        seen = run.step()
        assert seen is not None and seen["layers.l0"].dropped.any()
