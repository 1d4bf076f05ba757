"""Where the time of a step goes: device time by kind of kernel, from torch.profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType

CONVOLUTIONS, NORMS, ACTIVATIONS = "convolutions", "norms", "activations"
OPTIMIZER, COPIES, OTHER = "optimizer", "copies and casts", "other"
# The first pattern that a name matches decides. Inductor's kernels begin with triton_ and list the ops they fuse.
_KINDS = (
    (OPTIMIZER, r"multi_tensor_apply|fused_?sgd|fused_?adam|_foreach_|optimizer"),
    (NORMS, r"batch_?norm|(?<![a-z])bn_|layer_?norm|group_?norm|welford"),
    (
        COPIES,
        r"^triton_\w*_to_copy(?!.*(relu|add))|nchwtonhwc|nhwctonchw|memcpy|memset|copy_kernel|aten::(copy_|_to_copy|to$)",
    ),
    (ACTIVATIONS, r"^triton_\w*(relu|threshold|add|where|max_pool|avg_pool|mean)"),
    (
        CONVOLUTIONS,
        r"conv|fprop|dgrad|wgrad|implicit_gemm|gemm|cutlass|nvjet|xmma|winograd|cudnn|splitk|"
        r"linear_(gather|tma|union|wgrad)|sum_chunks|aten::(mm|addmm|bmm|linear)|sparsekern::|_linear|mkldnn|onednn",
    ),
    (ACTIVATIONS, r"relu|threshold|clamp_min|pool|functor_add|add_|aten::add|gelu|mean"),
    (COPIES, r"copy|catarray|transpose|fill"),
)
_COMPILED = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _KINDS)
_ANNOTATIONS = ("ProfilerStep", "Optimizer.", "## Call", "Torch-Compiled", "CompiledF", "AOTDispatcher")


def kind_of(kernel: str) -> str:
    """The kind of a kernel (on a CPU: of an operator) by its name."""
    return next((kind for kind, pattern in _COMPILED if pattern.search(kernel)), OTHER)


def summed(events: Iterable[Any], steps: int) -> dict[str, float]:
    """Seconds per step of the kernels among profiler events, by kind, the largest first."""
    totals: dict[str, float] = {}
    for event in events:
        on_device = event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        if on_device and not event.name.startswith(_ANNOTATIONS):
            kind = kind_of(event.name)
            totals[kind] = totals.get(kind, 0.0) + event.time_range.elapsed_us() / 1e6 / steps
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _host(averages: Iterable[Any], steps: int) -> dict[str, float]:
    """The same from operators on a CPU, their own time."""
    totals: dict[str, float] = {}
    for average in averages:
        kind = kind_of(average.key)
        totals[kind] = totals.get(kind, 0.0) + average.self_cpu_time_total / 1e6 / steps
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def parts_of(call: Callable[[], object], device: str, steps: int = 3) -> dict[str, float]:
    """Seconds per call of each kind of kernel; empty where the profiler sees no kernel."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(steps):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    return summed(profile.events(), steps) if device == "cuda" else _host(profile.key_averages(), steps)


def amdahl(parts: dict[str, float], macs_left: float) -> float | None:
    """Speed-up over a dense net whose convolutions take ``macs_left`` of their time and all else stays.

    Args:
        parts: of the dense net.
        macs_left: the sparse net's multiply-accumulates over the dense net's.
    """
    total, products = sum(parts.values()), parts.get(CONVOLUTIONS, 0.0)
    return total / (total - products * (1 - macs_left)) if total > 0 else None
