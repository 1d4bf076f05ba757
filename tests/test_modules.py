"""SparseLinear and SparseConv2d as drop-in modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparsekern as sk

LINEAR = [(37, 50, True, 8), (64, 64, False, (16, 32)), (10, 3, True, 1)]
CONVS = [
    {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1},
    {"in_channels": 8, "out_channels": 12, "kernel_size": (3, 5), "stride": (2, 1), "padding": "valid", "bias": False},
    {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": "same", "dilation": 2, "groups": 2},
    {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    {"in_channels": 8, "out_channels": 12, "kernel_size": 1, "padding": 1, "padding_mode": "replicate", "groups": 4},
]


def pair(kind, spec, density=0.5):
    """A dense layer with a random mask, and its sparse twin."""
    if kind == "linear":
        inp, out, bias, block = spec
        dense: nn.Module = nn.Linear(inp, out, bias)
        cls = sk.SparseLinear
    else:
        dense, block, cls = nn.Conv2d(**spec), 4, sk.SparseConv2d
    mask = torch.rand(dense.weight.shape) < density
    sparse = cls.from_dense(dense, mask, block)
    with torch.no_grad():
        dense.weight *= mask
    return dense, sparse, mask


CASES = [("linear", s) for s in LINEAR] + [("conv2d", s) for s in CONVS]


@pytest.mark.parametrize(("kind", "spec"), CASES, ids=str)
def test_twin_equals_masked_dense(kind, spec):
    dense, sparse, mask = pair(kind, spec)
    x = (
        torch.randn(4, 37 if spec == LINEAR[0] else dense.weight.shape[1])
        if kind == "linear"
        else torch.randn(3, 8, 9, 10)
    )
    assert torch.equal(sparse.mask, mask)
    y, expected = sparse(x), dense(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    dense_grad = sparse.layout.to_dense(sparse.values.grad)
    torch.testing.assert_close(dense_grad, dense.weight.grad * mask, rtol=1e-4, atol=1e-4)
    back = sparse.to_dense()
    assert type(back) is type(dense)
    assert torch.equal(back.weight, dense.weight)
    assert repr(back) == repr(dense)
    for name in (
        "in_features",
        "out_features",
        "in_channels",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(sparse, name, None) == getattr(dense, name, None)
    torch.testing.assert_close(sparse.weight.detach().as_subclass(torch.Tensor), dense.weight.detach())


def test_unbatched_and_empty_inputs():
    _, conv, _ = pair("conv2d", CONVS[0])
    x = torch.randn(8, 9, 10)
    torch.testing.assert_close(conv(x), conv(x[None])[0])
    assert conv(torch.randn(0, 8, 9, 10)).shape == (0, 12, 9, 10)
    _, linear, _ = pair("linear", LINEAR[0])
    assert linear(torch.randn(0, 37)).shape == (0, 50)
    linear(torch.randn(0, 37)).sum().backward()
    assert not linear.values.grad.any()


def test_adopts_what_a_user_set():
    dense = nn.Linear(16, 16).double().eval()
    dense.weight.requires_grad_(False)
    seen = []
    dense.register_forward_hook(lambda module, args, output: seen.append(module))
    sparse = sk.SparseLinear.from_dense(dense, None, 4)
    assert not sparse.training
    assert not sparse.values.requires_grad
    assert sparse.bias.requires_grad
    assert sparse.values.dtype == torch.float64
    sparse(torch.randn(2, 16, dtype=torch.float64))
    assert seen == [sparse]
    back = sparse.to_dense()
    assert not back.weight.requires_grad
    assert len(back._forward_hooks) == 1


def test_weight_reads_like_a_tensor_and_refuses_writes():
    _, layer, _ = pair("linear", LINEAR[0])
    weight = layer.weight
    assert weight.shape == (50, 37)
    (layer.weight * torch.ones(50, 37)).sum().backward()
    assert layer.values.grad is not None
    writes = [
        lambda w: w.zero_(), lambda w: w.data.zero_(), lambda w: w.detach().zero_(),
        lambda w: w.copy_(torch.ones(50, 37)), lambda w: w.mul_(2),
        lambda w: nn.init.kaiming_uniform_(w), lambda w: w.__setitem__(0, 1.0), lambda w: w.__imul__(2.0),
    ]  # fmt: skip
    for write in writes:
        with torch.no_grad(), pytest.raises(RuntimeError, match="values"):
            write(layer.weight)
    with pytest.raises(AttributeError, match="load_dense_"):
        layer.weight = nn.Parameter(torch.ones(50, 37))
    assert type(layer.weight + 1) is torch.Tensor


def test_padding_and_pruned_elements_never_learn():
    _, layer, mask = pair("linear", (37, 50, True, 8))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=0.01)
    for _ in range(3):
        layer(torch.randn(6, 37)).square().sum().backward()
        optimizer.step()
    dense = layer.layout.to_dense(layer.values.detach())
    assert not dense[~mask].any()
    assert torch.equal(layer.layout.from_dense(dense), layer.values)


def test_rescale_keeps_variance():
    dense = nn.Linear(256, 256)
    mask = torch.rand(256, 256) < 0.25
    plain = sk.SparseLinear.from_dense(dense, mask, 1)
    scaled = sk.SparseLinear.from_dense(dense, mask, 1, rescale=True)
    torch.testing.assert_close(scaled.values, plain.values / mask.float().mean().sqrt(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copier):
    _, layer, _ = pair("linear", LINEAR[0])
    other = copier(layer)
    x = torch.randn(3, 37)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.values.zero_()
    other.layout.update_(torch.zeros(other.grid.blocks))
    assert layer.values.any()
    assert layer.layout.nnz > 0


def test_state_dict_round_trip_and_another_nnz():
    _, layer, _ = pair("linear", LINEAR[0], density=0.02)
    _, other, _ = pair("linear", LINEAR[0], density=0.2)
    saved = io.BytesIO()
    torch.save(other.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert all(isinstance(item, torch.Tensor) for item in state.values())
    layer.load_state_dict(state)
    x = torch.randn(3, 37)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer.mask, other.mask)
    layer.layout.validate()


def test_another_nnz_after_training_started_raises():
    _, layer, _ = pair("linear", LINEAR[0], density=0.02)
    _, other, _ = pair("linear", LINEAR[0], density=0.2)
    layer(torch.randn(2, 37)).sum().backward()
    with pytest.raises(RuntimeError, match="before building the optimizer"):
        layer.load_state_dict(other.state_dict())


def test_dense_state_dict_is_refused_with_the_fix():
    dense, layer, _ = pair("linear", LINEAR[0])
    with pytest.raises(RuntimeError, match="load_dense_state_dict"):
        layer.load_state_dict(dense.state_dict())


def test_corrupt_layout_in_a_state_dict_is_refused():
    _, layer, _ = pair("linear", LINEAR[0])
    state = layer.state_dict()
    state["col"] = state["col"] + 1000
    with pytest.raises(RuntimeError, match="expected values within"):
        layer.load_state_dict(state)


def test_meta_device():
    with torch.device("meta"):
        dense = nn.Linear(32, 16)
    mask = torch.rand(16, 32) < 0.5
    layer = sk.SparseLinear.from_dense(dense, mask, 4)
    assert layer.values.is_meta
    assert layer(torch.randn(3, 32, device="meta")).shape == (3, 16)
    layer = layer.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="load a state dict"):
        layer(torch.randn(3, 32))
    real = sk.SparseLinear.from_dense(nn.Linear(32, 16), mask, 4)
    layer.load_state_dict(real.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), real(x))


def test_dtype_moves_leave_the_layout_alone():
    _, layer, _ = pair("conv2d", CONVS[0])
    layer.double()
    assert layer.index.dtype == torch.int32
    layer.layout.validate()
    layer.bfloat16()
    assert layer(torch.randn(2, 8, 9, 9, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_constructors_and_repr():
    layer = sk.SparseLinear(64, 32, sparsity=0.75, block=8, seed=3)
    assert layer.layout.nnz == 8
    assert "block=8x8, density=0.25" in repr(layer)
    conv = sk.SparseConv2d(8, 16, 3, padding=1, sparsity=0.5, block=4)
    assert "kernel_size=(3, 3)" in repr(conv)
    assert conv(torch.randn(1, 8, 5, 5)).shape == (1, 16, 5, 5)
    assert sk.SparseLinear(64, 32, sparsity=0.75, block=8, seed=3).layout.digest() == layer.layout.digest()
    with pytest.raises(ValueError, match="mask or sparsity"):
        sk.SparseLinear(4, 4, mask=torch.ones(4, 4), sparsity=0.5)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        sk.SparseLinear(4, 4, sparsity=1.0)
    with pytest.raises(ValueError, match=r"\[4, 8\], got \[8, 4\]"):
        sk.SparseLinear(8, 4, mask=torch.ones(8, 4))


def test_masked_compute_equals_sparse():
    _, layer, _ = pair("linear", LINEAR[0])
    x = torch.randn(5, 37)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.square().sum(), layer.values)
    layer.masked = True
    z = layer(x)
    (masked_grad,) = torch.autograd.grad(z.square().sum(), layer.values)
    torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked_grad, grad, rtol=1e-4, atol=1e-4)
    other = copy.deepcopy(layer)
    other.masked = False
    other.load_state_dict(layer.state_dict())
    assert other.masked


def test_gradient_checkpointing_and_vmap_free_paths():
    from torch.utils.checkpoint import checkpoint

    _, layer, _ = pair("linear", LINEAR[0])
    x = torch.randn(4, 37, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("shape", [(5, 37), (2, 5, 37), (37,)])
def test_output_may_be_changed_in_place(shape):
    """An inplace ReLU after the layer, the most common neighbour of all."""
    _, layer, _ = pair("linear", LINEAR[0])
    x = torch.randn(shape)
    nn.ReLU(inplace=True)(layer(x)).sum().backward()
    grad = layer.values.grad.clone()
    layer.zero_grad()
    nn.ReLU()(layer(x)).sum().backward()
    assert torch.equal(layer.values.grad, grad)
    _, conv, _ = pair("conv2d", CONVS[0])
    nn.ReLU(inplace=True)(conv(torch.randn(2, 8, 5, 5))).sum().backward()
    nn.ReLU(inplace=True)(conv(torch.randn(8, 5, 5))).sum().backward()
