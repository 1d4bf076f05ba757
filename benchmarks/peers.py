"""Other ways to multiply with a sparse weight on a CPU, under one interface.

Each peer gets the weight in the layout that it likes best, converted outside the timed section; activations too where
it wants them transposed, which is generous to it. A peer that can't do a pass, or fails at it, says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problems import LinearProblem, relative_error

Call = Callable[[], object]


class Unavailable(Exception):
    """Why a peer is not run on a row."""


@dataclass(frozen=True)
class Entry:
    """A peer ready to run: ``call`` is timed, ``result`` turns its output into y, dx or dw of the row's layout."""

    call: Call
    result: Callable[[object], Tensor]


@dataclass(frozen=True)
class Peer:
    """A way to compute one pass. ``build`` raises :class:`Unavailable` where it does not apply."""

    name: str
    pass_: str
    build: Callable[[LinearProblem], Entry]


def _same(out: object) -> Tensor:
    assert isinstance(out, Tensor)
    return out


def _transposed(out: object) -> Tensor:
    return _same(out).t()


def _weight(problem: LinearProblem) -> Tensor:
    return problem.layout.to_dense(problem.values)


def _bsr(problem: LinearProblem, weight: Tensor) -> Tensor:
    if problem.block == 1:
        raise Unavailable("BSR needs blocks; CSR covers 1x1")
    if any(n % problem.block for n in weight.shape):
        raise Unavailable(f"BSR needs features divisible by the block of {problem.block}")
    return weight.to_sparse_bsr((problem.block, problem.block))


def _csr(weight: Tensor) -> Tensor:
    return weight.to_sparse_csr()


def _masked_dense(problem: LinearProblem) -> Entry:
    x, w, mask = problem.operands.x, problem.operands.weight, problem.layout.mask().float()
    return Entry(lambda: F.linear(x, w * mask), _same)


def _torch_bsr(problem: LinearProblem) -> Entry:
    w, x_t = _bsr(problem, _weight(problem)), problem.operands.x.t().contiguous()
    return Entry(lambda: w @ x_t, _transposed)


def _torch_bsr_linear(problem: LinearProblem) -> Entry:
    w, x = _bsr(problem, _weight(problem)), problem.operands.x
    return Entry(lambda: F.linear(x, w), _same)


def _torch_csr(problem: LinearProblem) -> Entry:
    w, x_t = _csr(_weight(problem)), problem.operands.x.t().contiguous()
    return Entry(lambda: w @ x_t, _transposed)


def _torch_csr_linear(problem: LinearProblem) -> Entry:
    w, x = _csr(_weight(problem)), problem.operands.x
    return Entry(lambda: F.linear(x, w), _same)


def _torch_bsr_dgrad(problem: LinearProblem) -> Entry:
    w_t, dy_t = _bsr(problem, _weight(problem).t().contiguous()), problem.operands.dy.t().contiguous()
    return Entry(lambda: w_t @ dy_t, _transposed)


def _torch_csr_dgrad(problem: LinearProblem) -> Entry:
    w_t, dy_t = _csr(_weight(problem).t().contiguous()), problem.operands.dy.t().contiguous()
    return Entry(lambda: w_t @ dy_t, _transposed)


def _torch_sampled(problem: LinearProblem) -> Entry:
    pattern = _csr(problem.layout.mask().float())
    dy_t, x = problem.operands.dy.t().contiguous(), problem.operands.x
    return Entry(lambda: torch.sparse.sampled_addmm(pattern, dy_t, x, beta=0.0), lambda out: _same(out).to_dense())


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
    return _scipy(problem, "csr", _weight(problem), problem.operands.x)


def _scipy_bsr(problem: LinearProblem) -> Entry:
    return _scipy(problem, "bsr", _weight(problem), problem.operands.x)


def _scipy_csr_dgrad(problem: LinearProblem) -> Entry:
    return _scipy(problem, "csr", _weight(problem).t().contiguous(), problem.operands.dy)


PEERS = (
    Peer("masked dense (w * mask)", "forward", _masked_dense),
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


def ready(problem: LinearProblem, pass_: str) -> tuple[dict[str, Call], dict[str, str]]:
    """Peers that run this row and compute the right thing, and the reasons of those that do not.

    Returns:
        ``({name: call}, {name: reason})``; every peer of the pass is in one of the two.
    """
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for peer in PEERS:
        if peer.pass_ != pass_:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls its sparse tensors beta
                entry = peer.build(problem)
                got = entry.result(entry.call())
            error = _error(problem, pass_, got)
            if error > 1e-4:
                raise Unavailable(f"wrong result, relative error {error:.1e}")
            calls[peer.name] = entry.call
        except Unavailable as error:
            reasons[peer.name] = str(error)
        except Exception as error:
            reasons[peer.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    return calls, reasons


def _error(problem: LinearProblem, pass_: str, got: Tensor) -> float:
    if pass_ == "forward":
        bias = 0.0 if problem.operands.bias is None else problem.operands.bias
        return problem.forward_error(got + bias)
    if pass_ == "dgrad":
        return problem.dgrad_error(got)
    want, absolute = problem.operands.wgrad_reference
    mask = problem.layout.mask()
    return relative_error(got * mask, want * mask, absolute * mask)
