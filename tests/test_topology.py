"""The topology scheduler as its users see it: what it keeps, what it refuses, what it goes along with."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import topology
from sparsekern.nn import SparseModule

from .topology_reference import OPTIMIZERS, batch, block_masks, network

SPARSE = ("0", "2", "6")
EVERY = {"update_every": 3}
METHODS: dict[str, dict[str, Any]] = {
    "static": {},
    "set": EVERY,
    "set unexplored": EVERY | {"growth": "unexplored"},
    "set global": EVERY | {"scope": "global"},
    "set gradient": EVERY | {"drop_by": "gradient"},
    "rigl": EVERY,
    "rigl exact": EVERY | {"exact": True},
    "srigl": EVERY,
    "snfs": EVERY,
    "dsr": EVERY | {"threshold": 0.03},
    "gradual": EVERY | {"targets": {"0": 2, "2": 4, "6": 1}},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the nets are tiny


def method_of(name: str, **more: Any) -> topology.Method:
    return topology.method(name.split()[0], **(METHODS[name] | more))


class Run:
    """A small sparse net in training."""

    def __init__(
        self,
        method: str | topology.Method,
        *,
        total: int = 40,
        dtype: torch.dtype = torch.float64,
        optimizer: str = "adamw",
        block: int = 8,
        density: float = 0.3,
        capacity: float = 1.5,
        masks_seed: int = 5,
        masked: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.net, self.dtype, self.device = network(dtype), dtype, device
        cfg = sk.SparsityConfig(block=block, below_break_even="sparse", capacity=capacity)
        sk.sparsify_(self.net, cfg, masks=block_masks(self.net, block, density, masks_seed))
        for module in sparse_modules(self.net).values():
            module.masked = masked
        self.net.to(device)
        if torch.device(device).type == "cuda":
            self.net.to(memory_format=torch.channels_last)
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.method = method_of(method) if isinstance(method, str) else method
        self.topo = sk.TopologyScheduler(self.net, self.optimizer, self.method, total, seed=seed)
        self.done = 0

    def backward(self, scale: float = 1.0) -> None:
        x, y = (t.to(self.device) for t in batch(self.done, self.dtype))
        if x.is_cuda:  # what its kernels compute in; others are converted with a warning
            x = x.contiguous(memory_format=torch.channels_last)
        (scale * nn.functional.cross_entropy(self.net(x), y)).backward()
        self.done += 1

    def step(self, times: int = 1) -> Run:
        for _ in range(times):
            self.backward()
            self.optimizer.step()
            self.topo.step()
            self.optimizer.zero_grad()
        return self

    def layouts(self) -> dict[str, str]:
        return {name: module.layout.digest() for name, module in sparse_modules(self.net).items()}

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that a run consists of, as tensors."""
        out = dict(self.net.state_dict())
        for name, module in sparse_modules(self.net).items():
            for key, item in self.optimizer.state[module.values].items():
                out[f"{name}: {key}"] = item
        for name, layer in self.topo.layers.items():
            out[f"{name}: explored"], out[f"{name}: reliable"] = layer.explored, layer.reliable
        memory = {key: item for key, item in self.topo.memory.items() if isinstance(item, Tensor)}
        return {key: item.detach().clone() for key, item in (out | memory).items()}


