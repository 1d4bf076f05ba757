"""Rewinding, fresh weights, dense again; budgets; pruning a run and training it on, alone and in ladders."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.cli import main
from sparsekern.nn import SparseModule
from sparsekern.pruning import prune_masks, redense_, reinitialize_, rewind_
from sparsekern.training import (
    ConfigError,
    Interrupted,
    TrainConfig,
    budgets,
    load_model,
    read_result,
    schedule,
    train,
)
from sparsekern.training.after_pruning import after
from sparsekern.training.network import build_dense
from sparsekern.training.progress import Reporter
from sparsekern.training.prune_settings import STRATEGIES, PruneSettings
from sparsekern.training.prune_start import beside
from sparsekern.training.task import load_task
from sparsekern.training.weights import load_net


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


# -- a run, pruned and trained on --------------------------------------------------------------------------------------

EPOCHS, BATCHES = 3, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run with snapshots of its first steps."""
    folder = tmp_path_factory.mktemp("run") / "big"
    train(
        TrainConfig(
            model="mlp-40-36",
            sparsity=0,
            epochs=EPOCHS,
            subset=50 * BATCHES,
            test_subset=100,
            batch_size=50,
            lr=0.05,
            threads=1,
            snapshots=(0, 4),
            checkpoint_minutes=0,
        ),
        folder,
    )
    return folder


def prune(*arguments: object) -> int:
    return main(["prune", *map(str, arguments), "--no-progress"])


def dense_weights(net: Path) -> dict[str, torch.Tensor]:
    return sk.dense_state_dict(load_model(net))


def under(masks: dict[str, torch.Tensor], net: Path) -> dict[str, torch.Tensor]:
    return expected(dense_weights(net), masks)


START = {
    "none": "trained",
    "finetune": "trained",
    "lottery": "snapshot",
    "lr-rewind": "trained",
    "reinit": "fresh",
    "scratch-e": "fresh",
    "scratch-b": "fresh",
    "redense": "trained",
}


def test_every_strategy_is_tested() -> None:
    assert set(START) == set(STRATEGIES)


