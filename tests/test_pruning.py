"""Pruning against direct computations: which weights go, how many, and that what stays keeps its bits."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern import pruning
from sparsekern.allocation import allocate, compute_scores
from sparsekern.layout import BlockGrid
from sparsekern.nn import SparseConv2d, SparseLinear, SparseModule


class Net(nn.Module):
    """Two convolutions, one with groups, and two linear layers; the second is the classifier and stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.grouped = nn.Conv2d(10, 12, 3, groups=2)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12 * 4, 14)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.norm(self.conv(x)))))
        return self.head(F.relu(self.fc(self.drop(x.flatten(1)))))


NAMES = ["conv", "grouped", "fc"]
X = torch.randn(6, 8, 4, 4, generator=torch.Generator().manual_seed(7))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
DATA = [(X, Y)]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 13), nn.ReLU(), nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 3))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def dense_weights(model: nn.Module, names: list[str] = NAMES) -> dict[str, np.ndarray]:
    return {name: model.get_submodule(name).weight.detach().numpy().copy() for name in names}


def masks_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Of dense layers too."""
    return {
        name: module.mask.numpy() if isinstance(module, SparseModule) else np.ones(module.weight.shape, bool)
        for name in NAMES
        for module in [model.get_submodule(name)]
    }


def count(masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def sizes(model: nn.Module) -> int:
    return sum(w.size for w in dense_weights(model).values())


def blocks_by_loop(shape, block, groups):
    """Index tuples of each block's elements inside the weight, in the order group, row, tap, column."""
    o, i, taps = shape[0] // groups, shape[1], list(itertools.product(*map(range, shape[2:])))
    for g in range(groups):
        for r in range(0, o, block[0]):
            for tap in taps:
                for c in range(0, i, block[1]):
                    rows = range(g * o + r, g * o + min(r + block[0], o))
                    cols = range(c, min(c + block[1], i))
                    yield [(row, col, *tap) for row in rows for col in cols]


def prune_by_loop(weights, groups, block, keep, score_of):
    """Global pruning of whole blocks by falling score, up to the count nearest to ``keep``."""
    entries = []
    for name, w in weights.items():
        blocks = list(blocks_by_loop(w.shape, block, groups.get(name, 1)))
        scores = score_of([np.array([w[e] for e in b]) for b in blocks])
        entries += [(score, name, b) for score, b in zip(scores, blocks)]
    entries.sort(key=lambda e: -e[0])
    masks = {name: np.zeros(w.shape, bool) for name, w in weights.items()}
    kept = 0
    for _, name, b in entries:
        if abs(kept + len(b) - keep) >= abs(kept - keep):
            break
        kept += len(b)
        for e in b:
            masks[name][e] = True
    return masks


def train(model: nn.Module, steps: int = 2, optimizer: torch.optim.Optimizer | None = None, **adam) -> None:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 0.01, **adam)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


# -- which weights go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.995])
def test_global_magnitude_is_a_threshold_over_all_layers(net, sparsity):
    weights = dense_weights(net)
    flat = np.sort(np.concatenate([np.abs(w).ravel() for w in weights.values()]))
    keep = round((1 - sparsity) * flat.size)
    got = pruning.prune_masks(net, sparsity, min_blocks=0)
    assert list(got) == NAMES
    for name, w in weights.items():
        assert np.array_equal(got[name].numpy(), np.abs(w) >= flat[-keep])
    assert count(got) == keep


@pytest.mark.parametrize("block", [(4, 5), (3, 2), (16, 16)])
@pytest.mark.parametrize("sparsity", [0.4, 0.85])
def test_blocks_with_ragged_edges_taps_and_groups(net, block, sparsity):
    """Sums over blocks; narrow ones (and the whole grouped layer under 16x16) by their own number of weights."""
    weights = dense_weights(net)
    keep = round((1 - sparsity) * sizes(net))
    expected = prune_by_loop(
        weights, {"grouped": 2}, block, keep, lambda blocks: [np.abs(b).astype(np.float64).mean() for b in blocks]
    )
    got = pruning.prune_masks(net, sparsity, block=block, min_blocks=0)
    for name in NAMES:
        assert np.array_equal(got[name].numpy(), expected[name]), name
    assert abs(count(got) - keep) <= block[0] * block[1] / 2


