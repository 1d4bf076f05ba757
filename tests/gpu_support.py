"""What tests on a GPU share: operands and layouts there, layers to train, captured steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.layout import BlockGrid, BlockLayout

from .support import random_layout

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
# Rounding of the output; tf32 rounds the operands to 10 bits of mantissa.
BOUNDS = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-5, "tf32": 2**-9}
DEVICE = "cuda"


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def on_gpu(shape, block, density, groups=1, **how):
    layout = random_layout(BlockGrid(shape, block, groups), density, **how)
    return BlockLayout(layout.grid, layout.index.to(DEVICE))


def training_layer(block=32, density=0.2, dtype=torch.bfloat16):
    dense = nn.Linear(512, 768, device=DEVICE, dtype=dtype)
    layout = on_gpu((768, 512), (block, block), density)
    return sk.SparseLinear.from_dense(dense, layout.mask(), block=block)


def other_blocks(layer):
    """Another block mask with as many blocks; made without a host sync."""
    scores = torch.rand(layer.layout.grid.blocks, device=DEVICE)
    keep = scores.topk(layer.layout.capacity).indices
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, keep, True)


def capture(step):
    """``step()`` as a CUDA graph after three runs aside: the graph and the tensors that its replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


def memory_of_a_step():
    """Bytes that a training step of a 4096 x 4096 layer at 98 %, 16 tokens, takes besides what is there."""
    layout = on_gpu((4096, 4096), (64, 64), 0.02)
    values = layout.from_dense(draw(4096, 4096, dtype=torch.bfloat16)).requires_grad_()
    x, dy = draw(16, 4096, dtype=torch.bfloat16).requires_grad_(), draw(16, 4096, dtype=torch.bfloat16)
    sk.sparse_linear(x, values, layout).backward(dy)
    values.grad = x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sk.sparse_linear(x, values, layout).backward(dy)
    return torch.cuda.max_memory_allocated() - before


def long_layer():
    """Layout, values, and x of more than 2^31 elements; the test is skipped where that does not fit."""
    m = 2**31 // 1024 + 64
    if torch.cuda.get_device_properties(0).total_memory < 4 * m * 1024 * 2 + (8 << 30):
        pytest.skip("needs more memory")
    layout = on_gpu((64, 1024), (32, 32), 0.2)
    values = layout.from_dense(draw(64, 1024, dtype=torch.bfloat16))
    return layout, values, torch.empty(m, 1024, device="cuda", dtype=torch.bfloat16).normal_()