@pytest.mark.parametrize("then", START)
def test_strategies(then: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    extra = {
        "lottery": ["--rewind-step", 4],
        "finetune": ["--epochs", 2, "--lr", 0.02],
        "redense": ["--epochs", 2],
        "lr-rewind": ["--epochs", 2],
        "scratch-b": ["--cap", 2],
    }.get(then, [])
    assert prune(run, "--sparsity", 0.75, "--then", then, "--out", out, *extra) == 0
    shown = capsys.readouterr().out
    assert f"prune by magnitude over all layers to 75 %, single weights, or the blocks stored; then {then}" in shown

    start = load_model(out / "level-01.pt")
    masks = sk.masks(start)
    assert sorted(masks) == ["layers.0", "layers.2"]  # the classifier stays dense
    kept, weights = sum(int(m.sum()) for m in masks.values()), 64 * 40 + 40 * 36
    assert kept == weights // 4
    magnitudes = torch.cat([dense_weights(run)[f"{name}.weight"].abs()[mask] for name, mask in masks.items()])
    dropped = torch.cat([dense_weights(run)[f"{name}.weight"].abs()[~mask] for name, mask in masks.items()])
    assert magnitudes.min() > dropped.max()

    weights_of = {"trained": run, "snapshot": run / "snapshots" / "step-000000004.pt"}
    if START[then] == "fresh":
        config = dataclasses.replace(load_net(run).config, seed=1)
        fresh = build_dense(config, (1, 8, 8), 10).state_dict()
        assert_same(sk.dense_state_dict(start), expected(fresh, masks))
    else:
        assert_same(sk.dense_state_dict(start), under(masks, weights_of[START[then]]))

    ladder = json.loads((out / "ladder.json").read_text())
    zero, row = ladder["levels"][:2]
    assert (zero["level"], zero["params"], zero["test_acc"]) == (0, 4446, read_result(run).test_acc)  # type: ignore[union-attr]
    assert row["sparsity"] == 0.75 and row["params"] == kept + 360 + 86 and row["macs"] == kept + 360
    assert f"{100 * row['test_acc']:.2f}" in shown and (out / "table.md").read_text().count("\n| ") >= 2
    if then == "none":
        assert not (out / "level-01").exists() and row["test_acc"] == row["pruned_acc"]
        return
    assert (row["pruned_acc"] is not None) == (START[then] == "trained")

    trained = load_model(out / "level-01")
    result = read_result(out / "level-01")
    assert result is not None and result.test_acc == row["test_acc"] and result.config.method == "static"
    assert all(torch.equal(mask, masks[name]) for name, mask in sk.masks(trained).items())
    assert not torch.equal(trained.get_submodule("layers.0").values, start.get_submodule("layers.0").values)
    epochs = {"finetune": 2, "redense": 2, "lr-rewind": 2, "scratch-b": 2 * EPOCHS}.get(then, EPOCHS)
    assert result.epochs == epochs and result.config.schedule == (
        "constant" if then in ("finetune", "redense") else "step"
    )
    if then == "lr-rewind":
        # The last 12 of 18 steps: the drops at 9 and 14 (13.5 rounded) are at 3 and 8 now.
        assert result.config.milestones == (3 / 12, 8 / 12)
    if then == "redense":
        again = load_model(out / "level-01-dense")
        assert not sk.masks(again)
        assert_same(load_model(out / "level-01-dense.pt").state_dict(), sk.dense_state_dict(trained))
        came_back = again.get_submodule("layers.0").weight[~masks["layers.0"]]
        assert (came_back != 0).float().mean() > 0.5  # pixels that are always 0 teach nothing
        assert ladder["levels"][2]["phase"] == "dense" and ladder["levels"][2]["params"] == 4446


def test_fresh_weights_can_be_rescaled(run: Path, tmp_path: Path) -> None:
    after(run, "reinit", out=tmp_path, sparsity=0.75, rescale=True, epochs=1)
    fresh = build_dense(dataclasses.replace(load_net(run).config, seed=1), (1, 8, 8), 10).state_dict()
    start = dense_weights(tmp_path / "level-01.pt")
    for name, mask in sk.masks(load_model(tmp_path / "level-01.pt")).items():
        wanted = torch.where(mask, fresh[f"{name}.weight"] / mask.float().mean().sqrt(), torch.zeros(()))
        torch.testing.assert_close(start[f"{name}.weight"], wanted)


def test_scratch_b_counts_the_macs_that_the_stored_blocks_cost(run: Path, tmp_path: Path) -> None:
    """Blocks of 16 do not divide 40 x 64 and 36 x 40: kept weights and multiplied weights come from the blocks."""
    after(run, "scratch-b", out=tmp_path, scope="layer", sparsity=0.6, block="16")
    masks = sk.masks(load_model(tmp_path / "level-01.pt"))
    small = 360 + sum(int(masks[name].sum()) for name in ("layers.0", "layers.2"))
    large = 360 + 64 * 40 + 40 * 36
    result = read_result(tmp_path / "level-01")
    assert result is not None and result.epochs == math.floor(EPOCHS * large / small + 0.5)
    assert result.epochs > EPOCHS and result.macs == small
    for mask in masks.values():
        whole = nn.functional.pad(mask, (0, -mask.shape[1] % 16, 0, -mask.shape[0] % 16)).unfold(0, 16, 16)
        counts = whole.unfold(1, 16, 16).sum((2, 3))
        inside = nn.functional.pad(torch.ones_like(mask), (0, -mask.shape[1] % 16, 0, -mask.shape[0] % 16))
        full = inside.unfold(0, 16, 16).unfold(1, 16, 16).sum((2, 3))
        assert bool(((counts == 0) | (counts == full)).all())


@pytest.mark.parametrize("criterion", ["gradient", "grasp", "synflow", "random"])
def test_criteria_reach_the_library_with_what_they_need(criterion: str, run: Path, tmp_path: Path) -> None:
    after(
        run, "none", out=tmp_path, criterion=criterion, sparsity=0.5, allocation="erk", layers=("*",), score_batches=2
    )
    found = sk.masks(load_model(tmp_path / "level-01.pt"))
    task = load_task(load_net(run).config)
    wanted = prune_masks(
        load_model(run),
        0.5,
        criterion,
        scope="layer",
        per_layer="erk",
        names=["layers.0", "layers.2", "head"],
        batches=task.scoring_batches(torch.device("cpu"), 2),
        example_input=task.example(torch.device("cpu")),
        seed=1,
    )
    partly = {name: mask for name, mask in wanted.items() if not bool(mask.all())}
    assert sorted(found) == sorted(partly) and all(torch.equal(found[name], partly[name]) for name in found)


def test_a_pruned_net_can_be_pruned_further(run: Path, tmp_path: Path) -> None:
    after(run, "finetune", out=tmp_path / "a", sparsity=0.5, block="4", epochs=1)
    pruning = after(tmp_path / "a" / "level-01", "none", out=tmp_path / "b", sparsity=0.75)
    first = sk.masks(load_model(tmp_path / "a" / "level-01"))
    second = load_model(tmp_path / "b" / "level-01.pt")
    for name, mask in sk.masks(second).items():
        assert bool((mask <= first[name]).all())
        assert second.get_submodule(name).block == (4, 4)
    assert [row.sparsity for row in pruning.rows] == pytest.approx([0.5, 0.75], abs=0.01)


def test_weights_that_came_after_the_snapshot_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = TrainConfig(
        model="mlp-40-36",
        sparsity=0.5,
        block="4",
        below_break_even="sparse",
        method="set",
        update_every=2,
        epochs=1,
        subset=300,
        test_subset=100,
        batch_size=50,
        snapshots=(0,),
    )
    train(moved, tmp_path / "run")
    after(tmp_path / "run", "lottery", out=tmp_path / "out", rewind_step=0, criterion="random", sparsity=0.6, epochs=1)
    first = dense_weights(tmp_path / "run" / "snapshots" / "step-000000000.pt")
    masks = sk.masks(load_model(tmp_path / "out" / "level-01.pt"))
    absent = sum(int((mask & (first[f"{name}.weight"] == 0)).sum()) for name, mask in masks.items())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert absent > 0
    warning = f"{absent:,} of {kept:,} weights were not stored at step 0; they start at zero"
    assert warning in capsys.readouterr().err


# -- ladders -----------------------------------------------------------------------------------------------------------


def test_a_ladder_removes_the_same_fraction_of_the_rest(run: Path, tmp_path: Path) -> None:
    pruning = after(run, "lottery", out=tmp_path, levels=3, rewind_step=0, epochs=1, layers="*")
    weights = 64 * 40 + 40 * 36 + 360
    left, kept = [weights], weights
    for _ in range(3):
        kept -= round(0.2 * kept)
        left.append(kept)
    assert [row.sparsity for row in pruning.rows] == pytest.approx([1 - n / weights for n in left])
    assert [row.target for row in pruning.rows[1:]] == pytest.approx([0.2, 0.36, 0.488])
    first = dense_weights(run / "snapshots" / "step-000000000.pt")
    layers = ("layers.0", "layers.2", "head")
    above = {name: torch.ones_like(first[f"{name}.weight"], dtype=torch.bool) for name in layers}
    before = run
    for level in (1, 2, 3):
        net = tmp_path / f"level-{level:02d}.pt"
        masks = sk.masks(load_model(net))
        # Pruned by the weights that the level before has trained, rewound to those of the run's first step.
        scores = {name: dense_weights(before)[f"{name}.weight"].abs() for name in masks}
        gone = torch.cat([scores[name][above[name] & ~masks[name]] for name in masks])
        assert all(bool((masks[name] <= above[name]).all()) for name in masks)
        assert gone.max() < min(scores[name][masks[name]].min() for name in masks)
        assert_same(dense_weights(net), expected(first, masks))
        above, before = masks, net.with_suffix("")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        ["| 0", "0.00"],
        ["| 1", "20.00"],
        *[[f"| {level}", f"{100 * (1 - left[level] / weights):.2f}"] for level in (2, 3)],
    ]