def sparse_modules(net: nn.Module) -> dict[str, SparseModule]:
    return {name: module for name, module in net.named_modules() if isinstance(module, SparseModule)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


# -- when it acts ------------------------------------------------------------------------------------------------------


def test_counts_optimizer_steps():
    run = Run(sk.SET(update_every=1))
    before = run.layouts()
    assert run.topo.step() is None
    run.backward()
    assert run.topo.step() is None
    assert run.topo.steps == 0 and run.layouts() == before
    run.optimizer.step()
    record = run.topo.step()
    assert record is run.topo.last_update and record.step == 1 and record.number == 0
    after = run.layouts()
    assert all(after[name] != before[name] for name in SPARSE)
    assert run.topo.step() is None
    assert run.layouts() == after and run.topo.steps == 1


@pytest.mark.parametrize("name", ["rigl", "rigl exact", "snfs", "set gradient"])
def test_step_between_micro_batches_changes_nothing(name):
    """With and without the needless calls: the probes keep what they have collected."""
    ends = []
    for eager in (False, True):
        run = Run(name)
        for _ in range(8):
            for _ in range(2):
                run.backward(0.5)
                if eager:
                    run.topo.step()
            run.optimizer.step()
            run.topo.step()
            run.optimizer.zero_grad()
        assert run.topo.updates == 2
        ends.append(run.snapshot())
    assert_same(*ends)


def test_updates_stop_and_fall():
    run = Run(sk.SET(update_every=5, stop_fraction=0.5, drop_fraction=0.4, drop_schedule="linear"))
    records = []
    for _ in range(40):
        run.step()
        if run.topo.last_update is not None:
            records.append((run.topo.last_update.step, run.topo.last_update.fraction))
    assert records == [(5, pytest.approx(0.3)), (10, pytest.approx(0.2)), (15, pytest.approx(0.1))]


@pytest.mark.parametrize("name", ["rigl", "rigl exact"])
def test_probes_only_where_needed(name):
    run = Run(name, total=8)
    armed = []
    for _ in range(8):
        armed.append([module.probe is not None for module in sparse_modules(run.net).values()])
        run.step()
    # Updates follow steps 3 only: 6 is the stop.
    assert [all(row) for row in armed] == [any(row) for row in armed] == [False, False, True] + [False] * 5


def test_nothing_dropped_nothing_moves():
    run = Run(sk.SET(update_every=1, drop_fraction=0.0))
    before = run.layouts()
    run.step(4)
    assert run.layouts() == before and run.topo.updates == 4


def test_full_layers_have_nowhere_to_grow():
    """drop_fraction 1 at density 0.8: as many go as there are free places, the others stay."""
    run = Run(sk.SET(update_every=1, drop_fraction=1.0, drop_schedule="constant"), density=0.8, capacity=1.0)
    free = {name: layer.free for name, layer in run.topo.layers.items()}
    before = {name: layer.stored() for name, layer in run.topo.layers.items()}
    run.step()
    assert run.topo.last_update.dropped == run.topo.last_update.grown == free
    for name, layer in run.topo.layers.items():
        assert bool((before[name] | layer.stored()).all())  # all free places were grown


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_minima_per_row_and_column(method):
    """From masks with empty rows and columns to none below the minimum."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:6, :8] = True
    mask = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    sk.sparsify_(net, sk.SparsityConfig(block=4, below_break_even="sparse"), masks={"0": mask})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options = {"update_every": 1, "drop_fraction": 0.9, "min_per_row": 2, "min_per_col": 2}
    topo = sk.TopologyScheduler(net, optimizer, topology.method(method, **options), 10)
    net(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    topo.step()
    blocks = net[0].layout.block_mask().view(16, 16)
    assert int(blocks.sum()) == 48
    assert blocks.sum(0).min() >= 2 and blocks.sum(1).min() >= 2


def test_averages_of_random_new_values_are_those_values():
    net = network()
    sk.sparsify_(net, sk.SparsityConfig(sparsity=0.7, block=8, below_break_even="sparse"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    topo = sk.TopologyScheduler(net, optimizer, sk.SET(update_every=1, new_values="random"), 10)
    averaged = copy.deepcopy(net)
    topology.follow(topo, averaged)
    for module in averaged.modules():
        if isinstance(module, SparseModule):
            module.values.data.fill_(7.0)
    before = {name: layer.stored() for name, layer in topo.layers.items()}
    x, y = batch(0)
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    topo.step()
    for name, layer in topo.layers.items():
        new = ~before[name][layer.places()]
        twin = averaged.get_submodule(name)
        assert bool(new.any()) and torch.equal(twin.values[new], layer.values[new])
        assert bool((twin.values[~new] == 7.0).all()) and torch.equal(twin.index, layer.module.index)


@pytest.mark.parametrize("method", ["set", "rigl", "srigl"])
@pytest.mark.parametrize("block", [1, 8])
def test_random_new_values(method, block):
    """As large as what stayed, no two alike, padding and spare slots zero, optimizer state zero; the same twice."""
    found = []
    for _ in range(2):
        net = network()
        config = sk.SparsityConfig(sparsity=0.7, block=block, capacity=1.2, below_break_even="sparse")
        sk.sparsify_(net, config)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-9, momentum=0.9)
        options = {"update_every": 1, "drop_fraction": 0.5, "new_values": "random"}
        topo = sk.TopologyScheduler(net, optimizer, topology.method(method, **options), 10, seed=3)
        before = {name: layer.stored().clone() for name, layer in topo.layers.items()}
        x, y = batch(0)
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        topo.step()
        for name, layer in topo.layers.items():
            places, values = layer.places(), layer.values.detach()
            new = ~before[name][places]
            assert bool(new.any())
            inside = layer.inside(places)
            blocks = torch.ones(layer.grid.weight_shape, dtype=torch.bool)
            assert torch.equal(inside, layer.grid.to_blocks(blocks)[places])
            assert not bool(values[: layer.nnz][~inside].any()) and not bool(values[layer.nnz :].any())
            drawn, kept = values[: layer.nnz][new][inside[new]], values[: layer.nnz][~new][inside[~new]]
            assert drawn.unique().numel() == drawn.numel()
            assert not bool(optimizer.state[layer.values]["momentum_buffer"][: layer.nnz][new].any())
            if drawn.numel() > 200:
                assert 0.8 < float(drawn.square().mean().sqrt() / kept.square().mean().sqrt()) < 1.25
            found.append(values.clone())
    half = len(found) // 2
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))


def test_grows_where_no_gradient_arrives():
    """A layer that the loss does not reach has equal scores everywhere."""
    holder = nn.ModuleDict({"used": network(), "spare": nn.Linear(32, 32).double()})
    masks = {f"used.{name}": mask for name, mask in block_masks(holder["used"], 8).items()}
    masks["spare"] = torch.arange(32)[:, None].expand(32, 32) < 16
    sk.sparsify_(holder, sk.SparsityConfig(block=8, below_break_even="sparse"), masks=masks)
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.1)
    topo = sk.TopologyScheduler(holder, optimizer, sk.RigL(update_every=1), 10)
    x, y = batch(0)
    nn.functional.cross_entropy(holder["used"](x), y).backward()
    optimizer.step()
    topo.step()
    assert topo.last_update.grown["spare"] == 3  # ceil(0.3 * 8)
    assert holder["spare"].layout.nnz == 8


# -- what moves with the blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_values_gradient_and_state_follow(optimizer):
    """Kept blocks keep their rows, grown blocks and spare slots are zero, and nothing is replaced."""
    run = Run(sk.SET(update_every=4), optimizer=optimizer).step(3)
    parameters = {name: module.values for name, module in sparse_modules(run.net).items()}
    indices = {name: module.index.data_ptr() for name, module in sparse_modules(run.net).items()}
    maps: list[dict[str, Tensor]] = []
    run.topo.on_update(lambda slot_maps: maps.append(dict(slot_maps)))
    run.backward()
    run.optimizer.step()

    def rows() -> dict[str, Tensor]:
        out = {}
        for name, module in sparse_modules(run.net).items():
            out[f"{name} values"], out[f"{name} grad"] = module.values.detach(), module.values.grad
            state = run.optimizer.state[module.values].items()
            out |= {f"{name} {key}": item for key, item in state if item.dim() == 3}
        return {key: item.clone() for key, item in out.items()}

    masks = {name: module.mask for name, module in sparse_modules(run.net).items()}
    before = {key: (item, run.net.get_submodule(key[0]).layout.to_dense(item)) for key, item in rows().items()}
    run.topo.step()
    for key, item in rows().items():
        module = run.net.get_submodule(key[0])
        expected = before[key][1] * (masks[key[0]] & module.mask)
        assert torch.equal(module.layout.to_dense(item), expected), key
        assert torch.equal(item, module.layout.from_dense(expected)), f"{key}: spare slots or padding"
        shadow = before[key][0].clone()
        topology.remap_(shadow, maps[0][key[0]])
        assert torch.equal(shadow, item), f"{key}: slot map"
    assert len(maps) == 1
    for name, module in sparse_modules(run.net).items():
        assert module.values is parameters[name] and module.index.data_ptr() == indices[name]


def test_optimizer_state_that_cannot_follow():
    class Factored(torch.optim.Optimizer):
        """Keeps a mean over the blocks."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["factor"] = p.grad.square().mean(0)

    run = Run("set")
    optimizer = Factored(run.net.parameters())
    topo = sk.TopologyScheduler(run.net, optimizer, sk.SET(update_every=1), 10)
    before = run.layouts()
    run.backward()
    optimizer.step()
    with pytest.raises(TypeError, match=r"Factored: expected optimizer state with one row per block .* got 'factor'"):
        topo.step()
    assert run.layouts() == before
    with pytest.raises(TypeError, match="one row per block"):
        sk.TopologyScheduler(run.net, optimizer, sk.SET(), 10)


@pytest.mark.parametrize("name", METHODS)
def test_invariants_on_every_device(name, device):
    """Counts, layouts and zeros after every step; methods that need the backward have it from this device's kernels."""
    run = Run(name, dtype=torch.float32, device=device)
    total = sum(layer.nnz for layer in run.topo.layers.values())
    for _ in range(10):
        run.step()
        for key, module in sparse_modules(run.net).items():
            module.layout.validate()
            assert module.layout.nnz == run.topo.layers[key].nnz <= module.layout.capacity
            for item in (module.values.detach(), run.optimizer.state[module.values]["exp_avg"]):
                assert torch.equal(module.layout.from_dense(module.layout.to_dense(item)), item)
        counts = sum(layer.nnz for layer in run.topo.layers.values())
        assert counts < total if name == "gradual" and run.topo.updates else counts == total
    assert run.topo.updates == (0 if name == "static" else 3)


# -- averaged copies ---------------------------------------------------------------------------------------------------


def dense(module: SparseModule) -> Tensor:
    return module.layout.to_dense(module.values.detach())


@pytest.mark.parametrize("kind", ["copy", "averaged model"])
def test_averages_follow(kind):
    """Against averages of the dense weights, in which dropped weights are zeroed."""
    run = Run("set")
    if kind == "copy":
        averaged: nn.Module = copy.deepcopy(run.net)
        inner = averaged
    else:
        averaged = torch.optim.swa_utils.AveragedModel(
            run.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        inner = averaged.module
        averaged.update_parameters(run.net)  # the first call copies
    topology.follow(run.topo, averaged)
    expected = {name: dense(module) for name, module in sparse_modules(run.net).items()}
    masks = {name: module.mask for name, module in sparse_modules(run.net).items()}
    for _ in range(10):
        run.step()
        for name, module in sparse_modules(run.net).items():
            expected[name] *= masks[name] & module.mask
            masks[name] = module.mask
            expected[name] = 0.9 * expected[name] + 0.1 * dense(module)
        if kind == "copy":
            with torch.no_grad():
                for mean, value in zip(inner.parameters(), run.net.parameters(), strict=True):
                    mean.mul_(0.9).add_(value, alpha=0.1)
        else:
            averaged.update_parameters(run.net)
        for name, module in sparse_modules(inner).items():
            assert torch.equal(module.mask, masks[name])
            torch.testing.assert_close(dense(module), expected[name])
    assert run.topo.updates == 3
    x, _ = batch(0)
    averaged.eval()
    assert averaged(x).isfinite().all()


def test_follow_expects_a_copy():
    run = Run("set")
    with pytest.raises(ValueError, match="averaged: expected a sparse layer '0' as in the model; copy the model first"):
        topology.follow(run.topo, network())


@pytest.mark.parametrize("name", METHODS)
def test_copied_model_trains_on_its_own(name):
    """deepcopy in the middle of a run, probes armed: the original does not notice."""
    run = Run(name).step(2)  # an update follows the next step
    twin = copy.deepcopy(run.net)
    before = run.snapshot()
    optimizer = OPTIMIZERS["sgd"](twin.parameters())
    topo = sk.TopologyScheduler(twin, optimizer, method_of(name), 40)
    for number in range(4):
        x, y = batch(number)
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
        topo.step()
        optimizer.zero_grad()
    assert_same(run.snapshot(), before)
    alone = Run(name).step(5)
    run.step(3)
    assert_same(run.snapshot(), alone.snapshot())


# -- mixed precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "late"),
    [("set", 0), ("set gradient", 0), ("rigl", 1), ("rigl exact", 1), ("srigl", 1), ("snfs", 0), ("dsr", 0)],
)
@pytest.mark.parametrize("fused", [False, True])
def test_overflow_at_the_update_step(name, late, fused):
    """The scaler skips the step; methods that look at gradients wait for clean ones, for one step."""
    run = Run(name, dtype=torch.float32)
    if fused:
        run.optimizer = torch.optim.AdamW(run.net.parameters(), fused=True)
        run.topo = sk.TopologyScheduler(run.net, run.optimizer, run.method, 40)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = run.layouts()
    updates = []
    for number in range(10):
        x, y = batch(number, torch.float32)
        factor = torch.inf if number == 2 else 1.0  # the third optimizer step is due
        scaler.scale(nn.functional.cross_entropy(run.net(x), y) * factor).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.topo.step()
        run.optimizer.zero_grad()
        if number == 2:
            assert run.topo.steps == 2 and run.layouts() == before
        if run.topo.last_update is not None and number != 2:
            updates.append(run.topo.last_update.step)
    assert run.topo.steps == 9
    assert updates == [3 + late, 6, 9]
    for module in sparse_modules(run.net).values():
        module.layout.validate()
        assert module.values.isfinite().all()
        assert torch.equal(module.layout.from_dense(dense(module)), module.values)
    for item in run.topo.memory.values():
        assert not isinstance(item, Tensor) or item.isfinite().all()


@pytest.mark.parametrize("name", ["rigl", "rigl exact"])
def test_loss_scale_does_not_matter(name):
    """Powers of two scale every score exactly, so growth is the same."""
    plain, scaled = Run(name, optimizer="sgd"), Run(name, optimizer="sgd")
    for _ in range(6):
        plain.step()
        scaled.backward(1024.0)
        for parameter in scaled.net.parameters():
            parameter.grad /= 1024.0
        scaled.optimizer.step()
        scaled.topo.step()
        scaled.optimizer.zero_grad()
    assert plain.topo.updates == 2
    assert_same(plain.snapshot(), scaled.snapshot())


def test_autocast():
    """Under bf16 autocast the probes hold the norms of the fp32 gradient within bf16's rounding."""
    run = Run("rigl", dtype=torch.float32, block=4).step(2)
    x, y = batch(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(run.net(x).float(), y)
    loss.backward()
    found = {name: module.probe.grad.clone() for name, module in sparse_modules(run.net).items()}
    run.optimizer.zero_grad()
    for module in sparse_modules(run.net).values():
        module.probe.grad = None
    nn.functional.cross_entropy(run.net(x), y).backward()
    for name, module in sparse_modules(run.net).items():
        exact = module.probe.grad
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name] == -torch.inf, run.topo.layers[name].stored())
        free = ~run.topo.layers[name].stored()
        assert (found[name] - exact)[free].norm() < 0.05 * exact[free].norm()


