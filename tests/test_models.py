"""Models: shapes, published sizes, width scaling, MAC counting and matching."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from sparsekern import models
from sparsekern.models.layers import scaled
from sparsekern.models.match import macs_at
from sparsekern.models.registry import FAMILIES
from sparsekern.models.vit import fitting_patch
from sparsekern.nn import SparseConv2d, SparseLinear

EXAMPLES = [name for family in FAMILIES for name in family.examples]
ONE_OF_EACH = "mlp lenet-300-100 vgg16 vgg-c resnet20 resnet18 resnet50 wrn-16-4 vit-tiny".split()
IMAGENET = {"num_classes": 1000, "in_shape": (3, 224, 224)}


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return models.build(name, **options)


# Parameters as published: torchvision's model cards, the wide ResNet code, the tables of the sparse-training papers.
@pytest.mark.parametrize(
    ("name", "options", "params"),
    [
        ("resnet18", IMAGENET, 11_689_512),
        ("resnet34", IMAGENET, 21_797_672),
        ("resnet50", IMAGENET, 25_557_032),
        ("resnet101", IMAGENET, 44_549_160),
        ("wrn-50-2", IMAGENET, 68_883_240),
        ("wrn-101-2", IMAGENET, 126_886_696),
        ("resnet18", {}, 11_173_962),
        ("wrn-28-10", {}, 36_479_194),
        ("wrn-28-2", {}, 1_467_610),
        ("wrn-16-4", {}, 2_748_890),
        ("lenet-300-100", {"in_shape": (1, 28, 28)}, 266_610),
    ],
)
def test_parameters_as_published(name, options, params):
    assert models.count_params(on_meta(name, **options)) == params


@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        ("resnet50", IMAGENET, 25_502_912),
        ("resnet20", {}, 270_896),
        ("lenet-300-100", {"in_shape": (1, 28, 28)}, 266_200),
    ],
)
def test_weights_of_the_erk_golden_table(name, options, weights):
    assert models.count_params(on_meta(name, **options), weights_only=True) == weights


def test_resnet50_macs():
    assert macs_at("resnet50", 1.0, **IMAGENET) == 4_089_184_256  # stride in the 3x3 convolution


def test_vgg_shapes():
    net = models.build("vgg16")
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert net.head.in_features == 512
    # 14,715,584 weights with their 4,224 + 10 biases and 8,448 norm parameters are the usual 14.73 M.
    assert models.count_params(net, weights_only=True) == 14_715_584

    net = on_meta("vgg-c")
    assert [m.kernel_size[0] for m in net.modules() if isinstance(m, nn.Conv2d)] == [3] * 4 + [3, 3, 1] * 3
    assert [m.in_features for m in net.modules() if isinstance(m, nn.Linear)] == [2048, 512, 512]


def test_shortcuts_only_where_the_shape_changes():
    net = on_meta("resnet20")
    assert [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" in n] == [
        "stages.1.0.shortcut.0",
        "stages.2.0.shortcut.0",
    ]


@pytest.mark.parametrize("in_shape", [(1, 8, 8), (1, 28, 28), (3, 64, 64), (3, 96, 96)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_forward_shape(name, in_shape):
    net = on_meta(name, num_classes=7, in_shape=in_shape)
    assert net(torch.empty(2, *in_shape, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("in_shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_backward_reaches_every_parameter(name, in_shape):
    torch.manual_seed(0)
    net = models.build(name, in_shape=in_shape, width=0.125)
    y = net(torch.randn(4, *in_shape))
    y.square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), key
        assert p.dim() == 1 or p.grad.any(), key  # a bias before softmax or a norm may have none


@pytest.mark.parametrize("name", EXAMPLES)
def test_ends_in_head_and_starts_with_stem(name):
    net = on_meta(name)
    layers = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert layers[-1] == "head" and isinstance(net.head, nn.Linear)
    convolutional = any(isinstance(m, nn.Conv2d) for m in net.modules())
    assert (layers[0] == "stem") == convolutional


def test_stem_follows_the_input():
    assert on_meta("resnet18", in_shape=(3, 95, 95)).stem.kernel_size == (3, 3)
    assert on_meta("resnet18", in_shape=(3, 96, 96)).stem.kernel_size == (7, 7)


def test_names_in_the_name():
    assert [m.out_features for m in on_meta("mlp-48-96").modules() if isinstance(m, nn.Linear)] == [48, 96, 10]
    assert [m.out_features for m in on_meta("mlp").modules() if isinstance(m, nn.Linear)] == [1024] * 3 + [10]
    assert on_meta("resnet20-w64").stem.out_channels == 64
    assert on_meta("wrn-16-4").head.in_features == 256
    assert on_meta("vit-tiny-p8").stem.kernel_size == (8, 8)
    assert on_meta("ResNet-50").head.in_features == 2048


@pytest.mark.parametrize(
    ("side", "patch"), [(8, 2), (14, 2), (28, 4), (32, 4), (48, 4), (64, 8), (96, 8), (224, 16), (31, 1)]
)
def test_fitting_patch(side, patch):
    assert fitting_patch(side, side) == patch


def test_vit_attention_is_replaceable_linears():
    net = on_meta("vit-tiny")
    linears = {n for n, m in net.named_modules() if type(m) is nn.Linear}
    assert {f"blocks.0.{n}" for n in ("attention.qkv", "attention.proj", "fc1", "fc2")} <= linears
    assert not any(isinstance(m, nn.MultiheadAttention) for m in net.modules())
    ran = models.count_macs(net, torch.empty(1, 3, 32, 32, device="meta"))
    assert all(ran[n] > 0 for n in linears)  # called as modules


def test_vit_attention_against_the_formula():
    torch.manual_seed(0)
    net = models.build("vit-tiny", width=0.1)
    attention = net.blocks[0].attention
    x = torch.randn(2, 5, attention.proj.in_features)
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in attention.qkv(x).chunk(3, -1))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("name", EXAMPLES)
def test_width_scales_every_hidden_width(name):
    full = [m for m in on_meta(name).modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    half = [m for m in on_meta(name, width=0.5).modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    tiny = on_meta(name, width=1e-6)
    assert len(full) == len(half)
    for a, b in zip(full[:-1], half[:-1]):
        assert b.weight.shape[0] * 2 == a.weight.shape[0]
    assert full[-1].weight.shape[0] == half[-1].weight.shape[0] == 10
    assert tiny(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_scaled_is_monotone_in_steps_of_one():
    widths = [scaled(64, i / 1000) for i in range(1, 1500)]
    assert widths[0] == 1 and set(widths) == set(range(1, 97))
    assert all(b - a in (0, 1) for a, b in pairwise(widths))


def test_kaiming_over_the_dense_fan_in():
    torch.manual_seed(0)
    net = models.build("wrn-16-4")
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 10_000]
    assert len(layers) > 8
    for m in layers:
        assert float(m.weight.detach().std()) == pytest.approx((2 / m.weight[0].numel()) ** 0.5, rel=0.05)
    assert not net.head.bias.any()


def test_seed_decides():
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(models.build("mlp-16").state_dict())
    assert all(torch.equal(a, b) for a, b in zip(nets[0].values(), nets[1].values()))
    assert not torch.equal(nets[0]["head.weight"], nets[2]["head.weight"])


@pytest.mark.parametrize(("name", "closest"), [("reznet50", "resnet50"), ("wrn28-10", "wrn-28-10"), ("vgg15", "vgg1")])
def test_unknown_name_lists_families_and_the_closest(name, closest):
    with pytest.raises(ValueError, match=f"did you mean '{closest}") as error:
        models.build(name)
    assert all(pattern in str(error.value) for pattern in models.names())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("wrn-17-2", {}, "depth of 6n"),
        ("mlp", {"width": 0}, "width"),
        ("mlp", {"width": float("nan")}, "width"),
        ("mlp", {"num_classes": 0}, "num_classes"),
        ("mlp", {"in_shape": (32, 32)}, "in_shape"),
        ("vit-tiny-p5", {}, "divides 32x32"),
        ("resnet21", {}, "did you mean"),
        ("mlp-0", {}, "expected one of"),
    ],
)
def test_bad_arguments(name, options, what):
    with pytest.raises(ValueError, match=what):
        models.build(name, **options)


# -- counting ---------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """A layer of every kind that is counted, one of them called twice and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)

    def forward(self, x, scale=1.0):
        y = self.norm(self.conv(x)).flatten(2).transpose(1, 2)  # [B, 16, 8]
        return self.linear(self.linear(y)) * scale


