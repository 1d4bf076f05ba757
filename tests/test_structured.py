"""Structured pruning: criteria against naive references, surgery that changes nothing it should not, rebuilt nets."""

from __future__ import annotations

import copy
import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern import models
from sparsekern.cli import main, recipes
from sparsekern.pruning import structured
from sparsekern.pruning.structured import calibration, counts, filters, regression, slimming, sss, thinet
from sparsekern.training import TrainConfig, load_model, read_result

pytest.importorskip("torch_pruning")


pytestmark = pytest.mark.usefixtures("one_thread")


NETS = [
    ("vgg11", 0.125),
    ("vgg-c", 0.0625),
    ("resnet20", 0.5),
    ("resnet50", 0.125),
    ("wrn-16-4", 0.125),
    ("mlp-24-16", 1),
]


def net(name: str, width: float = 1.0) -> tuple[nn.Module, Tensor]:
    """A network whose norms have seen data, in eval mode, and an input."""
    model, x = models.build(name, width=width), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.uniform_(-0.5, 0.5)
    return model.eval(), x


def convs(model: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


# -- surgery -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width"), NETS)
def test_removing_channels_that_are_zero_changes_no_output(name: str, width: float) -> None:
    model, x = net(name, width)
    graph = structured.ChannelGraph(model, x)
    groups = graph.groups()
    gone = {n: torch.randperm(g.channels)[: g.channels // 3].tolist() for n, g in groups.items()}
    with torch.no_grad():
        for group_name, group in groups.items():
            for layer in (*group.producers, *group.norms):
                for tensor in model.get_submodule(layer).parameters(recurse=False):
                    tensor[gone[group_name]] = 0
    before, params = model(x), models.count_params(model)
    for group_name, group in groups.items():
        graph.remove_(group, gone[group_name])
    torch.testing.assert_close(model(x), before)
    assert models.count_params(model) < 0.75 * params
    for group_name, group in groups.items():
        for producer in group.producers:
            assert model.get_submodule(producer).weight.shape[0] == group.channels - len(gone[group_name])


@pytest.mark.parametrize(("name", "width"), NETS)
def test_replay_rebuilds_what_surgery_left(name: str, width: float) -> None:
    model, x = net(name, width)
    original = copy.deepcopy(model)
    report = structured.prune_(model, x, "uniform", ratios=0.4)
    record = json.loads(json.dumps(report.channels.to_dict()))
    same = structured.replay_(copy.deepcopy(original), record, fresh=False)
    assert {n: t.shape for n, t in same.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values()))
    assert torch.equal(same(x), model(x))
    # A checkpoint of the pruned net goes into one rebuilt from other weights.
    other = structured.rebuild(name, record, width=width).eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_a_fresh_replay_scales_weights_to_the_fan_in_that_is_left() -> None:
    model, x = net("vgg11", 0.25)
    original = copy.deepcopy(model)
    channels = structured.prune_(model, x, ratios=0.5).channels
    fresh = structured.replay_(copy.deepcopy(original), channels)
    kept = structured.replay_(copy.deepcopy(original), channels, fresh=False)
    assert torch.equal(fresh.stem.weight, kept.stem.weight)  # its inputs are all there
    torch.testing.assert_close(fresh.features[3].weight, kept.features[3].weight * 2**0.5)
    torch.testing.assert_close(fresh.head.weight, kept.head.weight * 2**0.5)
    assert torch.equal(fresh.features[4].weight, kept.features[4].weight)
    built = nn.init.kaiming_normal_(torch.zeros(fresh.features[14].weight.shape), nonlinearity="relu")
    assert float(fresh.features[14].weight.detach().std()) == pytest.approx(float(built.std()), rel=0.1)


def test_pruning_twice_composes() -> None:
    model, x = net("resnet20", 0.5)
    original = copy.deepcopy(model)
    first = structured.prune_(model, x, ratios=0.3).channels
    second = structured.prune_(model, x, "uniform", ratios=0.25).channels
    third = structured.prune_(model, x, "sss", ratios=0.3).channels
    both = structured.Channels.from_dict(first.then(second).then(third).to_dict())
    assert len(both.blocks) == 2
    assert torch.equal(structured.replay_(original, both, fresh=False)(x), model(x))
    with pytest.raises(ValueError, match="expected a record of"):
        first.then(structured.Channels().from_dict(first.to_dict()))


def test_records_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, x = net("vgg11", 0.125)
    channels = structured.prune_(model, x, ratios=0.5).channels
    channels.save(tmp_path / "channels.json")
    assert structured.Channels.load(tmp_path / "channels.json") == channels
    other = models.build("vgg11", width=0.25)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="stem has 16 out channels, expected 8"):
        structured.replay_(other, tmp_path / "channels.json")
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())
    with pytest.raises(ValueError, match="no layer"):
        structured.replay_(models.build("mlp"), channels)
    bad = channels.to_dict()
    bad["layers"]["stem"]["out"]["kept"] = [3, 1]
    with pytest.raises(ValueError, match=r"stem: expected ascending channels within 0\.\.7"):
        structured.replay_(models.build("vgg11", width=0.125), bad)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json: not valid JSON"):
        structured.replay_(model, tmp_path / "bad.json")
    with pytest.raises(ValueError, match="expected channels of format 1, got None"):
        structured.replay_(model, {})


