"""Kernels in CUDA C++ (csrc/cuda) on NVIDIA GPUs of compute capability 8.0 and later, where they were built.

bfloat16, float16, and float32 where PyTorch's switch allows TF32. The functions are those of
:class:`sparsekern.backends.gpu.families.Family`.
"""

from __future__ import annotations

import functools

import torch

from sparsekern.backends import OpDesc, native
from sparsekern.backends.cuda import model, plans
from sparsekern.backends.cuda.launch import dgrad, forward, wgrad
from sparsekern.backends.cuda.plan import Plan
from sparsekern.backends.gpu.chips import Chip
from sparsekern.backends.gpu.problem import Problem

__all__ = ("candidates", "dgrad", "forward", "seconds", "unsupported", "wgrad", "why_not")

WANTS_CHANNELS_LAST = True
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_PLANS = 16
BUILD = "SPARSEKERN_BUILD=cuda pip install --force-reinstall --no-deps sparsekern (needs nvcc)"


def unsupported(desc: OpDesc) -> str | None:
    if not native.available():
        return f"{native.why()}; {BUILD}"
    if not hasattr(native.load(), "cuda"):
        return f"the native core was built without CUDA kernels; {BUILD}"
    if desc.device != "cuda":
        return f"expected tensors on a GPU, got {desc.device}"
    if torch.version.hip is not None:
        return "expected an NVIDIA GPU, got one of AMD"
    if not torch.cuda.is_available():
        return "no usable GPU or driver"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"expected compute capability 8.0 or later, got {capability[0]}.{capability[1]}"
    built = str(native.build_info().get("cuda_archs", ""))
    if not native.cuda_image(built, capability):
        number = f"{capability[0]}.{capability[1]}"
        return f"built for {built or 'no architecture'}, this GPU is {number}; TORCH_CUDA_ARCH_LIST={number} {BUILD}"
    if desc.op not in ("linear", "conv2d"):
        return f"no kernel for {desc.op}"
    if desc.dtype not in DTYPES:
        return f"expected bfloat16, float16 or float32, got {desc.dtype}"
    if desc.dtype is torch.float32 and not desc.tf32:
        switch = "cudnn.conv" if desc.op == "conv2d" else "cuda.matmul"
        return f'float32 is computed in TF32 only; torch.backends.{switch}.fp32_precision = "tf32" allows it'
    if not set(desc.block) <= set(plans.EDGES):
        edges = ", ".join(map(str, plans.EDGES))
        return f"expected block edges among {edges}, got {desc.block[0]}x{desc.block[1]}"
    return None


@functools.lru_cache(maxsize=1024)
def candidates(problem: Problem, chip: Chip) -> tuple[Plan, ...]:
    """Those that the model predicts to be fastest, first; more would only make tuning longer."""
    listed = plans.candidates(problem, chip)
    return tuple(sorted(listed, key=lambda plan: model.seconds(problem, plan, chip))[:MOST_PLANS])


def why_not(problem: Problem, kernel: Plan, chip: Chip) -> str | None:
    return plans.why_not(problem, kernel, chip)


def seconds(problem: Problem, kernel: Plan, chip: Chip) -> float:
    return model.seconds(problem, kernel, chip)
