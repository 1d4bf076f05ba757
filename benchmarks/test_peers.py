"""sparsekern and other sparse products on the same linear rows, interleaved with dense."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import machine, peers
from benchmarks.problems import linear_problem
from benchmarks.shapes import Case, LinearShape
from benchmarks.timing import CLOCK, Effort, Timer, race, speedup
from sparsekern.backends import forced


@pytest.mark.benchmark(timer=CLOCK)
def test_peers(
    peer_case: Case,
    benchmark: Any,
    timer: Timer,
    effort: Effort,
    with_threads: Callable[[int], None],
    device: str,
    dtype: torch.dtype,
    gpu_suite: bool,
) -> None:
    case = peer_case
    assert isinstance(case.shape, LinearShape)
    with_threads(case.threads)
    problem = linear_problem(case.shape, case.block, case.sparsity, device, dtype)
    calls, reasons = peers.ready(problem, case.pass_, peers.of_device(device, rehearse_gpu=gpu_suite))
    ours = problem.calls(case.pass_)
    contenders = {"dense": ours.dense, "sparse": ours.sparse, **calls}
    benchmark.group = f"peers {case.pass_}"
    neighbours = machine.Neighbours()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = race(benchmark, timer, contenders, hero="sparse", effort=effort)

    def result(name: str) -> dict[str, float]:
        ratio = speedup(times["dense"], times[name])
        return {"median_s": statistics.median(times[name]), **ratio, "of_ideal": ratio["speedup"] * problem.density}

    ratio = speedup(times["dense"], times["sparse"])
    benchmark.extra_info.update(
        kind="peers",
        op="linear",
        pass_=case.pass_,
        shape=case.shape.name,
        memory_format=case.memory_format,
        block=case.block,
        sparsity=case.sparsity,
        density=problem.density,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        mode=forced(),
        threads=case.threads,
        backend=problem.backend,
        dense_median_s=statistics.median(times["dense"]),
        sparse_median_s=statistics.median(times["sparse"]),
        **ratio,
        of_ideal=ratio["speedup"] * problem.density,
        peers={name: result(name) for name in calls},
        failed_peers=reasons,
        max_error=problem.error(case.pass_),
        neighbours=neighbours.cores(),
    )
    assert calls or reasons, f"expected at least one peer for {case.pass_}"