def test_pruning_leaves_modes_statistics_and_memory_format_alone() -> None:
    model, x = net("resnet20", 0.5)
    model.train()
    model.stages[0].eval()
    stats = model.stages[2][0].bn2.running_mean.clone()
    structured.prune_(model, x, ratios=0.5)
    assert model.training and not model.stages[0].training and model.stages[1].training
    assert torch.equal(model.stages[2][0].bn2.running_mean, stats)
    fresh = models.build("vgg11", width=0.125).to(memory_format=torch.channels_last)
    kept = {"features.3": {"in": {"kept": [0, 5], "of": 8}}, "stem": {"out": {"kept": [0, 5], "of": 8}}}
    structured.replay_(fresh, {"format": 1, "blocks": [], "layers": kept})
    assert fresh.features[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert fresh.features[3].in_channels == 2 and fresh.stem.out_channels == 2


def test_what_is_left_can_be_made_sparse_and_trained() -> None:
    model, x = net("resnet20", 0.5)
    structured.prune_(model, x, ratios=0.5)
    settings = sk.SparsityConfig(sparsity=0.5, block=4, below_break_even="sparse")
    plan = sk.sparsify_(model, settings, example_input=x)
    assert sum(layer.state == "sparse" for layer in plan.layers) > 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    before = F.cross_entropy(model(x), torch.arange(4)).item()
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        optimizer.step()
    assert loss.item() < before
    with pytest.raises(ValueError, match="expected a dense model"):
        structured.prune_(model, x, ratios=0.5)


# -- filters -----------------------------------------------------------------------------------------------------------


def test_filter_norms_and_choice_match_numpy() -> None:
    model, x = net("vgg11", 0.125)
    weights = {name: model.get_submodule(name).weight.detach().numpy().astype(np.float64) for name in convs(model)}
    report = structured.prune_(model, x, ratios={"*": 0.5, "features.7": 0.0, "features.1?": 0.25})
    for name, weight in weights.items():
        ratio = 0.0 if name == "features.7" else 0.25 if name in ("features.10", "features.14", "features.17") else 0.5
        sums = np.abs(weight).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(filters.filter_norms(torch.from_numpy(weight), 1).numpy(), sums)
        keep = len(sums) - int(len(sums) * ratio)
        expected = sorted(np.argsort(-sums, kind="stable")[:keep].tolist())
        axes = report.channels.layers.get(name, {})
        assert (axes["out"].kept if "out" in axes else list(range(len(sums)))) == expected
    l2 = np.sqrt((weights["stem"] ** 2).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(filters.filter_norms(torch.from_numpy(weights["stem"]), 2).numpy(), l2)


def test_ties_keep_the_earlier_channels() -> None:
    assert filters.largest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3) == [0, 1, 3]


def test_counts_round_as_published() -> None:
    assert [counts.kept_count(c, r) for c, r in ((16, 0.6), (32, 0.3), (64, 0.1), (10, 0.9), (4, 0.99))] == [
        6,
        22,
        57,
        1,
        1,
    ]
    assert [counts.kept_count_soft(c, r) for c, r in ((16, 0.3), (64, 0.4), (10, 0.3), (2, 0.9))] == [12, 39, 7, 1]


def test_uniform_pruning_is_a_narrower_network() -> None:
    for name, width in NETS:
        if name.startswith("mlp"):
            continue
        model, x = net(name, 2 * width)
        structured.prune_(model, x, "uniform", ratios=0.5)
        narrow = models.build(name, width=width).state_dict()
        assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in narrow.items()}


