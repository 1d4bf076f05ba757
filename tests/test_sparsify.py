"""plan, sparsify_, densify_, state dicts: what users do to whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import sparsekern as sk
from sparsekern import cost
from sparsekern.backends import ConvGeometry
from sparsekern.models import build
from sparsekern.sparsify import Planner

FORCED = {"below_break_even": "sparse"}


def mlp(width=128):
    return nn.Sequential(
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.Linear(width, 10),
    )


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 64, 3, padding=1, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


IMAGES = torch.randn(4, 3, 12, 12)


@pytest.fixture(autouse=True)
def no_tuned_entries(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "_entries", None)


def train(model, x, steps=3, lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        output = getattr(output, "logits", output)
        output.square().mean().backward()
        optimizer.step()
    return model


def test_plan_changes_nothing_and_states_every_layer():
    model = convnet()
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    rng = torch.get_rng_state()
    plan = sk.plan(model, sk.SparsityConfig(sparsity=0.5, block=4, **FORCED), example_input=IMAGES)
    assert repr(model) == text
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[key], item) for key, item in model.state_dict().items())
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert "stem" in reasons["0"]
    assert reasons["6"] == "depthwise convolution"
    assert "classifier" in reasons["11"]
    assert {layer.name for layer in plan.layers if layer.state == "sparse"} == {"3", "7"}
    total = plan.totals()
    assert total["macs"] < total["macs_dense"]
    assert total["params_dense"] == sum(p.numel() for p in model.parameters())
    for word in ("depthwise", "sparse", "4x4", "MACs per example"):
        assert word in str(plan)


def test_macs_of_a_plan_are_per_example():
    model = convnet()
    plan = sk.plan(model, sk.SparsityConfig(block=4, **FORCED), example_input=IMAGES)
    by_name = {layer.name: layer for layer in plan.layers}
    assert by_name["0"].macs_dense == 32 * 3 * 9 * 12 * 12
    assert by_name["3"].macs_dense == 64 * 32 * 9 * 6 * 6
    assert by_name["7"].macs_dense == 64 * 32 * 9 * 6 * 6
    assert by_name["11"].macs_dense == 640


@pytest.mark.parametrize(
    "allocation", ["uniform", "uniform+", "er", "erk", "erk+", "igq", "balanced", "lamp", "magnitude"]
)
@pytest.mark.parametrize("pattern", ["random", "balanced", "butterfly"])
def test_sparsify_reaches_the_density(allocation, pattern):
    model = mlp()
    cfg = sk.SparsityConfig(sparsity=0.8, block=4, allocation=allocation, pattern=pattern, **FORCED)
    plan = sk.sparsify_(model, cfg, example_input=torch.randn(8, 64))
    touched = [layer for layer in plan.layers if layer.state == "sparse"]
    budget = sum(layer.params_dense for layer in plan.layers[:3])
    kept = sum(layer.params for layer in plan.layers[:3])
    assert touched
    assert abs(kept / budget - 0.2) < 16 * 3 / budget
    for layer in touched:
        module = model.get_submodule(layer.name)
        assert module.layout.nnz == layer.nnz
        assert int(module.mask.sum()) == layer.params


@pytest.mark.parametrize("allocation", ["snip", "grasp", "synflow"])
def test_scored_allocations(allocation):
    model = mlp()
    data = [(torch.randn(16, 64), torch.randint(10, (16,))) for _ in range(2)]
    cfg = sk.SparsityConfig(sparsity=0.8, block=4, allocation=allocation, **FORCED)
    before = copy.deepcopy(model.state_dict())
    if allocation != "synflow":
        with pytest.raises(ValueError, match="batches"):
            sk.plan(model, cfg)
    sk.plan(model, cfg, batches=data, example_input=data[0][0])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    plan = sk.sparsify_(model, cfg, batches=data, example_input=data[0][0])
    assert plan.totals()["sparse"] >= 2


def test_budget_macs():
    model = convnet()
    cfg = sk.SparsityConfig(sparsity=0.7, block=2, budget="macs", allocation="uniform", **FORCED)
    with pytest.raises(ValueError, match="example_input"):
        sk.plan(model, cfg)
    plan = sk.plan(model, cfg, example_input=IMAGES)
    touched = [layer for layer in plan.layers if layer.state == "sparse"]
    ratio = sum(layer.macs for layer in touched) / sum(layer.macs_dense for layer in touched)
    assert abs(ratio - 0.3) < 0.01


def test_overrides_excludes_and_explicit_dict():
    model = mlp()
    cfg = sk.SparsityConfig(sparsity=0.5, block=4, overrides={"0": 0.0, "4": 0.9, "5": 0.25}, exclude=("2",), **FORCED)
    plan = {layer.name: layer for layer in sk.sparsify_(model, cfg).layers}
    assert plan["0"].state == "dense"
    assert plan["0"].reason == "override 0.0"
    assert plan["2"].reason == "excluded"
    assert abs(plan["4"].density - 0.1) < 0.01
    assert abs(plan["5"].density - 0.75) < 0.06  # the classifier, because it is named
    model = mlp()
    cfg = sk.SparsityConfig(block=4, allocation={"2": 0.5, "4": 0.75}, **FORCED)
    plan = {layer.name: layer for layer in sk.sparsify_(model, cfg).layers}
    assert plan["0"].reason == "not in the allocation"
    assert abs(plan["2"].density - 0.5) < 0.01
    assert abs(plan["4"].density - 0.25) < 0.01
    with pytest.raises(ValueError, match="'nope'"):
        sk.plan(mlp(), sk.SparsityConfig(allocation={"nope": 0.5}))


def test_include_by_callable_and_glob():
    plan = sk.plan(mlp(), sk.SparsityConfig(include=(lambda name, module: name == "2",), block=4, **FORCED))
    assert [layer.name for layer in plan.layers if layer.state == "sparse"] == ["2"]
    plan = sk.plan(mlp(), sk.SparsityConfig(include=("[04]",), block=4, **FORCED))
    assert [layer.name for layer in plan.layers if layer.state == "sparse"] == ["0", "4"]


def test_no_match_raises():
    with pytest.raises(ValueError, match="at least one layer"):
        sk.sparsify_(nn.Sequential(nn.ReLU()), sk.SparsityConfig())
    with pytest.raises(ValueError, match="classifier"):
        sk.sparsify_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)), sk.SparsityConfig())


def test_subclasses_tied_and_parametrized_stay_dense():
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(32, 32), "odd": Odd(32, 32), "tied_a": nn.Linear(32, 32), "tied_b": nn.Linear(32, 32),
            "spectral": nn.Linear(32, 32), "attention": nn.MultiheadAttention(32, 4), "last": nn.Linear(32, 32),
        }
    )  # fmt: skip
    model["tied_b"].weight = model["tied_a"].weight
    parametrize.register_parametrization(model["spectral"], "weight", nn.Identity())
    plan = {layer.name: layer for layer in sk.plan(model, sk.SparsityConfig(block=4, **FORCED)).layers}
    assert plan["plain"].state == "sparse"
    assert "subclass Odd" in plan["odd"].reason
    assert plan["tied_a"].reason == plan["tied_b"].reason == "tied weight"
    assert "subclass" in plan["spectral"].reason
    assert "subclass" in plan["attention.out_proj"].reason


def test_wrapped_models_raise():
    with pytest.raises(TypeError, match="then compile or wrap"):
        sk.sparsify_(torch.compile(mlp()), sk.SparsityConfig())
    with pytest.raises(TypeError, match="DataParallel"):
        sk.sparsify_(nn.DataParallel(mlp()), sk.SparsityConfig())


def test_single_layer_names_the_other_way():
    with pytest.raises(ValueError, match="from_dense"):
        sk.sparsify_(nn.Linear(64, 64), sk.SparsityConfig(block=4, **FORCED))


def test_never_slower_below_break_even():
    cfg = sk.SparsityConfig(sparsity=0.05, block=1)
    model = mlp()
    plan = sk.sparsify_(model, cfg, example_input=torch.randn(8, 64))
    assert plan.totals()["sparse"] == 0
    assert all(type(m) is nn.Linear for m in model if isinstance(m, nn.Linear))
    assert any("below break-even" in layer.reason for layer in plan.layers)
    model = mlp()
    plan = sk.sparsify_(model, sk.SparsityConfig(sparsity=0.05, block=1, below_break_even="masked"))
    assert plan.totals()["masked"] > 0
    x = torch.randn(4, 64)
    dense = copy.deepcopy(model)
    sk.densify_(dense)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


def test_masks_are_honoured_element_by_element():
    model = mlp()
    masks = {"2": torch.rand(128, 128) < 0.03, "4": torch.rand(128, 128) < 0.9}
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            reference.get_submodule(name).weight *= mask
    plan = {layer.name: layer for layer in sk.sparsify_(model, masks=masks, block=4).layers}
    assert plan["2"].fill < 0.2
    assert plan["4"].state == "masked"
    assert "fill" in str(sk.Plan(list(plan.values())))
    assert all(torch.equal(sk.masks(model)[name], mask) for name, mask in masks.items())
    x = torch.randn(6, 64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
    train(model, x)
    assert all(torch.equal(sk.masks(model)[name], mask) for name, mask in masks.items())
    for name, mask in masks.items():
        assert not sk.dense_state_dict(model)[f"{name}.weight"][~mask].any()


def test_mask_errors():
    with pytest.raises(ValueError, match="'nope'"):
        sk.sparsify_(mlp(), masks={"nope": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"\[128, 128\], got \[2, 2\]"):
        sk.sparsify_(mlp(), masks={"2": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="depthwise"):
        sk.sparsify_(convnet(), masks={"6": torch.ones(64, 1, 3, 3)})


def test_masks_of_torch_prune():
    model = mlp()
    prune.random_unstructured(model[2], "weight", 0.95)
    prune.l1_unstructured(model[4], "weight", 0.95)
    masks = {"2": model[2].weight_mask.bool().clone(), "4": model[4].weight_mask.bool().clone()}
    x = torch.randn(6, 64)
    expected = model(x)
    plan = sk.sparsify_(model)
    assert {layer.name for layer in plan.layers if layer.state != "dense"} == {"2", "4"}
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(sk.masks(model)[name], mask) for name, mask in masks.items())


def test_optimizer_gets_the_new_parameters_and_their_state():
    model = mlp()
    optimizer = torch.optim.AdamW(
        [{"params": model[2].parameters(), "lr": 0.5}, {"params": model[4].parameters()}], lr=0.1
    )
    x = torch.randn(8, 64)
    model(x).square().mean().backward()
    optimizer.step()
    moments = optimizer.state[model[2].weight]["exp_avg"].clone()
    bias = model[2].bias
    sk.sparsify_(model, sk.SparsityConfig(sparsity=0.5, block=8, **FORCED), optimizer=optimizer)
    assert any(p is model[2].values for p in optimizer.param_groups[0]["params"])
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert model[2].bias is bias
    state = optimizer.state[model[2].values]
    assert torch.equal(state["exp_avg"], model[2].layout.from_dense(moments))
    train(model, x)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="optimizer"):
        other = torch.optim.SGD(mlp().parameters(), lr=0.1)
        sk.sparsify_(mlp(), sk.SparsityConfig(block=8, **FORCED), optimizer=other)


def resnet():
    return build("resnet18", num_classes=10, in_shape=(3, 12, 12), width=0.25)


@pytest.mark.parametrize("make", [mlp, convnet, resnet])
def test_train_then_dense_state_dict(make):
    model, original = make(), make()
    x = torch.randn(6, 64) if make is mlp else IMAGES
    sk.sparsify_(model, sk.SparsityConfig(sparsity=0.7, block=8, **FORCED), example_input=x)
    train(model, x)
    original.load_state_dict(sk.dense_state_dict(model))
    assert list(sk.dense_state_dict(model)) == list(original.state_dict())
    model.eval(), original.eval()
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-5)
    fresh = make()
    sk.sparsify_(fresh, sk.SparsityConfig(sparsity=0.7, block=8, **FORCED), example_input=x)
    sk.load_dense_state_dict(fresh, original.state_dict())
    assert torch.equal(fresh.eval()(x), model(x))
    with pytest.raises(RuntimeError, match="unexpected"):
        sk.load_dense_state_dict(fresh, {**original.state_dict(), "extra": torch.ones(1)})
    short = dict(original.state_dict())
    short.pop(next(iter(short)))
    with pytest.raises(RuntimeError, match="missing"):
        sk.load_dense_state_dict(fresh, short)
    sk.densify_(model)
    assert repr(model) == repr(make().eval())
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-5)


def test_restore_from_a_checkpoint():
    model = mlp()
    sk.sparsify_(model, sk.SparsityConfig(sparsity=0.8, block=(8, 4), capacity=1.3, **FORCED))
    dense_compute = mlp()
    assert sk.sparsify_(dense_compute, sk.SparsityConfig(sparsity=0.05, block=1, below_break_even="masked")).totals()[
        "masked"
    ]
    assert sk.restore_(mlp(), dense_compute.state_dict())[2].masked
    x = torch.randn(5, 64)
    train(model, x)
    again = sk.restore_(mlp(), model.state_dict())
    assert torch.equal(again(x), model(x))
    assert again[2].layout.capacity == model[2].layout.capacity > model[2].layout.nnz
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises((ValueError, RuntimeError)):
        sk.restore_(other, model.state_dict())


def test_same_seed_same_masks_whatever_else_is_sparse():
    first, second, third = mlp(), mlp(), mlp()
    sk.sparsify_(first, sk.SparsityConfig(sparsity=0.5, block=4, allocation="uniform", seed=7, **FORCED))
    cfg = sk.SparsityConfig(sparsity=0.5, block=4, allocation="uniform", seed=7, exclude=("0",), **FORCED)
    sk.sparsify_(second, cfg)
    sk.sparsify_(third, sk.SparsityConfig(sparsity=0.5, block=4, allocation="uniform", seed=8, **FORCED))
    assert torch.equal(sk.masks(first)["2"], sk.masks(second)["2"])
    assert not torch.equal(sk.masks(first)["2"], sk.masks(third)["2"])


def test_shared_module_is_replaced_everywhere():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": nn.Linear(32, 32)})
    sk.sparsify_(model, sk.SparsityConfig(block=4, sparsity=0.5, **FORCED))
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], sk.SparseLinear)


def test_explain_and_ddp_ignore_list():
    model = mlp()
    assert sk.explain(model) == "no sparse layers"
    sk.sparsify_(model, sk.SparsityConfig(block=8, **FORCED))
    text = sk.explain(model)
    assert "linear block 8x8" in text
    assert "chosen" in text
    assert set(model._ddp_params_and_buffers_to_ignore) == {"0.index", "2.index", "4.index"}


def test_tune_is_remembered(tmp_path):
    model, x = mlp(), torch.randn(256, 64)
    cfg = sk.SparsityConfig(sparsity=0.8, block=8)
    speeds = sk.tune(model, x, cfg, seconds_per_layer=0.02)
    assert set(speeds) == {"0", "2", "4"}
    plan = sk.plan(model, cfg, example_input=x)
    assert {layer.source for layer in plan.layers if layer.name in speeds} == {"tuned"}
    cost._entries = None  # as another process would find it
    plan = sk.plan(model, cfg, example_input=x)
    for layer in plan.layers:
        if layer.name in speeds:
            assert layer.source == "tuned"
            assert (layer.state == "sparse") == (speeds[layer.name] >= 1)
    other = sk.plan(model, cfg, example_input=torch.randn(99, 64))
    assert {layer.source for layer in other.layers if layer.source} == {"model"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity: expected a fraction in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"block": "big"}, "block"),
        ({"block": 500}, "1..128"),
        ({"budget": "time"}, "params, macs"),
        ({"pattern": "stripes"}, "random, balanced, butterfly"),
        ({"below_break_even": "fast"}, "dense, masked, sparse"),
        ({"capacity": 0.5}, "1.0 or more"),
        ({"overrides": {"a": 1.5}}, r"overrides\['a'\]"),
    ],
)
def test_config_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sk.SparsityConfig(**kwargs)


def test_unknown_allocation_lists_the_known_ones():
    with pytest.raises(ValueError, match="erk"):
        sk.plan(mlp(), sk.SparsityConfig(allocation="fancy"))


# -- what the cost model is told ---------------------------------------------------------------------------------------


def cases_of(model, x=None):
    planner = Planner(model, sk.SparsityConfig(sparsity=0.8, block=4), None, None, x, None, None)
    planner.plan()
    return {c.name: planner.case_of(c) for c in planner.candidates}


def test_autocast_layers_are_costed_in_its_dtype():
    assert {case.dtype for case in cases_of(mlp()).values()} == {"float32"}
    with torch.autocast("cpu", torch.bfloat16):
        assert {case.dtype for case in cases_of(mlp()).values()} == {"bfloat16"}
        assert {case.dtype for case in cases_of(mlp().double()).values()} == {"float64"}
        with torch.autocast("cpu", enabled=False):
            assert {case.dtype for case in cases_of(mlp()).values()} == {"float32"}


def test_convolutions_are_costed_with_their_geometry():
    cases = cases_of(convnet(), IMAGES)
    assert cases["3"].conv == ConvGeometry((2, 2), (1, 1, 1, 1), (1, 1))
    assert (cases["3"].x_shape, cases["3"].positions) == ((4, 32, 12, 12), 4 * 36)
    assert cases_of(convnet())["3"].x_shape == (32, 32, 32, 32)  # twice the assumed output
    uneven = cases_of(nn.Sequential(nn.Conv2d(32, 32, (4, 3), padding="same", dilation=(1, 2)), nn.Conv2d(32, 32, 1)))
    assert uneven["0"].conv == ConvGeometry((1, 1), (1, 2, 2, 2), (1, 2))
    assert cases_of(mlp())["0"].conv is None