def test_levels_in_one_shot_come_from_the_run_itself(run: Path, tmp_path: Path) -> None:
    after(run, "finetune", out=tmp_path, levels=2, fraction=0.5, one_shot=True, epochs=1)
    masks = sk.masks(load_model(tmp_path / "level-02.pt"))
    assert_same(dense_weights(tmp_path / "level-02.pt"), under(masks, run))
    assert sum(int(mask.sum()) for mask in masks.values()) == 1000


class KillAt(Reporter):
    """Sends SIGTERM to this process when a line of progress begins with ``text``."""

    def __init__(self, text: str) -> None:
        self.text = text

    def line(self, text: str) -> None:
        if text.startswith(self.text):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_killed_ladder_continues_where_it_was(run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"levels": 3, "rewind_step": 4, "fraction": 0.4}
    whole = after(run, "lottery", out=tmp_path / "whole", **options)
    with pytest.raises(
        Interrupted, match=r"level-02: .*; continue with: sparsekern prune .* --out .* --resume"
    ) as stop:
        after(run, "lottery", out=tmp_path / "cut", reporter=KillAt("level-02: epoch 1"), **options)
    assert stop.value.signal_number == signal.SIGTERM
    assert not (tmp_path / "cut" / "level-03.pt").exists()
    finished = (tmp_path / "cut" / "level-01" / "model.pt").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="already holds a pruning; continue it with --resume"):
        after(run, "lottery", out=tmp_path / "cut", **options)
    with pytest.raises(ConfigError, match=r"other options: fraction \(saved 0.4, now 0.2\); drop these"):
        after(run, "lottery", out=tmp_path / "cut", resume=True, levels=3, rewind_step=4)
    cut = after(run, "lottery", out=tmp_path / "cut", resume=True, **options)
    assert (tmp_path / "cut" / "level-01" / "model.pt").stat().st_mtime_ns == finished
    second = read_result(tmp_path / "cut" / "level-02")
    assert second is not None and second.resumed_from is not None and second.resumed_from > 0
    assert_same(load_model(cut.rows[-1].net).state_dict(), load_model(whole.rows[-1].net).state_dict())
    assert [row.test_acc for row in cut.rows] == [row.test_acc for row in whole.rows]
    # A level more, by the command line, where the options come from the folder.
    assert prune(run, "--out", tmp_path / "cut", "--resume", "--levels", 4, "-q") == 0
    longer = json.loads((tmp_path / "cut" / "ladder.json").read_text())["levels"]
    assert [row["level"] for row in longer] == [0, 1, 2, 3, 4]
    assert longer[:4] == [row.to_dict() for row in cut.rows]