def test_tied_channels_are_ranked_by_the_sum_over_their_layers() -> None:
    model, x = net("resnet20", 0.5)
    tied = ["stem", "stages.0.0.conv2", "stages.0.1.conv2", "stages.0.2.conv2"]
    total = sum(model.get_submodule(n).weight.detach().abs().sum((1, 2, 3)).double() for n in tied)
    kept = structured.prune_(model, x, "l1-filters", ratios={"stem": 0.5}, coupled=True).channels.layers
    assert kept["stages.0.2.conv2"]["out"].kept == sorted(np.argsort(-total.numpy())[:4].tolist())
    assert kept["stem"]["out"] == kept["stages.0.0.conv2"]["out"] == kept["stages.0.0.conv1"]["in"]


# -- published targets -------------------------------------------------------------------------------------------------


def test_vgg16_a_has_the_published_widths() -> None:
    model, x = net("vgg16")
    report = structured.prune_(model, x[:1], target="vgg16-a")
    assert list(convs(model).values()) == [32, 64, 128, 128, *[256] * 9]
    assert model(x).shape == (4, 10)
    # Li et al. 2017, table 1
    assert round(100 * (1 - report.macs_after / report.macs_before), 1) == 34.2


@pytest.mark.parametrize(
    ("target", "flops", "skipped"),
    [
        ("resnet56-a", 10.4, [(0, 7), (1, 0), (2, 0), (2, 8)]),
        ("resnet56-b", 27.6, [(0, 7), (0, 8), (1, 0), (1, 7), (2, 0), (2, 8)]),
        ("resnet110-a", 15.9, [(0, 17)]),
        ("resnet110-b", 38.6, [(0, 17), (1, 0), (2, 0)]),
    ],
)
def test_residual_targets_prune_the_published_share(target: str, flops: float, skipped: list[tuple[int, int]]) -> None:
    model, x = net(structured.TARGETS[target].model)
    before = convs(model)
    report = structured.prune_(model, x[:1], target=target)
    after = convs(model)
    # Li et al. 2017, table 1; our shortcuts are 1x1 convolutions, theirs have no weights
    assert 100 * (1 - report.macs_after / report.macs_before) == pytest.approx(flops, abs=0.15)
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all(name.endswith("conv1") for name in changed)
    assert not changed & {f"stages.{s}.{b}.conv1" for s, b in skipped}
    stages = (0,) if target == "resnet110-a" else (0, 1, 2)
    assert len(changed) == len(stages) * (len(before) - 3) // 6 - len(skipped)
    if target == "resnet56-b":
        assert [after[f"stages.{s}.1.conv1"] for s in range(3)] == [6, 22, 57]


def test_other_targets_have_the_published_widths() -> None:
    published: dict[str, list[int]] = {
        "vgg-gap": [32, 32, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512],
        "vgg-tiny": [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 256],
        "vgg-5x": [24, 22, 41, 51, 108, 89, 111, 184, 276, 228, 512, 512, 512],
    }
    for name, widths in published.items():
        model, x = net("vgg16")
        structured.prune_(model, x[:1], target=structured.TARGETS[name])  # any method: it is the widths that count
        assert list(convs(model).values()) == widths
    for name, widths in (("thinet-30", [19, 38, 76, 153]), ("thinet-70", [44, 89, 179, 358])):
        model, x = net("resnet50")
        structured.prune_(model, x[:1], target=structured.TARGETS[name])
        inner = [[(b.conv1.out_channels, b.conv2.out_channels) for b in stage] for stage in model.stages]
        assert [set(stage) for stage in inner] == [{(n, n)} for n in widths]
    model, x = net("resnet34", 0.25)
    structured.prune_(model, x[:1], target="resnet34-b")
    assert [[b.conv1.out_channels for b in stage] for stage in model.stages] == [
        [16, 8, 8],
        [32, 12, 12, 32],
        [64, 38, 38, 38, 38, 64],
        [128, 128, 128],
    ]


def test_targets_are_listed_per_model_and_method() -> None:
    assert set(structured.targets("vgg16", "l1-filters")) == {"vgg16-a"}
    assert set(structured.targets(method="sss")) == {"sss-41", "sss-32", "sss-26"}
    assert {t.method for t in structured.TARGETS.values()} <= set(structured.METHODS)


# -- data-driven selection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Conv2d(3, 5, (1, 3), padding=(1, 0), bias=False), nn.Linear(12, 5)],
)
def test_patches_times_weight_is_the_output_of_the_layer(layer: nn.Module) -> None:
    conv = isinstance(layer, nn.Conv2d)
    x = torch.randn(2, 3, 7, 6) if conv else torch.randn(2, 12)
    found = calibration.patches(layer, x, 3, 1000, torch.Generator())
    out = torch.einsum("nck,ock->no", found, calibration.split_weight(layer, 3).double())
    expected = F.conv2d(x, layer.weight, None, layer.stride, layer.padding) if conv else F.linear(x, layer.weight)
    expected = expected.permute(0, 2, 3, 1).flatten(0, 2) if conv else expected
    torch.testing.assert_close(out.float(), expected)
    if conv:  # a subset of the same rows, repeatable
        some = [calibration.patches(layer, x, 3, 5, torch.Generator().manual_seed(3)) for _ in range(2)]
        assert some[0].shape[0] == 10 and torch.equal(some[0], some[1])
        assert all(any(torch.equal(row, full) for full in found) for row in some[0])


