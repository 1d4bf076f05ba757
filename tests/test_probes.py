"""Probes: what a topology update wants to know of a backward, against the dense gradient in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern.nn import SparseModule

OPS = torch.ops.sparsekern
CONVS = {
    "plain": {"padding": 1},
    "strided": {"stride": 2, "padding": (1, 0)},
    "dilated": {"dilation": (1, 2), "padding": "same"},
    "grouped": {"groups": 2, "stride": (2, 1)},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
}


def layer(kind: str, block: int, masked: bool = False, dtype: torch.dtype = torch.float32) -> SparseModule:
    torch.manual_seed(block)
    if kind == "linear":
        made: SparseModule = sk.SparseLinear(21, 34, sparsity=0.6, block=block, dtype=dtype)
    else:
        made = sk.SparseConv2d(12, 20, 3, sparsity=0.6, block=block, dtype=dtype, **CONVS[kind])
    made.masked = masked
    return made


def operands(module: SparseModule, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn((3, 5, 21) if isinstance(module, sk.SparseLinear) else (2, 12, 7, 8), dtype=dtype)
    return x, torch.randn_like(module(x))


def dense_gradient(module: SparseModule, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    twin = module.to_dense().double()
    twin(x.double()).backward(dy.double())
    return twin.weight.grad


def norms(module: SparseModule, dw: torch.Tensor) -> torch.Tensor:
    found = module.grid.to_blocks(dw).flatten(1).norm(dim=1)
    return found.masked_fill(module.layout.block_mask().flatten(), -torch.inf).float()


def arm(module: SparseModule, kind: str, dtype: torch.dtype = torch.float32) -> None:
    shape = (module.grid.blocks,) if kind == "norms" else module.grid.weight_shape
    module.probe = torch.zeros(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("masked", [False, True], ids=["sparse", "masked"])
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("kind", ["linear", *CONVS])
def test_probes_collect_and_add_up(kind, block, masked):
    """Over two backwards the norms add up, and so do the gradients; nothing else of the backward changes."""
    module = layer(kind, block, masked)
    (x1, dy1), (x2, dy2) = operands(module), operands(module)
    dw1, dw2 = dense_gradient(module, x1, dy1), dense_gradient(module, x2, dy2)

    def backward() -> tuple[torch.Tensor, torch.Tensor]:
        module.zero_grad()
        x = x1.clone().requires_grad_()
        module(x).backward(dy1)
        module(x2).backward(dy2)
        return module.values.grad, x.grad

    plain = backward()
    arm(module, "norms")
    probed = backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, probed))
    torch.testing.assert_close(module.probe.grad, norms(module, dw1) + norms(module, dw2), rtol=1e-4, atol=1e-4)
    arm(module, "dense")
    probed = backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, probed))
    torch.testing.assert_close(module.probe.grad, (dw1 + dw2).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("probe", ["norms", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_half_precision(kind, dtype, probe):
    """Collected in fp32; a sum that passes fp16's largest number stays finite."""
    module = layer(kind, 8, dtype=dtype)
    x, dy = operands(module, dtype)
    dy = dy * 100
    dw = dense_gradient(module, x, dy)
    arm(module, probe)
    module(x).backward(dy)
    want = norms(module, dw) if probe == "norms" else dw.float()
    assert module.probe.grad.dtype == torch.float32
    torch.testing.assert_close(module.probe.grad, want, rtol=2e-2, atol=2e-2 * float(dw.abs().max()))


@pytest.mark.parametrize("kind", ["linear", "plain"])
def test_under_autocast(kind):
    module = layer(kind, 8)
    x, dy = operands(module)
    dw = dense_gradient(module, x, dy)
    arm(module, "norms")
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.backward(dy.bfloat16())
    torch.testing.assert_close(module.probe.grad, norms(module, dw), rtol=3e-2, atol=3e-2 * float(dw.abs().max()))