def test_whole_blocks_are_ranked_by_their_l1_norm():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 2))
    got = pruning.prune_masks(model, 0.75, block=4, min_blocks=0)
    norms = torch.cat(
        [model[i].weight.detach().abs().double().unfold(0, 4, 4).unfold(1, 4, 4).sum((2, 3)).flatten() for i in (0, 1)]
    )
    kept = torch.cat([got[str(i)].unfold(0, 4, 4).unfold(1, 4, 4)[..., 0, 0].flatten() for i in (0, 1)])
    assert int(kept.sum()) == 6
    assert float(norms[kept].min()) > float(norms[~kept].max())


def test_lamp_of_blocks_by_loop(net):
    def lamp(blocks):
        q = [float(np.square(b.astype(np.float64)).mean()) for b in blocks]
        return [a / sum(b for b in q if b >= a) for a in q]

    for block in ((1, 1), (4, 3)):
        keep = round(0.2 * sizes(net))
        expected = prune_by_loop(dense_weights(net), {"grouped": 2}, block, keep, lamp)
        got = pruning.prune_masks(net, 0.8, "lamp", block=block)
        for name in NAMES:
            assert np.array_equal(got[name].numpy(), expected[name]), (block, name)


def test_single_weights_under_lamp_are_those_of_its_scores(net):
    scores = compute_scores(net, NAMES, "lamp")
    flat = torch.cat([s.flatten() for s in scores.values()]).sort().values
    got = pruning.prune_masks(net, 0.9, "lamp")
    for name in NAMES:
        assert torch.equal(got[name], scores[name] >= flat[-round(0.1 * sizes(net))])


@pytest.mark.parametrize("criterion", ["gradient", "snip"])
def test_gradient_criteria_of_blocks(net, criterion):
    """gradient in eval mode (running statistics, no dropout); gradients of the batches add up with their signs."""
    train(net)
    net.double()
    data = [(X[:3].double(), Y[:3]), (X[3:].double(), Y[3:])]
    twin = copy.deepcopy(net)
    twin.train(criterion == "snip")
    twin.drop.p = net.drop.p = 0.0
    for x, y in data:
        F.cross_entropy(twin(x), y).backward()
    saliency = {
        name: (m.weight * m.weight.grad).abs().detach().numpy() for name, m in twin.named_modules() if name in NAMES
    }
    got = pruning.compute(net, criterion, batches=data)
    for name in NAMES:
        np.testing.assert_allclose(got[name].numpy(), saliency[name], rtol=1e-9, atol=1e-15)
    keep = round(0.3 * sizes(net))
    expected = prune_by_loop(saliency, {"grouped": 2}, (2, 2), keep, lambda blocks: [b.mean() for b in blocks])
    masks = pruning.prune_masks(net, 0.7, criterion, block=2, batches=data)
    for name in NAMES:
        assert np.array_equal(masks[name].numpy(), expected[name])


def test_gradient_sees_no_dropout_and_no_batch_statistics(net):
    one = pruning.compute(net, "gradient", batches=DATA, seed=1)
    two = pruning.compute(net, "gradient", batches=DATA, seed=2)
    snip = pruning.compute(net, "snip", batches=DATA, seed=1)
    assert all(torch.equal(one[name], two[name]) for name in NAMES)
    assert not any(torch.allclose(one[name], snip[name]) for name in NAMES)


def test_random_has_a_stream_for_every_layer():
    """Equal layers must not lose the same weights, nor those that a random mask of the same seed would."""
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)])
    for block in (1, 4):
        got = pruning.prune_masks(model, 0.5, "random", block=block, seed=3)
        agree = (got["0"] == got["1"]).double().mean()
        assert 0.25 < float(agree) < 0.75
        again = pruning.prune_masks(model, 0.5, "random", block=block, seed=3)
        other = pruning.prune_masks(model, 0.5, "random", block=block, seed=4)
        assert all(torch.equal(got[name], again[name]) and not torch.equal(got[name], other[name]) for name in got)