def test_thinet_contributions_sum_to_the_sampled_outputs(rng: torch.Generator) -> None:
    patches, weight = torch.randn(20, 4, 9).double(), torch.randn(6, 4, 9)
    x = thinet.contributions(patches, weight, torch.Generator().manual_seed(1))
    rows = torch.randint(6, (20,), generator=torch.Generator().manual_seed(1))
    outputs = torch.einsum("nck,ock->no", patches, weight.double())
    torch.testing.assert_close(x.sum(1), outputs[torch.arange(20), rows])


def naive_greedy(x: np.ndarray, keep: int) -> list[int]:
    gone: list[int] = []
    while x.shape[1] - len(gone) > keep:
        left = [c for c in range(x.shape[1]) if c not in gone]
        costs = [float((x[:, [*gone, c]].sum(1) ** 2).sum()) for c in left]
        gone.append(left[int(np.argmin(costs))])
    return sorted(set(range(x.shape[1])) - set(gone))


def test_thinet_is_the_greedy_algorithm_of_the_paper() -> None:
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(40, 9)) @ np.random.default_rng(seed + 9).normal(size=(9, 9))
        for keep in (1, 4, 8):
            assert thinet.greedy(torch.from_numpy(x), keep) == naive_greedy(x, keep)


def test_thinet_finds_the_optimum_of_a_tiny_layer() -> None:
    # Orthogonal contributions: there, greedy is optimal, and every subset can be tried.
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 6)))[0]
    x = basis * np.array([3.0, 0.5, 2.0, 0.1, 1.0, 0.2])
    best = min(itertools.combinations(range(6), 3), key=lambda gone: float((x[:, list(gone)].sum(1) ** 2).sum()))
    assert thinet.greedy(torch.from_numpy(x), 3) == sorted(set(range(6)) - set(best)) == [0, 2, 4]


def test_thinet_rescaling_is_the_least_squares_fit() -> None:
    x = torch.randn(50, 6).double().abs()
    kept = [0, 2, 5]
    factors = thinet.rescale(x, kept)
    expected = np.linalg.lstsq(x[:, kept].numpy(), x.sum(1).numpy(), rcond=None)[0]
    np.testing.assert_allclose(factors.numpy(), expected)
    plain = (x[:, kept].sum(1) - x.sum(1)).norm()
    assert (x[:, kept] @ factors - x.sum(1)).norm() < 0.9 * plain


def test_normal_equations_match_a_dense_product() -> None:
    patches, weight, target = torch.randn(11, 4, 3).double(), torch.randn(5, 4, 3), torch.randn(11, 5)
    gram, cross = regression.normal_equations(patches, weight, target)
    z = np.stack([(patches[:, c].numpy() @ weight[:, c].double().numpy().T).ravel() for c in range(4)])
    np.testing.assert_allclose(gram.numpy(), z @ z.T)
    np.testing.assert_allclose(cross.numpy(), z @ target.double().numpy().ravel())


def test_lasso_finds_the_channels_that_matter() -> None:
    patches, weight = torch.randn(200, 8, 4).double(), torch.randn(6, 8, 4)
    target = torch.einsum("nck,ock->no", patches[:, [1, 4, 6]], weight[:, [1, 4, 6]].double())
    assert regression.lasso_channels(*regression.normal_equations(patches, weight, target), 3) == [1, 4, 6]
    kept = regression.lasso_channels(*regression.normal_equations(patches, weight, target), 5)
    assert len(kept) == 5 and {1, 4, 6} <= set(kept)
    assert regression.lasso_channels(torch.zeros(4, 4).double(), torch.zeros(4).double(), 2) == [0, 1]
    # One penalty of scikit-learn's own on the data itself: the same channels enter.
    from sklearn.linear_model import Lasso

    z = torch.einsum("nck,ock->cno", patches, weight.double()).flatten(1).T.numpy()
    y = (target + 3 * torch.randn(200, 6)).flatten().numpy()
    gram, cross = torch.from_numpy(z.T @ z), torch.from_numpy(z.T @ y)
    for alpha in (0.5, 0.2, 0.05):
        active = np.flatnonzero(Lasso(alpha=alpha, fit_intercept=False).fit(z, y).coef_)
        assert regression.lasso_channels(gram, cross, len(active)) == active.tolist()


