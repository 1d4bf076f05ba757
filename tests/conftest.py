"""Fixtures and policies of the whole suite."""

from __future__ import annotations

import functools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Read when a kernel is defined: without a GPU, Triton's interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch.utils._device import _device_constructors

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# With xdist every worker would otherwise start a pool of all cores.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shard := os.environ.get(
        "SPARSEKERN_TEST_SHARD"
    ):  # "2/8": every eighth test, so that 8 processes compile at once
        which, of = map(int, shard.split("/"))
        items[:] = items[which - 1 :: of]
    for item in items:
        if item.get_closest_marker("gpu") and "cuda" not in DEVICES:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine in turn."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded CPU generator of the test's own."""
    return torch.Generator().manual_seed(1234)


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """A test that changes the number of threads, the default dtype or the grad mode changes it for itself alone."""
    yield
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data sets; skips where SPARSEKERN_DATA does not name one."""
    folder = os.environ.get("SPARSEKERN_DATA", "")
    if not Path(folder).is_dir() or not folder:
        pytest.skip("needs real data: set SPARSEKERN_DATA to its folder")
    return Path(folder)


def _poison(out: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if out.is_floating_point() or out.is_complex():
            return out.fill_(float("nan"))
        return out.fill_(True if out.dtype == torch.bool else -7 if out.dtype.is_signed else 77)


_poison_enabled = True


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        # While Dynamo traces, the condition is constant and only the plain call is seen.
        if torch.compiler.is_compiling() or not _poison_enabled:
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(out) if caller.partition(".")[0] == "sparsekern" else out

    return wrapper


# `with torch.device(...)` knows the allocating functions by identity: it must see the originals.
_device_constructors()
# For the whole run, not per test: Dynamo remembers torch's functions by identity.
for _owner, _names in (
    (torch, ("empty", "empty_like", "empty_strided")),
    (torch.Tensor, ("new_empty", "new_empty_strided")),
):
    for _name in _names:
        setattr(_owner, _name, _poisoning(getattr(_owner, _name)))


@pytest.fixture(autouse=True)
def _poisoned_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that the package allocates without initialising it holds NaN: an output left unwritten can't pass."""
    global _poison_enabled
    _poison_enabled = request.node.get_closest_marker("no_poison") is None
    yield
    _poison_enabled = True


@pytest.fixture
def one_thread():
    """For tiny layers, where a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cuda_precision() -> Iterator[Callable[[str], None]]:
    """Asks PyTorch for "ieee" or "tf32" float32 in matrix products and convolutions, for one test."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]

    def ask(precision: str) -> None:
        for switch in switches:
            switch.fp32_precision = precision

    yield ask
    for switch, setting in zip(switches, before, strict=True):
        switch.fp32_precision = setting