def test_random_blocks_are_equally_likely_at_edges_and_in_narrow_layers():
    model = nn.Sequential(nn.Linear(10, 9), nn.Linear(9, 3), nn.Linear(3, 2))
    blocks = {"0": 3 * 3, "1": 3 * 1}  # 4x4, ragged in both directions
    hits = {name: torch.zeros(n) for name, n in blocks.items()}
    for seed in range(150):
        masks = pruning.prune_masks(model, 0.5, "random", block=4, seed=seed, min_blocks=0)
        for name, mask in masks.items():
            hits[name] += BlockGrid(tuple(mask.shape), (4, 4)).to_blocks(mask).flatten(1).any(1)
    rates = torch.cat(list(hits.values())) / 150
    assert 0.3 < float(rates.min()) and float(rates.max()) < 0.7


def test_ties_are_broken_at_random_and_the_count_is_exact():
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 2))
    with torch.no_grad():
        for layer in model[:2]:
            layer.weight.fill_(0.5)
            layer.weight[0, :5] = 2.0
            layer.weight[1, :7] = -0.1
    masks = pruning.prune_masks(model, 0.6, names=["0", "1"])
    assert count(masks) == 480
    for i, mask in enumerate(masks.values()):
        assert bool(mask[0, :5].all()) and not bool(mask[1, :7].any())
        assert 170 < int(mask.sum()) < 310
        rows = mask[2:].sum(1)
        assert int(rows.min()) > 0 and bool((rows < mask.shape[1]).all()), i  # not the first ones
    other = pruning.prune_masks(model, 0.6, names=["0", "1"], seed=1)
    assert count(other) == 480 and not torch.equal(masks["0"], other["0"])


def test_given_scores(net):
    generator = torch.Generator().manual_seed(5)
    scores = {name: torch.randn(net.get_submodule(name).weight.shape, generator=generator) for name in ("conv", "fc")}
    masks = pruning.prune_masks(net, 0.75, scores)
    flat = torch.cat([s.flatten() for s in scores.values()]).sort().values
    assert list(masks) == ["conv", "fc"]
    for name in masks:
        assert torch.equal(masks[name], scores[name] >= flat[-round(flat.numel() * 0.25)])


# -- how many per layer -----------------------------------------------------------------------------------------------


def test_layer_scope_is_a_threshold_in_each_layer(net):
    masks = pruning.prune_masks(net, 0.8, scope="layer")
    for name, w in dense_weights(net).items():
        keep = int(masks[name].sum())
        assert abs(keep - 0.2 * w.size) < 1
        assert np.array_equal(masks[name].numpy(), np.abs(w) >= np.sort(np.abs(w).ravel())[-keep])
    assert count(masks) == round(0.2 * sizes(net))


@pytest.mark.parametrize(
    ("scheme", "sparsity"), [("erk", 0.9), ("uniform", 0.95), ("balanced", 0.8), ("uniform+", 0.5)]
)
def test_layer_scope_with_a_scheme_has_the_counts_of_sparsify(net, scheme, sparsity):
    masks = pruning.prune_masks(net, sparsity, "random", scope="layer", per_layer=scheme)
    other = copy.deepcopy(net)
    cfg = sk.SparsityConfig(sparsity=sparsity, allocation=scheme, block=1, below_break_even="sparse")
    plan = {layer.name: layer.params for layer in sk.sparsify_(other, cfg).layers}
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {name: plan[name] for name in NAMES}


def test_layer_scope_with_blocks_holds_the_total(net):
    for block, sparsity in itertools.product((2, 4, (3, 5)), (0.5, 0.8, 0.93)):
        masks = pruning.prune_masks(net, sparsity, scope="layer", per_layer="erk", block=block)
        bo, bi = (block, block) if isinstance(block, int) else block
        assert abs(count(masks) - (1 - sparsity) * sizes(net)) <= bo * bi / 2 + 0.5
        shapes = {name: w.shape for name, w in dense_weights(net).items()}
        for name, d in allocate(shapes, sparsity, "erk", stem=None, head=None).items():
            assert abs(int(masks[name].sum()) - d * masks[name].numel()) <= 1.5 * bo * bi