def test_reconstruction_is_exact_where_it_can_be_and_reduces_error_elsewhere() -> None:
    patches, weight = torch.randn(300, 6, 3).double(), torch.randn(5, 6, 3).double()
    patches[:, 5] = 2 * patches[:, 0] - patches[:, 1]  # redundant
    target = torch.einsum("nck,ock->no", patches, weight)

    def error(kept: list[int], fitted: Tensor) -> float:
        return float((torch.einsum("nck,ock->no", patches[:, kept], fitted) - target).norm())

    kept = [0, 1, 2, 3, 4]
    assert error(kept, regression.reconstruct(patches[:, kept], weight[:, kept], target)) < 1e-9
    few = patches[:4]  # fewer samples than unknowns: exact on them, and no further from the weights than needed
    fitted = regression.reconstruct(few, weight, 2 * target[:4])
    torch.testing.assert_close(torch.einsum("nck,ock->no", few, fitted), 2 * target[:4])
    expected = np.linalg.pinv(few.flatten(1).numpy()) @ target[:4].numpy()
    np.testing.assert_allclose((fitted - weight).flatten(1).T.numpy(), expected, atol=1e-9)
    kept = [0, 2, 3]
    assert error(kept, regression.reconstruct(patches[:, kept], weight[:, kept], target)) < 0.95 * error(
        kept, weight[:, kept]
    )


@pytest.mark.parametrize("method", ["thinet", "regression"])
@pytest.mark.parametrize(("name", "width"), [("vgg-c", 0.0625), ("resnet20", 0.5), ("mlp-24-16", 1)])
def test_methods_that_look_at_data_keep_outputs_closer(method: str, name: str, width: float) -> None:
    model, _ = net(name, width)
    # Images with structure: of white noise every channel tells something else.
    base = torch.randn(6, 3, 32, 32)
    images = torch.einsum("nb,bchw->nchw", torch.randn(48, 6), base)
    calibrated, plain, original = copy.deepcopy(model), copy.deepcopy(model), model(images)
    batches = [(x, torch.zeros(16)) for x in images.split(16)]
    options: dict[str, Any] = {"ratios": 0.4, "exclude": ["stem"]}
    structured.prune_(calibrated, images[:2], method, batches=batches, **options)
    structured.prune_(plain, images[:2], "l1-filters", **options)
    assert {n: p.shape for n, p in calibrated.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert (calibrated(images) - original).norm() < 0.8 * (plain(images) - original).norm()


# -- slimming ----------------------------------------------------------------------------------------------------------


def test_slimming_penalty_is_the_gradient_of_the_l1_norm_of_the_scales() -> None:
    model, x = net("resnet20", 0.25)
    with torch.no_grad():
        model.stem_norm.weight[0] = 0.0
        model.stem_norm.weight[1] = -0.7
    twin = copy.deepcopy(model)
    twin(x).square().mean().backward()
    structured.slimming_penalty_(twin, 0.01)
    gammas = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    (model(x).square().mean() + 0.01 * sum(g.abs().sum() for g in gammas)).backward()
    for a, b in zip(twin.parameters(), model.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_slimming_has_one_threshold_and_empties_no_layer() -> None:
    model, x = net("vgg11", 0.125)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand(norm.weight.shape) - 0.5)
        norms[2].weight.mul_(1e-3)  # would lose everything
    gammas = [np.abs(n.weight.detach().numpy()) for n in norms]
    everything = np.sort(np.concatenate(gammas))
    count = int(0.6 * len(everything))
    expected = [max(1, int((g >= everything[count]).sum())) for g in gammas]
    best = int(gammas[2].argmax())
    report = structured.prune_(model, x, "slimming", ratios=0.6)
    assert list(convs(model).values()) == expected and expected[2] == 1
    assert report.channels.layers["features.7"]["out"].kept == [best]
    assert model(x).shape == (4, 10)


def test_global_threshold_removes_the_exact_number_with_ties() -> None:
    scores = {"a": torch.ones(4), "b": torch.ones(3), "c": torch.tensor([2.0, 0.5])}
    kept = slimming.global_threshold(scores, 0.5)
    assert kept == {"a": [0, 1, 2, 3], "b": [0], "c": [0]}  # the smallest goes, and of the ties the last
    assert sum(map(len, kept.values())) == 9 - 4 + 1
    assert slimming.global_threshold(scores, 0.0) == {"a": [0, 1, 2, 3], "b": [0, 1, 2], "c": [0, 1]}
    assert slimming.global_threshold({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 2.0])}, 0.5, 2)["b"] == [
        0,
        1,
    ]