# -- compiled and masked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "graphs"), [("set", 1), ("rigl", 2), ("rigl exact", 2), ("snfs", 1)])
def test_compiled_model_does_not_recompile(name, graphs):
    """One graph, and one more where probes come and go, however often blocks move; the results are the eager ones."""
    from torch._dynamo.testing import CompileCounterWithBackend

    eager, run = Run(name), Run(name)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(run.net, backend=counter, fullgraph=True)
    topo = sk.TopologyScheduler(compiled, run.optimizer, run.method, 40)
    for number in range(16):
        x, y = batch(number)
        nn.functional.cross_entropy(compiled(x), y).backward()
        run.optimizer.step()
        topo.step()
        run.optimizer.zero_grad()
    eager.step(16)
    assert topo.updates == 5
    assert counter.frame_count == graphs
    assert run.layouts() == eager.layouts()
    for key, item in run.net.state_dict().items():
        torch.testing.assert_close(item, eager.net.state_dict()[key])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", METHODS)
def test_masked_layers_take_the_same_way(name):
    """Dense compute on the materialised weight changes roundings, not the topology."""
    sparse, masked = Run(name), Run(name, masked=True)
    for _ in range(12):
        sparse.step()
        masked.step()
        assert sparse.layouts() == masked.layouts()
    for name, module in sparse_modules(masked.net).items():
        torch.testing.assert_close(module.values, sparse.net.get_submodule(name).values, rtol=1e-8, atol=1e-10)