def test_recomputed_forward_and_shared_layer():
    """Activation checkpointing does not count twice; a layer used twice counts twice."""
    module = layer("linear", 8)
    x, dy = operands(module)
    want = norms(module, dense_gradient(module, x, dy))
    arm(module, "norms")
    checkpoint(module, x.requires_grad_(), use_reentrant=False).backward(dy)
    torch.testing.assert_close(module.probe.grad, want, rtol=1e-4, atol=1e-4)
    arm(module, "norms")
    torch.cat([module(x), module(x)]).backward(torch.cat([dy, dy]))
    torch.testing.assert_close(module.probe.grad, 2 * want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("probe", ["norms", "dense"])
@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_compiled_with_one_more_graph(kind, probe):
    """Arming costs one graph, moving blocks and new probes none."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    module = layer(kind, 8)
    x, dy = operands(module)
    dw = dense_gradient(module, x, dy).float()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    compiled(x).backward(dy)
    assert counter.frame_count == 1
    for _ in range(2):
        arm(module, probe)
        compiled(x).backward(dy)
        want = norms(module, dw) if probe == "norms" else dw
        torch.testing.assert_close(module.probe.grad, want, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 2
        mask = module.layout.block_mask()
        module.layout.update_(mask.flatten().roll(1).view_as(mask))
        module.probe = None
        compiled(x).backward(dy)
        assert counter.frame_count == 2


@pytest.mark.parametrize("kind", ["linear", "plain", "grouped"])
def test_triton_kernels_give_the_same_norms(kind, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "triton")
    torch.manual_seed(0)
    if kind == "linear":
        module: SparseModule = sk.SparseLinear(40, 50, sparsity=0.5, block=16)
        x = torch.randn(20, 40)
    else:
        geometry = {**CONVS[kind]}
        module = sk.SparseConv2d(32, 36, 3, sparsity=0.5, block=16, **geometry)
        x = torch.randn(2, 32, 5, 6).contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(module(x))
    want = norms(module, dense_gradient(module, x, dy))
    arm(module, "norms")
    module(x).backward(dy)
    torch.testing.assert_close(module.probe.grad, want, rtol=1e-3, atol=1e-3)


def test_opcheck():
    for kind, dim in itertools.product(("linear", "grouped"), (1, 2)):
        module = layer(kind, 8)
        x, dy = operands(module)
        arm(module, "norms" if dim == 1 else "dense")
        index, values = module.index, module.values.detach().requires_grad_()
        if kind == "linear":
            opcheck(OPS.linear, (x, values, index, None, 34, None, module.probe))
            opcheck(OPS.linear_dense_wgrad, (dy, x))
        else:
            geometry = ((3, 3), (2, 1), (0, 0, 0, 0), (1, 1), 2)
            opcheck(OPS.conv2d, (x, values, index, None, 20, *geometry, None, module.probe))
            opcheck(OPS.conv2d_dense_wgrad, (dy, x, *geometry))


def test_flops_are_those_of_the_dense_gradient():
    x, dy = torch.randn(2, 12, 7, 8), torch.randn(2, 20, 5, 3)
    with FlopCounterMode(display=False) as counter:
        OPS.linear_dense_wgrad(torch.randn(3, 5, 34), torch.randn(3, 5, 21))
    assert counter.get_total_flops() == 2 * 15 * 34 * 21
    with FlopCounterMode(display=False) as counter:
        OPS.conv2d_dense_wgrad(dy, x, (3, 3), (1, 2), (0, 0, 0, 0), (1, 1), 2)
    assert counter.get_total_flops() == 2 * 2 * 20 * 5 * 3 * 6 * 9


def test_wrong_shape():
    module = layer("linear", 8)
    with pytest.raises(ValueError, match=r"expected a probe \[15\] for norms of blocks or \[34, 21\].*got \[16\]"):
        sk.sparse_linear(torch.randn(4, 21), module.values, module.layout, probe=torch.zeros(16))


def test_no_probe_and_frozen_values():
    """A frozen layer can still be probed, and an unarmed one collects nothing."""
    module = layer("linear", 8)
    x, dy = operands(module)
    module(x).backward(dy)
    assert module.probe is None
    want = norms(module, dense_gradient(module, x, dy))
    module.values.requires_grad_(False)
    module.bias.requires_grad_(False)
    arm(module, "norms")
    module(x).backward(dy)
    torch.testing.assert_close(module.probe.grad, want, rtol=1e-4, atol=1e-4)
    assert F.linear(x, module.weight, module.bias).allclose(module(x), atol=1e-5)
    assert isinstance(module, nn.Module)
