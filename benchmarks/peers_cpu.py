"""Peers on a CPU: torch CSR and BSR, scipy, and the masked dense product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers_common import Entry, Peer, Unavailable, bsr, dense_weight, masked_dense, same, transposed
from benchmarks.problems import LinearProblem


def _csr(weight: Tensor) -> Tensor:
    return weight.to_sparse_csr()


def _torch_bsr(problem: LinearProblem) -> Entry:
    w, x_t = bsr(problem, dense_weight(problem)), problem.operands.x.t().contiguous()
    return Entry(lambda: w @ x_t, transposed)


def _torch_bsr_linear(problem: LinearProblem) -> Entry:
    w, x = bsr(problem, dense_weight(problem)), problem.operands.x
    return Entry(lambda: F.linear(x, w), same)


def _torch_csr(problem: LinearProblem) -> Entry:
    w, x_t = _csr(dense_weight(problem)), problem.operands.x.t().contiguous()
    return Entry(lambda: w @ x_t, transposed)


def _torch_csr_linear(problem: LinearProblem) -> Entry:
    w, x = _csr(dense_weight(problem)), problem.operands.x
    return Entry(lambda: F.linear(x, w), same)


def _torch_bsr_dgrad(problem: LinearProblem) -> Entry:
    w_t, dy_t = bsr(problem, dense_weight(problem).t().contiguous()), problem.operands.dy.t().contiguous()
    return Entry(lambda: w_t @ dy_t, transposed)


def _torch_csr_dgrad(problem: LinearProblem) -> Entry:
    w_t, dy_t = _csr(dense_weight(problem).t().contiguous()), problem.operands.dy.t().contiguous()
    return Entry(lambda: w_t @ dy_t, transposed)


def _torch_sampled(problem: LinearProblem) -> Entry:
    pattern = _csr(problem.layout.mask().float())
    dy_t, x = problem.operands.dy.t().contiguous(), problem.operands.x
    return Entry(lambda: torch.sparse.sampled_addmm(pattern, dy_t, x, beta=0.0), lambda out: same(out).to_dense())


def _scipy(problem: LinearProblem, kind: str, weight: Tensor, right: Tensor) -> Entry:
    if torch.get_num_threads() != 1:
        raise Unavailable("scipy multiplies with one thread; see the rows of 1 thread")
    try:
        from scipy import sparse
    except ImportError as error:
        raise Unavailable(f"scipy is not installed ({error})") from None
    if kind == "bsr":
        if problem.block == 1:
            raise Unavailable("BSR needs blocks; CSR covers 1x1")
        if any(n % problem.block for n in weight.shape):
            raise Unavailable(f"BSR needs features divisible by the block of {problem.block}")
        matrix = sparse.bsr_matrix(weight.numpy(), blocksize=(problem.block, problem.block))
    else:
        matrix = sparse.csr_matrix(weight.numpy())
    dense = right.t().contiguous().numpy()
    return Entry(lambda: matrix @ dense, lambda out: torch.as_tensor(out).t())


def _scipy_csr(problem: LinearProblem) -> Entry:
    return _scipy(problem, "csr", dense_weight(problem), problem.operands.x)


def _scipy_bsr(problem: LinearProblem) -> Entry:
    return _scipy(problem, "bsr", dense_weight(problem), problem.operands.x)


def _scipy_csr_dgrad(problem: LinearProblem) -> Entry:
    return _scipy(problem, "csr", dense_weight(problem).t().contiguous(), problem.operands.dy)


PEERS = (
    Peer("masked dense (w * mask)", "forward", masked_dense),
    Peer("torch BSR, w @ x^T", "forward", _torch_bsr),
    Peer("torch BSR, F.linear", "forward", _torch_bsr_linear),
    Peer("torch CSR, w @ x^T", "forward", _torch_csr),
    Peer("torch CSR, F.linear", "forward", _torch_csr_linear),
    Peer("scipy CSR, w @ x^T", "forward", _scipy_csr),
    Peer("scipy BSR, w @ x^T", "forward", _scipy_bsr),
    Peer("torch BSR, w^T @ dy^T", "dgrad", _torch_bsr_dgrad),
    Peer("torch CSR, w^T @ dy^T", "dgrad", _torch_csr_dgrad),
    Peer("scipy CSR, w^T @ dy^T", "dgrad", _scipy_csr_dgrad),
    Peer("torch CSR, sampled_addmm", "wgrad", _torch_sampled),
)