# -- saving and resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [11, 13])
def test_resumed_run_continues_bit_for_bit(name, at):
    """Saved right before an update (11) and right after one (13, with explored blocks), into fresh objects."""
    whole = Run(name).step(20)
    first = Run(name).step(at)
    file = io.BytesIO()
    parts = {"model": first.net, "optimizer": first.optimizer, "topology": first.topo}
    torch.save({key: part.state_dict() for key, part in parts.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Run(name, masks_seed=99)
    assert second.layouts() != first.layouts()
    second.net.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.topo.load_state_dict(saved["topology"])
    second.done = at
    assert_same(second.snapshot(), first.snapshot())
    second.step(20 - at)
    assert (second.topo.steps, second.topo.updates) == (whole.topo.steps, whole.topo.updates)
    assert_same(second.snapshot(), whole.snapshot())
    assert second.topo.exploration_rates() == whole.topo.exploration_rates()
    assert second.topo.reliably_explored() == whole.topo.reliably_explored()


def test_state_keeps_a_postponed_update():
    run = Run("rigl", dtype=torch.float32)
    run.step(2)
    run.backward()
    sparse_modules(run.net)["6"].probe.grad.fill_(torch.nan)
    run.optimizer.step()
    assert run.topo.step() is None
    state = run.topo.state_dict()
    assert state["pending"] and state["updates"] == 0
    other = Run("rigl", dtype=torch.float32)
    other.net.load_state_dict(run.net.state_dict())
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    other.topo.load_state_dict(state)
    other.done = 3
    other.step()
    assert other.topo.last_update is not None and other.topo.last_update.step == 4


def test_compaction_and_resuming_after_it():
    """Spare slots are given back: new Parameters in the optimizer, averages along, and a checkpoint goes on."""
    method = method_of("gradual", compact_at=(0.5, 1.0))
    run = Run(method)
    averaged = copy.deepcopy(run.net)
    topology.follow(run.topo, averaged)
    sizes, compactions = [], []
    middle = None
    for number in range(1, 41):
        before = [module.values for module in sparse_modules(run.net).values()]
        run.step()
        sizes.append(sum(module.values.shape[0] for module in sparse_modules(run.net).values()))
        replaced = [module.values is not old for module, old in zip(sparse_modules(run.net).values(), before)]
        assert all(replaced) == any(replaced)
        if all(replaced):
            assert run.topo.last_update.compacted
            compactions.append(number)
            held = {id(p) for p in run.optimizer.param_groups[0]["params"]}
            for name, module in sparse_modules(run.net).items():
                assert module.values.shape[0] == module.layout.capacity == module.layout.nnz
                assert id(module.values) in held
                assert run.optimizer.state[module.values]["exp_avg"].shape == module.values.shape
                assert averaged.get_submodule(name).values.shape == module.values.shape
                assert torch.equal(averaged.get_submodule(name).mask, module.mask)
            assert len(run.optimizer.state) == len(held)
        if number == 12:
            middle = {
                "model": copy.deepcopy(run.net.state_dict()),
                "optimizer": copy.deepcopy(run.optimizer.state_dict()),
                "topology": copy.deepcopy(run.topo.state_dict()),
            }
    assert len(compactions) == 2 and compactions[0] < 12 < compactions[1]
    assert sizes[0] > sizes[11] > sizes[39] == 2 + 4 + 1
    assert middle is not None
    second = Run("static")
    second.net = sk.restore_(network(), middle["model"])
    second.optimizer = OPTIMIZERS["adamw"](second.net.parameters())
    second.optimizer.load_state_dict(middle["optimizer"])
    second.topo = sk.TopologyScheduler(second.net, second.optimizer, method, 40)
    second.topo.load_state_dict(middle["topology"])
    second.done = 12
    second.step(28)
    assert_same(second.snapshot(), run.snapshot())
    averaged.eval()
    assert averaged(batch(0)[0]).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "RigL"}, "expected method SET, got RigL; build the scheduler as before"),
        ({"seed": 4}, "expected seed 0, got 4"),
        ({"total_steps": 80}, "expected total_steps 40, got 80"),
        ({"format": 9}, "expected format 1, got 9"),
        ({"layers": {"0": None, "other": None}}, "expected the layers of this model, got others: 2, 6, other"),
    ],
)
def test_state_of_something_else(change, message):
    run = Run("set").step(4)
    with pytest.raises(ValueError, match=message):
        run.topo.load_state_dict({**run.topo.state_dict(), **change})