def test_layer_scope_with_given_sparsities(net):
    masks = pruning.prune_masks(net, None, scope="layer", per_layer={"fc": 0.9, "conv": 0.25})
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"conv": 540, "fc": round(0.1 * 48 * 14)}


def test_min_blocks_guards_against_layer_collapse(net):
    with torch.no_grad():
        net.fc.weight.mul_(1e-6)
    bare = pruning.prune_masks(net, 0.9, block=1, min_blocks=0)
    assert int(bare["fc"].sum()) == 0
    for least, block in ((1, 1), (5, 1), (2, 4)):
        masks = pruning.prune_masks(net, 0.9, block=block, min_blocks=least)
        grid = BlockGrid((14, 48), (block, block))
        kept = grid.to_blocks(masks["fc"]).flatten(1).any(1)
        assert int(kept.sum()) == least
        # The best ones, and the others pay.
        norms = grid.to_blocks(net.fc.weight.detach().abs()).sum((1, 2)) / grid.to_blocks(torch.ones(14, 48)).sum(
            (1, 2)
        )
        assert float(norms[kept].min()) > float(norms[~kept].max())
        assert abs(count(masks) - round(0.1 * sizes(net))) <= block * block / 2
    layer = pruning.prune_masks(net, 0.998, scope="layer", min_blocks=2)
    assert min(int(mask.sum()) for mask in layer.values()) == 2


def test_a_layer_pruned_further_leaves_its_share_to_the_others(net):
    """Uniform asks for more than fc still has: the others keep that much more."""
    pruning.prune_(net, None, scope="layer", per_layer={"fc": 0.95})
    left = int(net.fc.mask.sum())
    masks = pruning.prune_masks(net, 0.6, scope="layer")
    assert int(masks["fc"].sum()) == left
    assert count(masks) == round(0.4 * sizes(net))
    ratio = int(masks["conv"].sum()) / masks["conv"].numel(), int(masks["grouped"].sum()) / masks["grouped"].numel()
    assert ratio[0] == pytest.approx(ratio[1], abs=0.002) and ratio[0] > 0.4


# -- models that are sparse already -----------------------------------------------------------------------------------