# -- sparse structure selection ----------------------------------------------------------------------------------------


def naive_apg(values: list[float], grads: list[float], lr: float, gamma: float, momentum: float) -> float:
    """Huang and Wang 2018, eq. 12 to 14, in the form before the change of variables: x is the look-ahead point."""
    previous = current = values[0]
    for grad in grads:
        ahead = current + momentum * (current - previous)
        z = ahead - lr * grad
        previous, current = current, float(np.sign(z) * max(abs(z) - lr * gamma, 0.0))
    return current + momentum * (current - previous)


def test_block_scales_follow_the_accelerated_proximal_gradient() -> None:
    model, x = net("resnet20", 0.25)
    before = model(x)
    scales = structured.BlockScales(model)
    torch.testing.assert_close(model(x), before)
    assert not set(map(id, scales.values.values())) & set(map(id, model.parameters()))
    name = "stages.1.0"
    grads = [3.0, -1.0, 2.0, 5.0, 0.5]
    for grad in grads:
        for scale in scales.values.values():
            scale.grad = torch.tensor(grad)
        scales.step(0.05, 0.4)
    assert scales.values[name].item() == pytest.approx(naive_apg([1.0], grads, 0.05, 0.4, 0.9), rel=1e-5)
    saved = scales.state_dict()
    for scale in scales.values.values():
        scale.grad = torch.tensor(30.0)
    scales.step(0.05, 10.0)
    twin = structured.BlockScales(copy.deepcopy(model))
    twin.load_state_dict(saved)
    assert twin.values[name].item() == pytest.approx(naive_apg([1.0], grads, 0.05, 0.4, 0.9), rel=1e-5)


@pytest.mark.parametrize(("name", "width"), [("resnet20", 0.25), ("resnet50", 0.125), ("wrn-16-4", 0.125)])
def test_blocks_of_scale_zero_go_and_the_output_stays(name: str, width: float) -> None:
    model, x = net(name, width)
    scales = structured.BlockScales(model)
    zero = ["stages.0.1", "stages.1.0"]  # an identity shortcut and one with a convolution
    for i, (block, scale) in enumerate(scales.values.items()):
        scale.data.fill_(0.0 if block in zero else 0.5 + 0.1 * i)
    scaled = model(x)
    scaled.square().mean().backward()
    assert all(scale.grad is not None for scale in scales.values.values())
    scales.fold_()
    torch.testing.assert_close(model(x), scaled, rtol=1e-4, atol=1e-4)
    report = structured.prune_(model, x, "sss")
    assert report.blocks == zero and report.macs_after < report.macs_before
    torch.testing.assert_close(model(x), scaled, rtol=1e-4, atol=1e-4)
    assert {row.channels_after for row in report.layers if row.name.startswith("stages.0.1.")} == {0}
    rebuilt = structured.rebuild(name, report.channels, width=width).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(x), model(x))


@pytest.mark.parametrize(("target", "layers"), [("sss-41", 41), ("sss-32", 32), ("sss-26", 26)])
def test_sss_targets_have_the_published_depth(target: str, layers: int) -> None:
    model, x = net("resnet50", 0.125)
    scores = sss.block_scores(model)
    structured.prune_(model, x[:1], "sss", target=target)
    inner = [name for name in convs(model) if "shortcut" not in name]
    assert len(inner) + 1 == layers and model(x).shape == (4, 10)
    kept = [name for name, m in model.named_modules() if type(m).__name__ == "Bottleneck"]
    for stage, (count, first) in enumerate(structured.TARGETS[target].blocks):
        own = [name for name in kept if name.startswith(f"stages.{stage}.")]
        assert len(own) == count and (f"stages.{stage}.0" in own) == first
        rest = [scores[n] for n in scores if n.startswith(f"stages.{stage}.") and n not in own and n[-1] != "0"]
        assert not rest or not own or max(rest) <= min([scores[n] for n in own if n[-1] != "0"], default=np.inf)


# -- soft filter pruning -----------------------------------------------------------------------------------------------


