"""Peers on a GPU: torch's BSR kernels, blksprs, stk, and the masked dense product.

Weights and layouts are converted, and caches of theirs filled, outside the timed section.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers_common import Entry, Peer, Unavailable, bsr, dense_weight, masked_dense, same, transposed
from benchmarks.problems import LinearProblem


def _module(name: str, package: str) -> Any:
    """An optional module; raises :class:`Unavailable` naming its ``package``."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed ({error})") from None


def _on_gpu(problem: LinearProblem) -> None:
    if problem.device != "cuda":
        raise Unavailable("needs a CUDA device")


# -- as people prune: a dense product with a masked weight -------------------------------------------------------------


def _masked_step(problem: LinearProblem) -> Entry:
    o = problem.operands
    x, w = o.x.detach().clone().requires_grad_(), o.weight.detach().clone().requires_grad_()
    mask = problem.layout.mask().to(w.dtype)

    def step() -> object:
        x.grad = w.grad = None
        F.linear(x, w * mask).backward(o.dy)
        return x.grad

    return Entry(step, same)


# -- torch -------------------------------------------------------------------------------------------------------------


def _torch_kernel(name: str) -> Any:
    found = getattr(_module("torch.sparse._triton_ops", "torch's BSR kernels"), name, None)
    if found is None:
        raise Unavailable(f"this torch has no {name}")
    return found


def _bsr_dense_addmm(problem: LinearProblem, weight: Tensor, right: Tensor) -> Entry:
    """weight [R, K] in BSR times right^T [K, M]."""
    _on_gpu(problem)
    kernel, w = _torch_kernel("bsr_dense_addmm"), bsr(problem, weight)
    right_t = right.t().contiguous()
    zero = right.new_zeros(weight.shape[0], right.shape[0])
    return Entry(lambda: kernel(zero, w, right_t, beta=0), transposed)


def _torch_forward(problem: LinearProblem) -> Entry:
    return _bsr_dense_addmm(problem, dense_weight(problem), problem.operands.x)


def _torch_dgrad(problem: LinearProblem) -> Entry:
    return _bsr_dense_addmm(problem, dense_weight(problem).t().contiguous(), problem.operands.dy)


def _torch_linear(problem: LinearProblem) -> Entry:
    _on_gpu(problem)
    w, x = bsr(problem, dense_weight(problem)), problem.operands.x
    return Entry(lambda: F.linear(x, w), same)


def _torch_sampled(problem: LinearProblem) -> Entry:
    _on_gpu(problem)
    kernel = _torch_kernel("sampled_addmm")
    pattern = bsr(problem, problem.layout.mask().to(problem.dtype))
    dy_t, x = problem.operands.dy.t().contiguous(), problem.operands.x
    return Entry(lambda: kernel(pattern, dy_t, x, beta=0), lambda out: same(out).to_dense())


# -- blksprs -----------------------------------------------------------------------------------------------------------