def test_scores_of_a_sparse_model_are_those_of_its_dense_equal(net):
    pruning.prune_(net, 0.5, "random", block=(2, 3), seed=2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modules = dict(net.named_modules())
    state = torch.get_rng_state()
    dense = sk.densify_(copy.deepcopy(net))
    torch.set_rng_state(state)
    for criterion in pruning.CRITERIA:
        extra = {"sparsity": 0.8} if criterion == "synflow" else {}
        got = pruning.compute(net, criterion, batches=DATA, **extra)
        expected = compute_scores(dense, NAMES, criterion, batches=DATA, **extra)
        for name in NAMES:
            mask = modules[name].mask
            assert torch.equal(got[name][mask], expected[name][mask])
            assert bool((got[name][~mask] == -torch.inf).all()) and not bool(mask.all())
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(net.named_modules()) == modules
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("blocks", [(1, 1), (4, 4), (4, 1), (1, 4), ((3, 5), (2, 2))])
def test_pruning_twice_keeps_the_bits_of_what_survives(net, blocks):
    first, second = blocks
    train(net)
    original = dense_weights(net)
    pruning.prune_(net, 0.5, block=first)
    middle = masks_of(net)
    bias = net.fc.bias
    pruning.prune_(net, 0.8, block=second)
    assert net.fc.bias is bias
    for name, w in original.items():
        module = net.get_submodule(name)
        mask = module.mask.numpy()
        assert not bool((mask & ~middle[name]).any())
        assert np.array_equal(module.weight.detach().numpy(), np.where(mask, w, 0).astype(np.float32))
        assert module.layout.capacity == module.layout.nnz == module.values.shape[0]
        module.layout.validate()
    half = np.prod(second) / 2 if isinstance(second, tuple) else second**2 / 2
    assert abs(count(masks_of(net)) - 0.2 * sizes(net)) <= half + 0.5
    if second == 1:
        assert sum(net.get_submodule(name).values.numel() for name in NAMES) == round(0.2 * sizes(net))


def test_default_block_is_the_stored_one(net):
    sk.sparsify_(net, sk.SparsityConfig(sparsity=0.5, block=4, below_break_even="sparse", overrides={"fc": 0.0}))
    assert isinstance(net.fc, nn.Linear)
    pruning.prune_(net, 0.8)
    assert (net.conv.block, net.grouped.block, net.fc.block) == ((4, 4), (4, 4), (1, 1))
    assert net.conv.element_mask is None
    assert abs(count(masks_of(net)) - 0.2 * sizes(net)) <= 8


def test_the_pruned_model_computes_the_masked_one(net):
    train(net)
    net.eval()
    pruning.prune_(net, 0.6, block=(2, 3))
    pruning.prune_(net, 0.8, block=1)
    reference = Net().eval()
    sk.load_dense_state_dict(reference, sk.dense_state_dict(net))
    torch.testing.assert_close(net(X), reference(X), rtol=1e-5, atol=1e-6)
    F.cross_entropy(net(X), Y).backward()
    F.cross_entropy(reference(X), Y).backward()
    for name in NAMES:
        module = net.get_submodule(name)
        got = module.layout.to_dense(module.values.grad)
        torch.testing.assert_close(got, reference.get_submodule(name).weight.grad * module.mask, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", pruning.CRITERIA)
@pytest.mark.parametrize("scope", pruning.SCOPES)
def test_every_criterion_from_dense_and_from_sparse(net, criterion, scope):
    """At initialisation, then after training, on a CNN and on an MLP."""
    for model, x in ((net, X), (mlp(), torch.randn(6, 9))):
        names = NAMES if model is net else ["0", "2"]
        total = sum(model.get_submodule(name).weight.numel() for name in names)
        for sparsity in (0.5, 0.9):
            before = sk.masks(model)
            pruning.prune_(model, sparsity, criterion, scope=scope, batches=[(x, Y)])
            assert count(sk.masks(model)) == round((1 - sparsity) * total)
            for name, mask in before.items():
                assert not bool((sk.masks(model)[name] & ~mask).any())
            if model is net:
                train(model, 1)
        loss = F.cross_entropy(model(x), Y)
        loss.backward()
        grads = [model.get_submodule(name).values.grad for name in names]
        assert bool(torch.isfinite(loss)) and any(float(g.abs().max()) > 0 for g in grads)


def test_synflow_keeps_no_dead_layer_and_needs_only_shapes(net):
    masks = pruning.prune_masks(net, 0.98, "synflow", example_input=X)
    assert count(masks) == round(0.02 * sizes(net)) and min(int(m.sum()) for m in masks.values()) > 1


def test_a_layer_may_end_empty_without_the_guard(net):
    with torch.no_grad():
        net.fc.weight.mul_(1e-9)
    pruning.prune_(net, 0.9, min_blocks=0)
    assert net.fc.values.shape[0] == 0
    assert torch.equal(net.fc(torch.randn(2, 48)), net.fc.bias.expand(2, -1))


def test_a_mask_that_keeps_all_leaves_the_layer_dense(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    weight = net.conv.weight
    plan = pruning.prune_(net, 0.0, optimizer=optimizer)
    assert net.conv.weight is weight and plan.totals()["dense"] == 4


# -- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adam", "momentum"])
@pytest.mark.parametrize("blocks", [(1, 1), (4, 2), (2, 4)])
def test_optimizer_state_of_the_survivors_stays(net, kind, blocks):
    if kind == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), 0.01, amsgrad=True)
        keys = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    else:
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        keys = ["momentum_buffer"]
    train(net, 2, optimizer)

    def full(name: str, key: str) -> Tensor:
        module = net.get_submodule(name)
        if isinstance(module, SparseModule):
            return module.layout.to_dense(optimizer.state[module.values][key])
        return optimizer.state[module.weight][key]

    for sparsity, block in zip((0.5, 0.8), blocks):
        before = {(name, key): full(name, key).clone() for name in NAMES for key in keys}
        steps = {name: optimizer.state[net.get_submodule(name).bias].get("step") for name in NAMES}
        pruning.prune_(net, sparsity, block=block, optimizer=optimizer)
        for (name, key), state in before.items():
            mask = net.get_submodule(name).mask
            assert torch.equal(full(name, key), torch.where(mask, state, 0.0))
            assert optimizer.state[net.get_submodule(name).values].get("step") == steps[name]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in net.parameters()} and {id(p) for p in optimizer.state} == held
        old = {name: net.get_submodule(name).values.detach().clone() for name in NAMES}
        train(net, 1, optimizer)
        assert all(not torch.equal(old[name], net.get_submodule(name).values) for name in NAMES)


