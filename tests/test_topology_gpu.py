"""Topology updates on a GPU: the same blocks as on the CPU, no host syncs, captured graphs stay valid."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import topology

pytestmark = pytest.mark.gpu

METHODS = {
    "set": sk.SET(update_every=2),
    "set-global": sk.SET(update_every=2, scope="global", min_per_row=1),
    "rigl": sk.RigL(update_every=2),
    "rigl-exact": sk.RigL(update_every=2, exact=True),
    "srigl": topology.SRigL(update_every=2),
    "snfs": topology.SNFS(update_every=2),
    "dsr": topology.DSR(update_every=2),
    "gradual": topology.GradualMagnitude(update_every=2, sparsity=0.8, compact_at=(0.5, 1.0)),
}


def net(block: int, dtype: torch.dtype, capacity: float = 1.5) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 32, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, 32),
    )  # fmt: skip
    config = sk.SparsityConfig(
        sparsity=0.5, block=block, capacity=capacity, below_break_even="sparse", exclude=("7",), allocation="uniform"
    )
    sk.sparsify_(model.to(dtype).to(memory_format=torch.channels_last), config)
    return model


def run(model: nn.Module, method: topology.Method, device: str, dtype: torch.dtype, steps: int = 9) -> nn.Module:
    model = copy.deepcopy(model).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    topo = sk.TopologyScheduler(model, optimizer, method, total_steps=12)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 32, 8, 8, generator=generator, dtype=dtype).to(device)
        y = torch.randint(0, 32, (16,), generator=generator).to(device)
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        topo.step()
        optimizer.zero_grad()
    assert topo.updates >= 3
    return model


@pytest.mark.parametrize("name", METHODS)
def test_same_blocks_as_on_the_cpu(name):
    """In float64, whose rounding decides no comparison."""
    model = net(8, torch.float64)
    on_cpu, on_gpu = (run(model, METHODS[name], device, torch.float64) for device in ("cpu", "cuda"))
    for a, b in zip(on_cpu.modules(), on_gpu.modules(), strict=True):
        if hasattr(a, "layout"):
            b.layout.validate()
            assert torch.equal(a.layout.index, b.layout.index.cpu())
            torch.testing.assert_close(a.values, b.values.cpu(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_triton_layers_train_with_every_method(name):
    model = run(net(16, torch.bfloat16), METHODS[name], "cuda", torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "layout"):
            module.layout.validate()
            assert bool(module.values.isfinite().all())
            assert not bool(module.values[module.layout.nnz :].any())


def test_update_at_constant_nnz_waits_for_nothing():
    model = net(16, torch.float32).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    topo = sk.TopologyScheduler(model, optimizer, sk.SET(update_every=1), total_steps=12)
    x = torch.randn(16, 32, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)

    def step() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        topo.step()
        optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert topo.updates == 2


def test_captured_step_stays_valid_over_updates():
    """Forward and backward in a CUDA graph; updates between replays rewrite what the kernels read."""
    model = net(16, torch.float32, capacity=1.0).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    topo = sk.TopologyScheduler(model, optimizer, sk.SET(update_every=1), total_steps=12)
    x = torch.randn(16, 32, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(x).square().mean()
        loss.backward()
    for _ in range(4):
        graph.replay()
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.grad = None
        want = twin(x).square().mean()
        want.backward()
        torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-6)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
        optimizer.step()
        topo.step()
        for parameter in model.parameters():
            parameter.grad.zero_()
    assert topo.updates == 4


def test_compiled_step_does_not_recompile():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    model = net(16, torch.bfloat16).cuda()
    compiled = torch.compile(model, backend=counter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    topo = sk.TopologyScheduler(model, optimizer, sk.RigL(update_every=3), total_steps=24)
    x = torch.randn(16, 32, 8, 8, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    graphs = []
    for _ in range(12):
        compiled(x).float().square().mean().backward()
        optimizer.step()
        topo.step()
        optimizer.zero_grad()
        graphs.append(counter.frame_count)
    assert topo.updates == 4
    assert graphs[3:] == graphs[3:4] * 9, "recompiled after the first update step"