def test_state_of_other_options():
    saved = Run("set global").topo.state_dict()
    with pytest.raises(ValueError, match=r"expected options \{.*'scope': 'layer'.*\}, got \{.*'scope': 'global'"):
        Run("set").topo.load_state_dict(saved)


def test_state_of_another_layout():
    saved = Run("set").step(4).topo.state_dict()
    run = Run("set")
    with pytest.raises(ValueError, match="0 has another layout than when the state was saved; load the model's state"):
        run.topo.load_state_dict(saved)


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_values_that_the_optimizer_does_not_hold():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # of the dense weights
    sk.sparsify_(net, sk.SparsityConfig(block=8, below_break_even="sparse"), masks=block_masks(net, 8))
    with pytest.raises(ValueError, match="expected the values of '0' among its parameters; build the optimizer after"):
        sk.TopologyScheduler(net, optimizer, sk.SET(), 10)


def test_optimizer_handed_over_by_sparsify():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sk.sparsify_(
        net, sk.SparsityConfig(block=8, below_break_even="sparse"), masks=block_masks(net, 8), optimizer=optimizer
    )
    assert set(sk.TopologyScheduler(net, optimizer, sk.SET(), 10).layers) == set(SPARSE)


def test_element_masks():
    net = network()
    mask = torch.rand(net[6].weight.shape) < 0.5
    sk.sparsify_(net, sk.SparsityConfig(block=8, below_break_even="sparse"), masks={"6": mask})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="6: SET moves whole blocks, and this layer has pruned elements"):
        sk.TopologyScheduler(net, optimizer, sk.SET(), 10)
    sk.TopologyScheduler(net, optimizer, sk.Static(), 10)


