"""Which peers run a row, and whether they compute the right thing; see peers_cpu and peers_gpu."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import peers_cpu, peers_gpu
from benchmarks.device import one_line
from benchmarks.peers_common import Call, Peer, Unavailable
from benchmarks.problems import LinearProblem, relative_error


def of_device(device: str, *, rehearse_gpu: bool = False) -> Sequence[Peer]:
    """The peers of a device. ``rehearse_gpu`` gives the GPU's on a CPU, where most say that they need one."""
    return peers_gpu.PEERS if device == "cuda" or rehearse_gpu else peers_cpu.PEERS


def ready(
    problem: LinearProblem, pass_: str, peers: Sequence[Peer] | None = None
) -> tuple[dict[str, Call], dict[str, str]]:
    """Peers that run this row and compute the right thing, and the reasons of those that do not.

    Returns:
        ``({name: call}, {name: reason})``; every peer of the pass is in one of the two.
    """
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for peer in of_device(problem.device) if peers is None else peers:
        if peer.pass_ != pass_:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls its sparse tensors beta
                entry = peer.build(problem)
                got = entry.result(entry.call())
            error, bound = _error(problem, pass_, got), _bound(problem)
            if not error <= bound:
                raise Unavailable(f"wrong result, relative error {error:.1e}")
            calls[peer.name] = entry.call
        except Unavailable as error:
            reasons[peer.name] = str(error)
        except Exception as error:
            reasons[peer.name] = one_line(error)
    return calls, reasons


def _bound(problem: LinearProblem) -> float:
    """Wide: a peer may round more than once. A wrong block is off by far more."""
    return max(1e-4, 4 * problem.error_bound if problem.dtype != torch.float32 else 0.0)


def _error(problem: LinearProblem, pass_: str, got: Tensor) -> float:
    if pass_ == "forward":
        bias = 0.0 if problem.operands.bias is None else problem.operands.bias
        return problem.forward_error(got + bias)
    if pass_ in ("dgrad", "step"):  # of a step the gradient for x is looked at
        return problem.dgrad_error(got)
    want, absolute = problem.operands.wgrad_reference
    mask = problem.layout.mask()
    return relative_error(got * mask, want * mask, absolute * mask)