class _Blksprs:
    """Operands of one product in its form: batch of 1, one layout [1, rows, columns] per matrix."""

    def __init__(self, problem: LinearProblem) -> None:
        _on_gpu(problem)
        self.ops, self.block = _module("blksprs", "blksprs").ops, problem.block
        if problem.block < 16:
            raise Unavailable("blksprs needs blocks of 16 and more")
        sizes = (problem.shape.m, problem.shape.i, problem.shape.o)
        if any(n % problem.block for n in sizes):
            raise Unavailable(f"blksprs needs sizes divisible by the block of {problem.block}")
        self.mask = problem.layout.block_mask().reshape(problem.layout.grid.shape[1], -1)[None]

    def full(self, matrix: Tensor) -> Tensor:
        shape = (1, matrix.shape[0] // self.block, matrix.shape[1] // self.block)
        return torch.ones(shape, dtype=torch.bool, device=matrix.device)

    def sparse(self, matrix: Tensor, layout: Tensor) -> Any:
        return self.ops.to_sparse(matrix.contiguous()[None], layout, self.block)

    def product(self, a: Tensor, a_layout: Tensor, b: Tensor, b_layout: Tensor, out_layout: Tensor) -> Entry:
        left, right = self.sparse(a, a_layout), self.sparse(b, b_layout)
        cache: dict[str, Any] = {}

        def call() -> object:
            return self.ops.matmul(left, a_layout, right, b_layout, out_layout, self.block, layout_cache=cache)

        def result(out: object) -> Tensor:
            return self.ops.to_dense(out, out_layout, self.block).as_subclass(Tensor)[0]

        return Entry(call, result)


def _blksprs_forward(problem: LinearProblem) -> Entry:
    peer, x, w = _Blksprs(problem), problem.operands.x, dense_weight(problem)
    out = torch.ones(1, x.shape[0] // peer.block, w.shape[0] // peer.block, dtype=torch.bool, device=x.device)
    return peer.product(x, peer.full(x), w.t(), peer.mask.transpose(1, 2).contiguous(), out)


def _blksprs_dgrad(problem: LinearProblem) -> Entry:
    peer, dy, w = _Blksprs(problem), problem.operands.dy, dense_weight(problem)
    out = torch.ones(1, dy.shape[0] // peer.block, w.shape[1] // peer.block, dtype=torch.bool, device=dy.device)
    return peer.product(dy, peer.full(dy), w, peer.mask, out)


def _blksprs_wgrad(problem: LinearProblem) -> Entry:
    peer, dy_t, x = _Blksprs(problem), problem.operands.dy.t(), problem.operands.x
    return peer.product(dy_t, peer.full(dy_t), x, peer.full(x), peer.mask)


# -- stk ---------------------------------------------------------------------------------------------------------------


def _stk(problem: LinearProblem) -> tuple[Any, Any]:
    """The library and the weight [O, I] in its format, which has blocks of 128 only."""
    if problem.block != 128:
        raise Unavailable("stk has blocks of 128 only")
    if any(n % 128 for n in (problem.shape.m, problem.shape.i, problem.shape.o)):
        raise Unavailable("stk needs sizes divisible by 128")
    _on_gpu(problem)
    stk = _module("stk", "stanford-stk")
    view, nnz = problem.layout.view, problem.layout.nnz
    data = problem.values[:nnz].contiguous()
    row, col = view.row[:nnz].to(torch.int16), view.col[:nnz].to(torch.int16)
    return stk, stk.Matrix((problem.shape.o, problem.shape.i), data, row, col, view.row_ptr.clone())


def _stk_forward(problem: LinearProblem) -> Entry:
    stk, w = _stk(problem)
    x, w_t = problem.operands.x, w.t()
    return Entry(lambda: stk.ops.dds(x, w_t), same)


def _stk_dgrad(problem: LinearProblem) -> Entry:
    stk, w = _stk(problem)
    dy = problem.operands.dy
    return Entry(lambda: stk.ops.dds(dy, w), same)


def _stk_wgrad(problem: LinearProblem) -> Entry:
    stk, w = _stk(problem)
    dy_t, x = problem.operands.dy.t(), problem.operands.x
    return Entry(lambda: stk.ops.sdd(dy_t, x, w), lambda out: stk.ops.to_dense(out))


MASKED, BSR, SAMPLED = "masked dense (w * mask)", "torch bsr_dense_addmm", "torch sampled_addmm"
BLKSPRS, STK = "blksprs", "stk"

PEERS = (
    Peer(MASKED, "forward", masked_dense),
    Peer(BSR, "forward", _torch_forward),
    Peer("torch BSR, F.linear", "forward", _torch_linear),
    Peer(BLKSPRS, "forward", _blksprs_forward),
    Peer(STK, "forward", _stk_forward),
    Peer(BSR, "dgrad", _torch_dgrad),
    Peer(BLKSPRS, "dgrad", _blksprs_dgrad),
    Peer(STK, "dgrad", _stk_dgrad),
    Peer(SAMPLED, "wgrad", _torch_sampled),
    Peer(BLKSPRS, "wgrad", _blksprs_wgrad),
    Peer(STK, "wgrad", _stk_wgrad),
    Peer(MASKED, "step", _masked_step),
)
