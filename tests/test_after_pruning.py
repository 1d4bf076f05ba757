"""Rewinding, fresh weights, dense again; budgets; pruning a run and training it on, alone and in ladders."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn import SparseModule
from sparsekern.pruning.rewinding import redense_, reinitialize_, rewind_
from sparsekern.training import ConfigError, TrainConfig, budgets, schedule


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.Flatten(),
        nn.Linear(12 * 4 * 4, 10),
    )


def sparse_net(block: int = 1) -> tuple[nn.Sequential, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A net trained a little, then pruned: the net, its first state dict and its masks."""
    model = net()
    x = torch.randn(6, 3, 4, 4)
    model(x)
    first = copy.deepcopy(model.state_dict())
    step(model, torch.optim.SGD(model.parameters(), 0.5), x)
    masks = {name: torch.rand_like(model.get_submodule(name).weight) > 0.6 for name in ("0", "3", "6")}
    sk.sparsify_(model, sk.SparsityConfig(block=block, below_break_even="sparse"), masks=masks)
    return model, first, masks


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def expected(state: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with zeros where ``masks`` prune."""
    return {
        key: torch.where(masks[key.removesuffix(".weight")], item, torch.zeros(()))
        if key.removesuffix(".weight") in masks
        else item
        for key, item in state.items()
    }


def assert_same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert sorted(state) == sorted(other)
    for key in state:
        assert torch.equal(state[key], other[key]), key


# -- rewinding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("form", ["dense", "sparse", "file"])
def test_rewinding_restores_the_bits_under_the_mask_and_every_buffer(form: str, block: int, tmp_path: Path) -> None:
    model, first, masks = sparse_net(block)
    if form == "sparse":
        # The same weights, stored at other blocks.
        twin = net()
        twin.load_state_dict(first)
        everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
        for mask in everything.values():
            mask[0] = False
        sk.sparsify_(twin, sk.SparsityConfig(block=2, below_break_even="sparse"), masks=everything)
        state: object = twin.state_dict()
        first = expected(first, everything)
    elif form == "file":
        torch.save({"format": 1, "model": first, "sparse": False}, tmp_path / "step-000000000.pt")
        state = tmp_path / "step-000000000.pt"
    else:
        state = first
    layouts = {name: model.get_submodule(name).index.clone() for name in masks}
    parameters = list(model.parameters())
    assert rewind_(model, state) is model  # type: ignore[arg-type]
    assert_same(sk.dense_state_dict(model), expected(first, masks))
    for name, index in layouts.items():
        assert torch.equal(model.get_submodule(name).index, index)
        assert torch.equal(model.get_submodule(name).mask, masks[name])
    assert all(a is b and a.grad is None for a, b in zip(parameters, model.parameters(), strict=True))
    # Gone from the buffers too: only the first forward has been seen.
    assert int(model.get_submodule("1").num_batches_tracked) == 1


def test_rewinding_a_dense_model_takes_a_sparse_state() -> None:
    model, _, masks = sparse_net(2)
    state = copy.deepcopy(model.state_dict())
    assert_same(rewind_(net(), state).state_dict(), sk.dense_state_dict(model))
    assert len(masks) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("1.running_mean"), "missing '1.running_mean' and 0 more"),
        (lambda s: s.update({"head.weight": torch.ones(1)}), "unknown 'head.weight' and 0 more"),
        (lambda s: s.update({"6.weight": torch.ones(10, 3)}), r"6.weight: expected \[10, 192\], got \[10, 3\]"),
        (lambda s: s.update({"1.bias": torch.ones(3)}), r"1.bias: expected \[8\], got \[3\]"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: object, message: str) -> None:
    model, first, _ = sparse_net()
    before = copy.deepcopy(model.state_dict())
    change(first)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        rewind_(model, first)
    assert_same(model.state_dict(), before)


def test_a_sparse_state_of_another_model_is_refused() -> None:
    model, _, _ = sparse_net()
    state = model.state_dict()
    narrow = net()
    narrow[3] = nn.Conv2d(8, 6, 3, padding=1)
    with pytest.raises(ValueError, match="the layout of '3' does not fit the model"):
        rewind_(narrow, state)
    with pytest.raises(ValueError, match="a sparse layer '6' that it does not have"):
        rewind_(net()[:5], state)


def test_files_that_are_no_states(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(ValueError, match="does not exist"):
        rewind_(model, tmp_path / "step-000000007.pt")
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(ValueError, match=r"text\.pt (cannot be read|is refused)"):
        rewind_(model, tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"expected a state dict in .*, got list"):
        rewind_(model, tmp_path / "list.pt")
    torch.save({"model": Path()}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="is refused"):
        rewind_(model, tmp_path / "objects.pt")


def test_a_layer_without_a_layout_is_refused() -> None:
    model, first, _ = sparse_net()
    empty = copy.deepcopy(model).to("meta")
    for change in (lambda: rewind_(empty, first), lambda: reinitialize_(empty, 0)):
        with pytest.raises(ValueError, match="0 has no layout yet"):
            change()
    with pytest.raises(ValueError, match="0 has no layout yet"):
        rewind_(empty.to_empty(device="cpu"), first)


@pytest.mark.parametrize("how", ["rewind", "reinitialize"])
def test_an_optimizer_that_holds_the_parameter_stays_protected(how: str) -> None:
    model, first, _ = sparse_net()
    step(model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(2, 3, 4, 4))
    rewind_(model, first) if how == "rewind" else reinitialize_(model, 1)
    other, _, _ = sparse_net()
    with pytest.raises(RuntimeError, match="training has started"):
        model.load_state_dict(other.state_dict())


# -- fresh weights -----------------------------------------------------------------------------------------------------


def test_fresh_weights_are_those_of_the_dense_original_from_the_same_seed() -> None:
    model, _, masks = sparse_net(4)
    dense = net()
    for module in dense.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.add_(3)
    state = torch.get_rng_state()
    assert reinitialize_(model, 7) is model
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    for module in reversed(list(dense.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert_same(sk.dense_state_dict(model), expected(dense.state_dict(), masks))
    again = copy.deepcopy(model.state_dict())
    reinitialize_(model, 8)
    assert not torch.equal(model.get_submodule("6").values, again["6.values"])
    reinitialize_(model, 7)
    assert_same(model.state_dict(), again)


def test_parameters_that_nothing_draws_are_named() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(3))

    model = nn.Sequential(nn.Linear(3, 3), Offset())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"1 \(Offset\) holds 'offset' and has no reset_parameters"):
        reinitialize_(model, 0)
    assert_same(model.state_dict(), before)


# -- dense again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_dense_again_computes_the_same_and_the_pruned_weights_learn(kind: str) -> None:
    model, _, masks = sparse_net(2)
    x = torch.randn(6, 3, 4, 4)
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    step(model, optimizer, x)
    name = "momentum_buffer" if kind == "sgd" else "exp_avg"
    states = {}
    for layer in masks:
        sparse = model.get_submodule(layer)
        assert isinstance(sparse, SparseModule)
        states[layer] = sparse.layout.to_dense(optimizer.state[sparse.values][name]).clone()
    before = sk.dense_state_dict(model)
    assert redense_(model, optimizer) is model
    assert_same(model.state_dict(), before)
    assert not any(isinstance(module, SparseModule) for module in model.modules())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} and len(optimizer.state) == len(held)
    for layer, mask in masks.items():
        weight = model.get_submodule(layer).weight
        assert torch.equal(weight != 0, mask)
        assert torch.equal(optimizer.state[weight][name], states[layer]) and states[layer].count_nonzero()
    step(model, optimizer, x)
    weight = model.get_submodule("6").weight.detach()
    assert (weight[~masks["6"]] != 0).float().mean() > 0.9
    assert not torch.equal(weight[masks["6"]], before["6.weight"][masks["6"]])


def test_dense_again_takes_the_optimizer_of_the_model_only() -> None:
    model, _, _ = sparse_net()
    other = torch.optim.SGD(net().parameters(), 0.1)
    with pytest.raises(ValueError, match="got one with none of them"):
        redense_(model, other)
    assert isinstance(model.get_submodule("0"), SparseModule)
    with pytest.raises(TypeError, match="redense_: expected a plain module"):
        redense_(nn.DataParallel(model))
    redense_(model)
    assert redense_(model) is model  # nothing left to do


# -- budgets -----------------------------------------------------------------------------------------------------------

CIFAR = TrainConfig(epochs=160, milestones=(0.5, 0.75), warmup=5.0, sparsity=0)


@pytest.mark.parametrize(
    ("large", "small", "cap", "epochs"),
    [
        # Liu et al. 2019 train ResNet-41 and ResNet-32 of SSS for 117 and 145 epochs, and no net for more than 180.
        (1.3, 1.0, None, 117),
        (1.61, 1.0, 2.0, 145),
        (5.0, 1.0, 2.0, 180),
        (313_478_154, 206_000_000, None, 137),
    ],
)
def test_scratch_b_counts_macs(large: float, small: float, cap: float | None, epochs: int) -> None:
    config = TrainConfig(epochs=90, milestones=(1 / 3, 2 / 3), warmup=3, sparsity=0)
    stretched = budgets.scratch_b(config, large, small, cap)
    assert stretched.epochs == epochs
    assert stretched.warmup == pytest.approx(3 * epochs / 90)
    assert config.differences(stretched) == ["epochs", "warmup"]
    # The same curve, only slower.
    old = schedule("step", 9000, warmup=300, milestones=config.milestones)
    new = schedule("step", 100 * epochs, warmup=round(100 * stretched.warmup), milestones=stretched.milestones)
    at = [0.02, 0.2, 0.32, 0.35, 0.6, 0.7, 0.99]
    assert [new(int(a * 100 * epochs)) for a in at] == pytest.approx([old(int(a * 9000)) for a in at], rel=0.02)


def test_budgets_of_runs_that_count_steps() -> None:
    config = TrainConfig(steps=1000, epochs=7, warmup=2, sparsity=0)
    stretched = budgets.scratch_b(config, 250, 100)
    assert (stretched.steps, stretched.epochs, stretched.warmup) == (2500, 7, 5.0)
    assert budgets.scratch_e(config) == config
    tuned = budgets.finetune(config, 3, 0.01)
    assert (tuned.steps, tuned.epochs, tuned.lr, tuned.schedule, tuned.warmup) == (0, 3, 0.01, "constant", 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 100), "ratio 1\\); count the network after it was pruned"),
        ((100, 200), "expected fewer MACs than the large network's 100, got 200"),
        ((100, 0), "expected MACs above 0, got 100 and 0"),
        ((math.inf, 100), "expected MACs above 0"),
        ((200, 100, 0.5), "cap: expected a factor of 1 or more, got 0.5"),
    ],
)
def test_scratch_b_refuses_counts_that_cannot_be(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        budgets.scratch_b(CIFAR, *arguments)


def test_finetuning_by_data_set() -> None:
    tuned = budgets.finetune(CIFAR)
    assert (tuned.epochs, tuned.lr, tuned.schedule, tuned.warmup) == (40, 1e-3, "constant", 0.0)
    assert budgets.finetune(TrainConfig(data="imagefolder")).epochs == 20
    with pytest.raises(ConfigError, match="expected 1 or more epochs, got 0"):
        budgets.finetune(CIFAR, 0)
    with pytest.raises(ConfigError, match="expected a learning rate above 0, got 0"):
        budgets.finetune(CIFAR, 1, 0.0)


@pytest.mark.parametrize("name", ["step", "linear", "constant"])
def test_the_last_epochs_replay_the_end_of_the_schedule(name: str) -> None:
    config = TrainConfig(epochs=40, lr=0.2, schedule=name, milestones=(0.25, 0.5, 0.9), warmup=2, sparsity=0)
    part = budgets.last_epochs(config, 25, 10)
    whole = schedule(name, 400, warmup=20, milestones=config.milestones)
    end = schedule(name, 250, warmup=round(part.warmup * 10), milestones=part.milestones)
    rates = [part.base_lr * end(s) for s in range(250)]
    assert rates == pytest.approx([0.2 * whole(s) for s in range(150, 400)])
    assert part.epochs == 25
    assert budgets.last_epochs(config, 40, 10) == config


def test_ends_of_schedules_that_cannot_be_replayed() -> None:
    with pytest.raises(ConfigError, match="the end of a cosine"):
        budgets.last_epochs(TrainConfig(schedule="cosine", epochs=10), 4, 10)
    with pytest.raises(ConfigError, match="begin within the 5 of warm-up"):
        budgets.last_epochs(CIFAR, 157, 10)
    with pytest.raises(ConfigError, match="expected 1 to 160 epochs"):
        budgets.last_epochs(CIFAR, 161, 10)