def test_a_ladder_killed_while_it_prunes_prunes_again(run: Path, tmp_path: Path) -> None:
    whole = after(run, "reinit", out=tmp_path, levels=2, epochs=1)
    state = load_model(whole.rows[2].net).state_dict()
    # As a kill leaves it between the network and its record.
    shutil.rmtree(tmp_path / "level-02")
    (tmp_path / "level-02.json").unlink()
    (tmp_path / "level-02.pt").write_bytes(b"half")
    again = after(run, "reinit", out=tmp_path, levels=2, epochs=1, resume=True)
    assert_same(load_model(again.rows[2].net).state_dict(), state)


def test_overwriting_removes_what_a_pruning_wrote_and_nothing_else(run: Path, tmp_path: Path) -> None:
    after(run, "none", out=tmp_path, levels=3)
    (tmp_path / "notes.txt").write_text("mine")
    after(run, "none", out=tmp_path, levels=1, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ladder.json", "ladder.png", "level-01.json", "level-01.pt", "notes.txt", "prune.json", "table.md",
    ]  # fmt: skip


def test_results_stand_beside_the_run_also_from_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net").mkdir()
    monkeypatch.chdir(tmp_path / "net")
    assert beside(Path("runs/net"), "none") == Path("runs/net-none")
    assert beside(Path("."), "none") == tmp_path.resolve() / "net-none"
    assert beside(Path("snapshots/.."), "none") == tmp_path.resolve() / "net-none"


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"then": "fine-tune"}, "then: expected one of .*; did you mean finetune"),
        ({"criterion": "magnitud"}, "did you mean magnitude"),
        ({"scope": "model"}, "scope: expected one of global, layer"),
        ({"scope": "global", "allocation": "erk"}, "goes with scope layer; got global"),
        ({"allocation": "erkk"}, "did you mean erk"),
        ({"block": "auto"}, "expected B or BOxBI, got auto"),
        ({"block": "300"}, "block: expected sizes within 1..128"),
        ({"sparsity": 1.0}, r"sparsity: expected a fraction within \(0, 1\), got 1"),
        ({"sparsity": 0.5, "levels": 3}, "a ladder goes to 0.488 by itself, so expected no sparsity, got 0.5"),
        ({"levels": -1}, "levels: expected 1 and more levels"),
        ({"levels": 2, "fraction": 1.0}, "fraction: expected a fraction within"),
        ({"one_shot": True}, "one_shot: goes with levels"),
        ({"then": "lottery"}, "rewind_step: lottery needs the step to rewind to"),
        ({"then": "reinit", "rewind_step": 3}, "rewind_step: reinit takes none; it goes with lottery"),
        ({"then": "scratch-e", "cap": 2.0}, "cap: scratch-e takes none; it goes with scratch-b"),
        ({"then": "scratch-b", "cap": 0.5}, "cap: expected 1 and more, got 0.5"),
        ({"then": "finetune", "rescale": True}, "rescale: finetune takes none"),
        ({"then": "none", "epochs": 3}, "epochs: none takes none"),
        ({"then": "lr-rewind", "lr": 0.1}, "lr: lr-rewind takes none"),
        ({"epochs": 0}, "epochs: expected 1 and more, got 0"),
        ({"lr": -1.0}, "lr: expected a learning rate above 0"),
        ({"below_break_even": "dense"}, "below_break_even: expected one of masked, sparse"),
    ],
)
def test_settings_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        PruneSettings(**options)
    assert "\n" not in str(caught.value)