def test_count_macs_by_hand():
    net = Everything().train()
    net.norm.eval()
    before = net.norm.running_mean.clone()
    expected = {"conv": 4 * 4 * 8 * 2 * 9, "linear": 2 * 16 * 8 * 8, "never": 0}
    x = torch.randn(3, 4, 8, 8)
    assert models.count_macs(net, x) == expected
    assert models.count_macs(net, (x, 2.0)) == expected
    assert models.count_macs(net, {"x": x, "scale": 2.0}) == expected
    assert net.training and net.linear.training and not net.norm.training
    assert torch.equal(net.norm.running_mean, before)
    assert not any(m._forward_hooks for m in net.modules())


def test_count_macs_cleans_up_after_an_error():
    net = Everything()
    with pytest.raises(RuntimeError):
        models.count_macs(net, torch.randn(3, 5, 8, 8))
    assert net.training and not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("example", [torch.zeros(0, 4, 8, 8), torch.tensor(1.0), (), {"x": 3}])
def test_count_macs_needs_samples(example):
    with pytest.raises(ValueError, match="example_input"):
        models.count_macs(Everything(), example)


def test_sparse_layers_count_stored_blocks():
    torch.manual_seed(0)
    linear, conv = nn.Linear(10, 12), nn.Conv2d(6, 8, 3, padding=1)
    linear_mask = torch.zeros(12, 10, dtype=torch.bool)
    linear_mask[:4, 8:] = True  # an edge block: 4 x 2 of 4 x 4
    conv_mask = torch.zeros(8, 6, 3, 3, dtype=torch.bool)
    conv_mask[4:, :4, 1, 2] = True
    sparse = nn.ModuleDict(
        {
            "linear": SparseLinear.from_dense(linear, linear_mask, block=4),
            "conv": SparseConv2d.from_dense(conv, conv_mask, block=4),
        }
    )
    assert models.count_macs(sparse["linear"], torch.randn(2, 5, 10)) == {"": 5 * 8}
    assert models.count_macs(sparse["conv"], torch.randn(2, 6, 7, 7)) == {"": 49 * 16}
    assert models.count_params(sparse) == 8 + 12 + 16 + 8
    assert models.count_params(sparse, weights_only=True) == 8 + 16


