"""The cuda backend on CPU tensors, kernels and all: csrc/cuda built for the host with the emulation of its primitives.

What tests/test_cuda_gpu.py checks on a GPU, at sizes that an emulation bears: Python's plans, the bindings, the host
code and the kernels together, on the packed layouts that layers have.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.backends import cuda
from sparsekern.backends.cuda import launch
from sparsekern.backends.gpu import passes

from . import cuda_checks, gpu_support
from .cuda_checks import GEOMETRIES, check_conv, check_linear, random_bits
from .gpu_support import draw, on_gpu
from .support import random_layout

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MODULE = """
#include "bindings_cuda.h"
PYBIND11_MODULE(sk_cuda_emulated, module) { sparsekern::cuda::define(module); }
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The module ``_C.cuda`` of a host build."""
    include = pytest.importorskip("pybind11").get_include()
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "module.cpp").write_text(MODULE)
    sources = [folder / "module.cpp", *(p for p in (ROOT / "csrc/cuda").iterdir() if p.suffix in (".cu", ".cpp"))]
    flags = ["-std=c++17", "-O2", "-fPIC", "-DSK_EMULATE", f"-I{include}", f"-I{sysconfig.get_path('include')}"]
    flags += [f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/emulation'}"]

    def compiled(source):
        made = folder / f"{source.name}.o"
        command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return str(made)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sorted(sources)))
    library = folder / "sk_cuda_emulated.so"
    subprocess.run([compiler, "-shared", "-o", str(library), *objects], check=True)
    spec = importlib.util.spec_from_file_location("sk_cuda_emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OnHost:
    """The module for tensors on the CPU, whose device has no number."""

    def __init__(self, module):
        self.module, self.calls = module, 0

    def __getattr__(self, name):
        found = getattr(self.module, name)
        if name not in ("stationary", "streamed", "wgrad"):
            return found

        def call(*arguments):
            self.calls += 1
            return found(*arguments[:-2], 0, arguments[-1])

        return call


@pytest.fixture(autouse=True)
def on_host(emulated, monkeypatch, cuda_precision):
    """CPU tensors, TF32 on, and of the plans one for each family, tile and splits or none."""
    module, every = OnHost(emulated), cuda_checks.listed
    remembered = (launch._product, launch._gradient, launch.problem_object, launch.plan_object)
    for function in remembered:
        function.cache_clear()

    def some(*facts):
        found = {}
        for plan in every(*facts):
            found.setdefault((plan.family, plan.tile, plan.splits > 1), plan)
        return list(found.values())

    cuda_precision("tf32")
    monkeypatch.setattr(launch, "kernels", lambda: module)
    monkeypatch.setattr(cuda_checks, "listed", some)
    monkeypatch.setattr(gpu_support, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    yield module
    for function in remembered:
        function.cache_clear()
    assert module.calls > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("block", [(16, 16), (32, 64), (64, 32), (128, 16), (16, 128)], ids=str)
def test_linear_plans(block, dtype):
    check_linear(on_gpu((150, 200), block, 0.4, seed=1, spare=2), 70, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
def test_ragged_linear_layers(dtype):
    check_linear(on_gpu((45, 37), (16, 32), 0.4, seed=2), 33, dtype, bias=False)
    for m in (0, 1):
        check_linear(on_gpu((48, 64), (32, 16), 0.5, seed=3), m, dtype)
    for density in (0.0, 1.0):
        check_linear(on_gpu((80, 100), (32, 32), density, seed=4, spare=1), 40, dtype)
    layout = on_gpu((72, 88), (16, 32), 0.4, seed=5, spare=2)
    check_linear(layout, 50, dtype, bits=random_bits(layout))


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
@pytest.mark.parametrize("which", GEOMETRIES)
def test_convolution_plans(which, dtype):
    weight, x_shape, geometry, groups = GEOMETRIES[which]
    if groups == 1:
        weight = (min(weight[0], 72), min(weight[1], 40), *weight[2:])
    x_shape = (min(x_shape[0], 3), weight[1] * groups, *x_shape[2:])
    layout = on_gpu(weight, (16, 32), 0.3, groups, seed=1, spare=2)
    check_conv(layout, x_shape, geometry, dtype, bias=which != "groups")


def test_a_wrong_value_is_seen(monkeypatch):
    """The checks compare what the kernels gave: one weight changed after the reference was made fails them."""
    layout = on_gpu((48, 64), (16, 16), 0.5, seed=3)
    original = type(layout).from_dense

    def changed(self, weight):
        values = original(self, weight).clone()
        values[0, 0, 0] += 1
        return values

    monkeypatch.setattr(type(layout), "from_dense", changed)
    with pytest.raises(AssertionError, match="y stationary plan"):
        check_linear(layout, 20, "bfloat16")


def test_layers_train_through_the_passes(on_host, monkeypatch):
    """A sparse layer's own forward and backward, by the backend's functions and its choice of plans."""
    monkeypatch.setattr(passes, "families", lambda desc, wish=None: ("cuda",))
    monkeypatch.setattr(passes, "forced", lambda: "cuda")
    monkeypatch.setattr("sparsekern.ops.select", lambda op, tensor, block: passes)
    passes._chosen.cache_clear()
    dense = nn.Conv2d(40, 48, 3, padding=1, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    layout = random_layout(sk.BlockLayout.from_mask(torch.ones(48, 40, 3, 3), 16).grid, 0.4)
    sparse = sk.SparseConv2d.from_dense(dense, layout.mask(), block=16)
    twin = sparse.to_dense()
    x = draw(2, 40, 7, 6, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = draw(2, 48, 7, 6, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    y, y_dense = sparse(x), twin(x)
    torch.testing.assert_close(y, y_dense, rtol=2e-2, atol=2e-2)
    dx, dvalues = torch.autograd.grad(y, [x, sparse.values], dy)
    dx_dense, dw = torch.autograd.grad(y_dense, [x, twin.weight], dy)
    torch.testing.assert_close(dx, dx_dense, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(layout.to_dense(dvalues), dw * sparse.mask, rtol=5e-2, atol=0.2)
    assert on_host.calls == 3
    passes._chosen.cache_clear()


def test_equal_bits_twice():
    layout = on_gpu((100, 90), (16, 32), 0.4, seed=1)
    x, dy = draw(60, 90, dtype=torch.bfloat16), draw(60, 100, dtype=torch.bfloat16)
    for plan in cuda_checks.listed("wgrad", x.dtype, layout, None, x.shape):
        one, other = (cuda.wgrad(dy, x, layout.index, None, True, layout.grid, None, plan) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