def test_settings_round_trip() -> None:
    settings = PruneSettings(layers="a.*, b", block="8x4", levels=5, then="lottery", rewind_step=3)  # type: ignore[arg-type]
    assert settings.layers == ("a.*", "b") and settings.block_value == (8, 4)
    assert PruneSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ConfigError, match=r"prune.json: key: .*'levls'.*did you mean levels"):
        PruneSettings.from_dict({"levls": 3}, source="prune.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--then", "lottery", "--rewind-step", 5], "has no snapshot of step 5 (it kept steps 0, 4); train it with"),
        (["--layers", "conv*"], "layers: expected globs of layers, got conv*; the model has ['layers.0',"),
        (["--then", "lr-rewind", "--epochs", 9], "lr-rewind: expected 1 to 3 epochs of the schedule, got 9"),
        (["--then", "scratch-b", "--below-break-even", "masked"], "count the network after it was pruned"),
        (["--resume"], "holds no pruning (prune.json is missing)"),
        (["--device", "tpu"], "device: expected auto, cpu or cuda[:N], got 'tpu'"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    arguments: list[object], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(run, "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_folder_is_no_place_for_a_pruning(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(run, "--out", run) == 2
    assert "holds a training run; choose another folder" in capsys.readouterr().err
    assert prune(tmp_path / "absent") == 2
    assert f"{tmp_path / 'absent'} does not exist" in capsys.readouterr().err