def test_tied_weights_count_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert models.count_params(net) == 16 + 8
    assert models.count_params(net, weights_only=True) == 16


@pytest.mark.parametrize(
    ("name", "share"), [("resnet20-w64", 0.1), ("wrn-16-4", 0.2), ("vgg16", 0.5), ("mlp", 0.05), ("vgg11", 1.7)]
)
def test_match_macs_within_two_percent(name, share):
    target = macs_at(name, 1.0, num_classes=10, in_shape=(3, 32, 32)) * share
    width, net = models.match_macs(name, target)
    found = sum(models.count_macs(net, torch.zeros(1, 3, 32, 32)).values())
    assert found == macs_at(name, width, num_classes=10, in_shape=(3, 32, 32))
    assert abs(found / target - 1) < 0.02
    assert (width < 1) == (share < 1)


def test_match_macs_takes_the_nearest_step():
    options = {"num_classes": 3, "in_shape": (1, 8, 8)}
    costs = {scaled(10, w / 100): macs_at("mlp-10", w / 100, **options) for w in range(5, 200, 10)}
    for target in (70, 100, 333, 670, 999):
        _, net = models.match_macs("mlp-10", target, **options)
        found = sum(models.count_macs(net, torch.zeros(1, 1, 8, 8)).values())
        assert abs(found - target) == min(abs(c - target) for c in costs.values())


def test_match_macs_below_the_narrowest():
    with pytest.raises(ValueError, match="target_macs: expected at least"):
        models.match_macs("resnet20", 10)