def test_failures_leave_the_model_alone(net):
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    pruning.prune_(net, 0.5, block=2, optimizer=optimizer)
    modules = dict(net.named_modules())
    groups = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match="optimizer: expected one that holds the weights"):
        pruning.prune_(net, 0.8, optimizer=torch.optim.SGD(mlp().parameters(), 0.1))
    with pytest.raises(Exception):  # noqa: B017  whatever the model says to 5 channels
        pruning.prune_(net, 0.8, example_input=torch.randn(1, 5, 4, 4), optimizer=optimizer)
    assert dict(net.named_modules()) == modules
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == groups


def test_masks_must_not_bring_weights_back(net):
    pruning.prune_(net, 0.5)
    masks = {name: mask.clone() for name, mask in sk.masks(net).items()}
    place = (~masks["fc"]).nonzero()[0]
    masks["fc"][tuple(place)] = True
    with pytest.raises(ValueError, match=r"masks\['fc'\].*got 1 that were pruned"):
        pruning.apply_masks_(net, masks)
    masks["fc"][tuple(place)] = False
    masks["conv"] = torch.zeros_like(masks["conv"])
    pruning.apply_masks_(net, {"conv": masks["conv"], "fc": masks["fc"]})
    assert net.conv.layout.nnz == 0 and net.grouped.layout.nnz == int(masks["grouped"].sum())


# -- which layers -----------------------------------------------------------------------------------------------------


def test_the_same_layers_as_sparsify(net):
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3), nn.Linear(4, 2))
    assert [c.name for c in pruning.prunable(stem)] == ["2"]
    assert [c.name for c in pruning.prunable(stem, ["0", "3"])] == ["0", "3"]
    assert [c.name for c in pruning.prunable(net, exclude=["con*", "fc"])] == ["grouped"]
    assert [c.name for c in pruning.prunable(net, include=[nn.Conv2d])] == ["conv", "grouped"]
    pruning.prune_(net, 0.5, names=[*NAMES, "head"])
    assert [c.name for c in pruning.prunable(net)] == [*NAMES, "head"]
    assert [c.name for c in pruning.prunable(net, exclude=["con*", nn.Linear])] == ["grouped"]
    assert [c.name for c in pruning.prunable(net, include=[nn.Conv2d])] == ["conv", "grouped"]
    assert isinstance(net.head, SparseLinear) and isinstance(net.conv, SparseConv2d)


def test_excluded_sparse_layers_stay_and_leave_the_budget(net):
    pruning.prune_(net, 0.5)
    values = net.fc.values
    plan = pruning.prune_(net, 0.9, exclude=["fc"])
    assert net.fc.values is values
    kept = int(net.conv.mask.sum()) + int(net.grouped.mask.sum())
    assert kept == round(0.1 * (net.conv.mask.numel() + net.grouped.mask.numel()))
    assert {layer.name: layer.nnz for layer in plan.layers if layer.state == "sparse"} == {
        name: net.get_submodule(name).layout.nnz for name in NAMES
    }