def test_soft_filters_zero_the_smallest_and_let_them_grow_back() -> None:
    model, x = net("resnet20", 0.5)
    norms = {n: np.sqrt((p.detach().numpy() ** 2).sum((1, 2, 3))) for n, p in model.named_parameters() if p.dim() == 4}
    soft = structured.SoftFilters(model, x, 0.3)
    soft.step()
    for name in ("stages.0.0.conv1", "stages.1.1.conv1", "stages.2.2.conv1"):
        order = np.argsort(norms[f"{name}.weight"])
        count = int(len(order) * 0.3)
        assert soft.zeroed[name] == sorted(order[:count].tolist())
        zero = model.get_submodule(name).weight.flatten(1).eq(0).all(1)
        assert zero.nonzero().flatten().tolist() == soft.zeroed[name]
    assert all(name.endswith("conv1") for name in soft.zeroed)
    model.train()
    with torch.no_grad():  # a constant that the ReLU lets through, so that a gradient comes back
        for name in soft.zeroed:
            model.get_submodule(name.replace("conv1", "bn1")).bias.fill_(0.5)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(model.get_submodule(n).weight[i].abs().sum() > 0 for n, own in soft.zeroed.items() for i in own)


def test_hardening_removes_what_is_zeroed() -> None:
    model, x = net("resnet20", 0.5)
    soft = structured.SoftFilters(model, x, {"stages.0.*": 0.5, "stages.2.*": 0.3})
    soft.step()
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for name, gone in soft.zeroed.items():
            norm = silent.get_submodule(name.replace("conv1", "bn1"))
            norm.weight[gone] = norm.bias[gone] = 0
    report = soft.harden_()
    torch.testing.assert_close(model(x), silent(x))
    left = {row.name: row.channels_after for row in report.layers}
    assert (left["stages.0.0.conv1"], left["stages.1.0.conv1"], left["stages.2.0.conv1"]) == (4, 16, 23)


# -- report, errors, command -------------------------------------------------------------------------------------------


def test_the_report_counts_what_is_there() -> None:
    model, x = net("vgg11", 0.125)
    report = structured.prune_(model, x, ratios=0.5)
    assert report.params_after == sum(p.numel() for p in model.parameters())
    assert report.macs_after == sum(row.macs_after for row in report.layers)
    rows = {row.name: row for row in report.layers}
    # 3x3 convolution of 4 to 8 channels on 16x16 pixels, 8 to 16 before
    assert (rows["features.3"].macs_before, rows["features.3"].macs_after) == (9 * 8 * 16 * 256, 9 * 4 * 8 * 256)
    assert (rows["head"].channels_after, rows["head"].macs_after) == (10, 320)
    assert json.loads(json.dumps(report.to_dict()))["macs_after"] == report.macs_after
    from rich.console import Console

    console = Console(width=120, file=io.StringIO())
    console.print(report)
    shown = console.file.getvalue()
    assert "features.3" in shown and f"{report.macs_after:,}" in shown


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg11", {"method": "l1-filter", "ratios": 0.5}, "did you mean l1-filters"),
        ("vgg11", {}, "expected the fraction to remove"),
        ("vgg11", {"ratios": 1.0}, "from 0 to below 1, got 1.0"),
        ("vgg11", {"ratios": {"conv*": 0.5}}, "'conv\\*', which matches none"),
        ("vgg11", {"target": "vgg16-a"}, "expected vgg16 with 13 convolutions, got 8"),
        ("vgg11", {"target": "vgg16"}, "did you mean vgg16-a"),
        ("vgg11", {"target": "vgg16-a", "ratios": 0.5}, "got both"),
        ("resnet20", {"target": "resnet56-a"}, "without a prunable layer"),
        ("resnet20", {"target": "sss-26"}, "is for method sss, got method l1-filters"),
        ("resnet20", {"method": "sss", "target": "sss-26"}, "expected 4 stages"),
        ("vgg11", {"method": "thinet", "ratios": 0.5}, "batches: thinet looks at data"),
        ("vgg11", {"method": "slimming", "ratios": {"*": 0.5}}, "takes one fraction"),
        ("vgg11", {"method": "sss"}, "without any"),
        ("vgg11", {"ratios": 0.5, "exclude": ["*"]}, "no layer whose channels"),
        ("mlp-8", {"method": "slimming", "ratios": 0.5}, "no batch norm whose scales"),
    ],
)
def test_mistakes_are_explained(name: str, options: dict[str, Any], message: str) -> None:
    model = models.build(name, width=0.0625)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        structured.prune_(model, torch.randn(2, 3, 32, 32), **options)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_without_torch_pruning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net("vgg11", 0.0625)
    channels = structured.prune_(copy.deepcopy(model), x, ratios=0.5).channels
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsekern\[structured\]'"):
        structured.prune_(model, x, ratios=0.5)
    assert structured.replay_(model, channels)(x).shape == (4, 10)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run = ["--model", "vgg11", "--width", "0.0625", "--subset", "300", "--batch-size", "50", "--threads", "1"]
    assert main(["train", *run, "--sparsity", "0", "--epochs", "2", "--out", "run", "--quiet"]) == 0
    return Path("run")