def test_nothing_sparse():
    net = network()
    with pytest.raises(ValueError, match="expected sparse layers with trainable values, got none; call sparsify_"):
        sk.TopologyScheduler(net, torch.optim.SGD(net.parameters(), lr=0.1), sk.SET(), 10)


def test_diverged_weights_keep_the_counts():
    """Blocks of NaN are as many as before, though spare slots have no score either."""
    run = Run(sk.SET(update_every=1)).step()
    for module in sparse_modules(run.net).values():
        module.values.data[: module.layout.nnz].fill_(torch.nan)
    run.step(2)
    for name, layer in run.topo.layers.items():
        assert run.net.get_submodule(name).layout.nnz == layer.nnz


def test_frozen_layers_stay():
    run = Run("set")
    run.net[2].values.requires_grad_(False)
    before = run.layouts()
    topo = sk.TopologyScheduler(run.net, run.optimizer, sk.SET(update_every=1), 40)
    assert set(topo.layers) == {"0", "6"}
    run.backward()
    run.optimizer.step()
    topo.step()
    assert {name for name in SPARSE if run.layouts()[name] != before[name]} == {"0", "6"}


def test_gradient_that_is_gone():
    run = Run("set gradient").step(2)
    run.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"0: drop_by='gradient' expected the gradient of this step, got None; call"):
        run.topo.step()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("set", {"drop_fraction": 1.5}, r"SET: drop_fraction: expected a share within \[0, 1\], got 1.5"),
        ("set", {"stop_fraction": 0.0}, r"SET: stop_fraction: expected a share within \(0, 1\], got 0.0"),
        ("rigl", {"update_every": 0}, "RigL: update_every: expected a whole number of 1 or more, got 0"),
        ("rigl", {"update_every": 2.5}, "RigL: update_every: expected a whole number of 1 or more, got 2.5"),
        ("set", {"min_per_row": -1}, "SET: min_per_row: expected a whole number of 0 or more, got -1"),
        ("set", {"drop_schedule": "step"}, "SET: drop_schedule: expected one of cosine, linear, constant, got 'step'"),
        ("set", {"drop_by": "l3"}, "SET: drop_by: expected one of l1, .*, got 'l3'"),
        ("rigl", {"scope": "net"}, "RigL: scope: expected one of layer, global, got 'net'"),
        ("set", {"growth": "gradient"}, "SET: growth: expected one of random, unexplored, got 'gradient'"),
        ("sett", {}, "method: expected one of static, set, rigl.*, got 'sett'"),
        ("srigl", {"scope": "global"}, "SRigL: scope: expected 'layer' .*, got 'global'"),
        ("srigl", {"ablation": 2}, r"SRigL: ablation: expected a share within \[0, 1\], got 2"),
        ("snfs", {"momentum": 1.0}, r"SNFS: momentum: expected a factor within \[0, 1\), got 1.0"),
        ("dsr", {"scope": "layer"}, "DSR: scope: expected 'global' .*, got 'layer'"),
        ("dsr", {"threshold": 0.0}, "DSR: threshold: expected a magnitude above 0, got 0.0"),
        ("gradual", {}, "GradualMagnitude: expected one of sparsity=0.9 and targets="),
        ("gradual", {"sparsity": 0.9, "drop_fraction": 0.5}, "GradualMagnitude: takes no drop_fraction"),
        ("gradual", {"sparsity": 0.9, "begin": 0.8}, "begin, end: expected shares of the run, .*, got 0.8 and 0.75"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        topology.method(name, **options)


def test_option_of_another_method():
    with pytest.raises(TypeError, match="exact"):
        topology.method("set", exact=True)


@pytest.mark.parametrize(
    ("method", "block", "message"),
    [
        (sk.SET(drop_by="signed"), 8, "drop_by='signed': expected blocks of 1x1"),
        (sk.SET(growth="unexplored", min_per_row=1), 8, "growth='unexplored' does not go with min_per_row"),
        ("set", 8, "method: expected a topology method such as SET"),
        (
            topology.GradualMagnitude(targets={"9": 3}),
            8,
            r"targets: expected names of sparse layers \(0, 2, 6\), got '9'",
        ),
        (topology.GradualMagnitude(targets={"0": 30}), 8, r"targets\['0'\]: expected 1..5 blocks .*, got 30"),
        (topology.GradualMagnitude(sparsity=0.5), 8, "sparsity: expected at least .*, got 0.5; pruning starts from"),
    ],
)
def test_methods_that_do_not_fit(method, block, message):
    run = Run("static", block=block)
    with pytest.raises(ValueError, match=message):
        sk.TopologyScheduler(run.net, run.optimizer, method, 10)


@pytest.mark.parametrize("name", ["snfs", "dsr"])
def test_blocks_need_room_and_one_size_to_change_layers(name):
    with pytest.raises(ValueError, match="expected spare slots for blocks that change layers"):
        Run(name, capacity=1.0)
    net = network()
    masks = block_masks(net, 4)
    sk.sparsify_(net, sk.SparsityConfig(block=4, below_break_even="sparse", capacity=2.0), masks={"0": masks["0"]})
    sk.sparsify_(net, sk.SparsityConfig(block=2, below_break_even="sparse", capacity=2.0), masks={"6": masks["6"]})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"expected the same block size in every sparse layer.* got 4x4 \(0\), 2x2"):
        sk.TopologyScheduler(net, optimizer, method_of(name), 10)


def test_no_steps():
    run = Run("static")
    with pytest.raises(ValueError, match="total_steps: expected 1 or more optimizer steps, got 0"):
        sk.TopologyScheduler(run.net, run.optimizer, sk.SET(), 0)