def test_conv1d_of_transformers_square_and_oblong():
    """Weights are stored [I, O] while dense and [O, I] once sparse; a square one must not be turned by mistake."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(12, 12), conv1d(20, 12), nn.Linear(20, 2))
    original = {name: model.get_submodule(name).weight.detach().clone() for name in "01"}
    flat = torch.cat([w.abs().flatten() for w in original.values()]).sort().values
    masks = pruning.prune_masks(model, 0.5)
    for name, w in original.items():
        assert torch.equal(masks[name], w.abs() >= flat[-round(flat.numel() * 0.5)])
    optimizer = torch.optim.Adam(model.parameters(), 0.0)
    model(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    moments = {name: optimizer.state[model.get_submodule(name).weight]["exp_avg"].clone() for name in "01"}
    for sparsity in (0.5, 0.8):
        pruning.prune_(model, sparsity, optimizer=optimizer, below_break_even="masked")
        keep = round(flat.numel() * (1 - sparsity))
        for name, w in original.items():
            module = model.get_submodule(name)
            mask = (w.abs() >= flat[-keep]).t()
            assert torch.equal(module.mask, mask) and module.masked
            assert torch.equal(module.weight.detach(), torch.where(mask, w.t(), 0.0))
            moment = module.layout.to_dense(optimizer.state[module.values]["exp_avg"])
            assert torch.equal(moment, torch.where(mask, moments[name].t(), 0.0))
    scores = pruning.compute(model, "magnitude")
    assert scores["1"].shape == (20, 12) and int(scores["1"].isneginf().sum()) == int((~model[1].mask).sum())


# -- the ladder -------------------------------------------------------------------------------------------------------


def test_levels_of_the_ladder():
    ladder = list(pruning.levels(0, 30))
    assert [level.number for level in ladder] == list(range(31))
    assert ladder[0].sparsity == 0.0 and ladder[10].sparsity == pytest.approx(1 - 0.8**10)
    assert [level.number for level in pruning.levels(3, 5, 0.5)] == [3, 4, 5]
    rest = 12345
    for level in ladder:
        assert level.remaining(12345) == rest == pruning.remaining(12345, level.number)
        rest -= round(0.2 * rest)
    assert pruning.Level(80, 0.9).remaining(3) == 1
    assert pruning.remaining(7, 1, 0.5) == 3  # round(3.5) is 4


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"scope": "layer", "per_layer": "erk"}])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_each_level_removes_a_fifth_of_the_rest_and_nothing_returns(net, criterion, options):
    log: list[tuple[str, int]] = []
    seen: dict[str, np.ndarray] = masks_of(net)
    rest = sizes(net)

    def rewound(model: nn.Module, level: pruning.Level) -> None:
        log.append(("after", level.number))

    def fit(model: nn.Module, level: pruning.Level) -> None:
        nonlocal seen, rest
        log.append(("train", level.number))
        masks = masks_of(model)
        if level.number:
            rest -= round(0.2 * rest)
        assert count(masks) == rest
        assert not any(bool((masks[name] & ~seen[name]).any()) for name in NAMES)
        seen = masks
        train(model, 1, weight_decay=0.1)

    records = pruning.iterate(net, pruning.levels(0, 12), criterion, fit, after=rewound, **options)
    assert log == [("train", 0), *[(what, k) for k in range(1, 13) for what in ("after", "train")]]
    total = records[0].weights
    assert [r.kept for r in records] == [pruning.remaining(total, k) for k in range(13)]
    assert records[0].plan is None and records[5].sparsity == pytest.approx(1 - 0.8**5, abs=0.01)


def test_levels_can_be_resumed_and_skipped(net):
    other = copy.deepcopy(net)
    for k in range(1, 5):
        pruning.prune_level_(net, k)
    pruning.prune_level_(other, 2)
    pruning.prune_level_(other, pruning.Level(4))
    for name in NAMES:
        assert torch.equal(net.get_submodule(name).mask, other.get_submodule(name).mask)
    with pytest.raises(ValueError, match="pruned weights do not return"):
        pruning.prune_level_(net, 3)


def test_the_ladder_in_blocks_does_not_drift(net):
    total = sizes(net)
    for record in pruning.iterate(net, pruning.levels(1, 9), block=(3, 2)):
        assert abs(record.kept - pruning.remaining(total, record.level.number)) <= 3
    assert all(net.get_submodule(name).element_mask is None for name in NAMES)


def test_the_ladder_prunes_by_trained_weights(net):
    """A weight made large by training survives the next level, one made small does not."""

    def fit(model: nn.Module, level: pruning.Level) -> None:
        with torch.no_grad():
            w = model.fc.weight.clone()
            w[:7] *= 100.0
            w[7:] *= 0.01
            (model.fc.load_dense_ if isinstance(model.fc, SparseModule) else model.fc.weight.copy_)(w)

    pruning.iterate(net, pruning.levels(0, 1), "magnitude", fit, names=["fc"])
    assert bool(net.fc.mask[:7].all()) and int(net.fc.mask[7:].sum()) == 672 - round(0.2 * 672) - 7 * 48


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sparsity": 1.0}, "sparsity: expected a fraction"),
        ({"sparsity": -0.1}, "sparsity: expected a fraction"),
        ({"sparsity": None}, "sparsity: expected a fraction"),
        ({"criterion": "wanda"}, "criterion: expected one of random, gradient, snip.*'wanda'"),
        ({"criterion": "snip"}, "batches: snip needs data"),
        ({"criterion": "synflow"}, "example_input: synflow"),
        ({"scope": "block"}, "scope: expected one of global, layer"),
        ({"per_layer": "erk"}, "per_layer: goes with scope"),
        ({"per_layer": {"fc": 0.5}, "scope": "layer"}, "sparsity: expected None beside"),
        ({"per_layer": "magnitudes", "scope": "layer"}, "scheme: expected one of"),
        ({"block": 0}, "block: expected an int"),
        ({"min_blocks": -1}, "min_blocks: expected 0"),
        ({"names": ["nowhere"]}, "names: expected Linear or Conv2d layers, got 'nowhere'"),
        ({"include": ["nothing"]}, "at least one layer to match.*not included"),
        ({"criterion": {"fc": torch.zeros(2, 2)}}, r"criterion\['fc'\]: expected shape \[14, 48\]"),
        ({"criterion": {"fc": torch.zeros(14, 48)}, "names": ["conv"]}, "criterion: expected scores for 'conv'"),
        ({"criterion": {"fc": torch.full((14, 48), torch.nan)}}, "finite numbers.*'fc'"),
    ],
)
def test_errors_name_the_argument(net, arguments, match):
    arguments = {"sparsity": 0.5, **arguments}
    with pytest.raises(ValueError, match=match):
        pruning.prune_masks(net, arguments.pop("sparsity"), arguments.pop("criterion", "magnitude"), **arguments)


def test_pruning_less_than_there_is_raises(net):
    pruning.prune_(net, 0.8)
    own = {name: 1 - float(mask.double().mean()) for name, mask in sk.masks(net).items()}
    for scope in pruning.SCOPES:
        with pytest.raises(ValueError, match=r"sparsity: expected 0\.8.*got 0\.5"):
            pruning.prune_masks(net, 0.5, scope=scope)
    with pytest.raises(ValueError, match=r"per_layer\['fc'\]"):
        pruning.prune_masks(net, None, scope="layer", per_layer={"fc": own["fc"] - 0.05})
    assert count(pruning.prune_masks(net, 0.8)) == round(0.2 * sizes(net))
    assert count(pruning.prune_masks(net, 0.8, scope="layer")) == round(0.2 * sizes(net))


def test_other_errors(net):
    with pytest.raises(ValueError, match="below_break_even: expected sparse or masked"):
        pruning.prune_(net, 0.5, below_break_even="dense")
    with pytest.raises(TypeError, match="plain module"):
        pruning.prune_(nn.DataParallel(net), 0.5)
    with pytest.raises(ValueError, match="0 <= first <= last"):
        pruning.levels(3, 2)
    with pytest.raises(ValueError, match="fraction: expected"):
        pruning.levels(0, 2, 1.0)
    with pytest.raises(ValueError, match="level: expected 0"):
        pruning.prune_level_(net, -1)
    with pytest.raises(ValueError, match="ascending levels, got 1 after 2"):
        pruning.iterate(net, [2, 1])
    with pytest.raises(ValueError, match=r"masks\['fc'\]: expected \[14, 48\], got \[2, 2\]"):
        pruning.apply_masks_(net, {"fc": torch.ones(2, 2, dtype=torch.bool)})


def test_names_load_on_first_use():
    code = (
        "import sys, sparsekern.pruning as p; assert 'sparsekern.pruning.criteria' not in sys.modules; "
        "p.prune_; assert 'sparsekern.pruning.prune' in sys.modules and 'sparsekern.pruning.ladder' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pruning.nothing  # noqa: B018
    assert set(pruning.__all__) <= set(dir(pruning))