def test_slim_prunes_a_run_and_trains_what_is_left(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["slim", "run", "--method", "thinet", "--ratio", "0.5", "--out", "small", "--quiet"]
    assert main([*arguments, "--then", "finetune", "--epochs", "1"]) == 0
    assert main([*arguments, "--then", "scratch-e", "--then", "scratch-b", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "scratch-b" in out
    record = json.loads(Path("small/slim.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["large", "pruned", "finetune", "scratch-e", "scratch-b"]
    large, small = load_model("run"), load_model("small")
    x = torch.randn(3, 1, 8, 8)
    assert [c.out_channels for c in small.modules() if isinstance(c, nn.Conv2d)] == [2, 4, 8, 8, 16, 16, 16, 16]
    macs = {n: sum(models.count_macs(m, x).values()) for n, m in (("large", large), ("pruned", small))}
    assert all(rows[n]["macs"] == count for n, count in macs.items())
    results = {n: read_result(Path("small") / n) for n in ("finetune", "scratch-e", "scratch-b")}
    assert [r.epochs for r in results.values()] == [1, 2, int(2 * macs["large"] / macs["pruned"] + 0.5)]
    assert all(r.macs == macs["pruned"] for r in results.values())
    assert results["finetune"].config.base_lr == 1e-3 and results["scratch-b"].config.base_lr == 0.1
    # The small net is an ordinary run: moved away, it still knows its channels.
    Path("small/finetune").rename("moved")
    assert load_model("moved")(x).shape == (3, 10)
    assert main(["train", "--model", "vgg11", "--width", "0.0625", "--channels", "small/channels.json", "--steps", "1",
                 "--subset", "100", "--threads", "1", "--sparsity", "0", "--out", "anew", "--quiet"]) == 0  # fmt: skip
    assert models.count_params(load_model("anew")) == rows["pruned"]["params"]
    # Slimmed again, the record counts from the large net.
    assert main(["slim", "small", "--ratio", "0.5", "--out", "tiny", "--quiet"]) == 0
    kept = structured.Channels.load("tiny/channels.json").layers["features.23"]["out"]
    assert len(kept.kept) == kept.of // 4
    assert set(kept.kept) <= set(structured.Channels.load("small/channels.json").layers["features.23"]["out"].kept)
    assert load_model("tiny")(x).shape == (3, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "half"], "ratio: expected a fraction such as 0.5"),
        (["--ratio", "1.5"], "from 0 to below 1, got 1.5"),
        ([], "needs the fraction to remove, or a target"),
        (["--method", "l1-filter", "--ratio", "0.5"], "did you mean l1-filters?"),
        (["--ratio", "0.5", "--target", "vgg16-a"], "expected one of ratio, ratios and target"),
        (["--target", "vgg16-a"], "expected vgg16 with 13 convolutions"),
        (["--ratio", "0.5", "--then", "retrain"], "expected one of finetune"),
        (["--ratio", "0.5", "--then", "finetune,scratch-e", "--epochs", "1"], "call once for each"),
        (["--ratio", "0.5", "--resume"], "holds no slimmed network"),
        (["--ratio", "0"], "found nothing to remove"),
        (["--ratio", "0.5", "--out", "run"], "holds a training run"),
    ],
)
def test_slim_mistakes_are_one_line(
    trained_once: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in arguments else ["--out", "never"]
    assert main(["slim", "run", *arguments, *out, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not Path("never").exists()


@pytest.fixture(scope="module")
def _run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sparsekern.training import train

    folder = tmp_path_factory.mktemp("slim")
    config = TrainConfig(model="vgg11", width=0.0625, subset=100, steps=1, threads=1, sparsity=0.0)
    train(config, folder / "run")
    return folder


@pytest.fixture
def trained_once(_run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(_run_folder)
    return _run_folder / "run"


@pytest.mark.parametrize("name", ["rethinking-vgg16", "rethinking-resnet56", "rethinking-imagenet"])
def test_recipes_train_the_large_network_of_their_targets(name: str) -> None:
    recipe = recipes.load(name)
    config = TrainConfig(**recipe.config)
    assert config.sparsity == 0 and (config.batch_size, config.weight_decay) in ((64, 1e-4), (256, 1e-4))
    target = re.search(r"--target (\S+)", recipe.about)
    assert target is not None and structured.TARGETS[target[1]].model == config.model
