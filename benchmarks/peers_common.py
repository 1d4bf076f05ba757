"""The interface of a peer: another way to multiply with a sparse weight.

Each peer gets the weight in the layout that it likes best, converted outside the timed section; activations too where
it wants them transposed, which is generous to it. A peer that can't do a pass, or fails at it, says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from benchmarks.problems import LinearProblem

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


def same(out: object) -> Tensor:
    """The result is the output."""
    assert isinstance(out, Tensor)
    return out


def transposed(out: object) -> Tensor:
    """The result is the output transposed."""
    return same(out).t()


def dense_weight(problem: LinearProblem) -> Tensor:
    """w [O, I] with zeros where no block is stored."""
    return problem.layout.to_dense(problem.values)


def bsr(problem: LinearProblem, weight: Tensor) -> Tensor:
    """``weight`` as torch BSR; raises :class:`Unavailable` where its blocks do not fit."""
    if problem.block == 1:
        raise Unavailable("BSR needs blocks; CSR covers 1x1")
    if any(n % problem.block for n in weight.shape):
        raise Unavailable(f"BSR needs features divisible by the block of {problem.block}")
    return weight.to_sparse_bsr((problem.block, problem.block))


def masked_dense(problem: LinearProblem) -> Entry:
    """``F.linear(x, w * mask)``, as people prune."""
    x, w = problem.operands.x, problem.operands.weight
    mask = problem.layout.mask().to(w.dtype)
    return Entry(lambda: F.linear(x, w * mask), same)
