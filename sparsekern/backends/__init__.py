"""Backends: who computes an operator, and why.

A backend is a module with ``unsupported(desc)`` and the functions of :class:`Backend`. Those of a GPU are families of
kernels (:mod:`sparsekern.backends.gpu.families`), and their functions are in :mod:`sparsekern.backends.gpu.passes`,
which chooses a kernel for each pass. The choice depends on static facts alone (device, dtype, shapes, block), never on
layout contents, so it costs no host sync and no recompile. ``SPARSEKERN_BACKEND`` forces one; a forced backend that
can't do an operator raises and never falls back.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsekern.layout import BlockGrid

NAMES = ("cpu", "triton", "cuda", "dense")  # in order of preference
GPU = ("triton", "cuda")  # families of kernels that one module dispatches to
AUTO = "auto"


def precision(dtype: torch.dtype, kind: str = "linear") -> str:
    """Name of a dtype as kernels on a GPU compute in it: float32 is "tf32" where PyTorch's own switch says so.

    Matrix products (``kind`` "linear") and convolutions ("conv2d") have switches of their own, and cuDNN's is on by
    default.
    """
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    cudnn: Any = torch.backends.cudnn
    old: Any = cudnn if kind == "conv2d" else torch.backends.cuda.matmul
    switch = getattr(cudnn, "conv", None) if kind == "conv2d" else old
    # Since torch 2.9 reading allow_tf32 raises once the newer setting was used.
    wish = getattr(switch, "fp32_precision", None)
    return "tf32" if (wish == "tf32" if wish is not None else old.allow_tf32) else "float32"


@dataclass(frozen=True)
class OpDesc:
    """What a backend is asked to do.

    Attributes:
        op: "linear" or "conv2d".
        tf32: whether PyTorch's switch lets float32 be rounded to TF32 on this device; follows from the switch.
    """

    op: str
    device: str
    dtype: torch.dtype
    block: tuple[int, int]
    tf32: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.dtype is torch.float32 and self.device == "cuda":
            object.__setattr__(self, "tf32", precision(self.dtype, self.op) == "tf32")


@dataclass(frozen=True)
class ConvGeometry:
    """Static geometry of one convolution; ``padding`` is (top, bottom, left, right)."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    def output_size(self, height: int, width: int, kernel_size: tuple[int, int]) -> tuple[int, int]:
        """``(P, Q)`` of an input of ``height x width``."""
        top, bottom, left, right = self.padding
        (r, s), (sh, sw), (dh, dw) = kernel_size, self.stride, self.dilation
        return (height + top + bottom - dh * (r - 1) - 1) // sh + 1, (width + left + right - dw * (s - 1) - 1) // sw + 1


class Backend(Protocol):
    """The functions of a backend module. ``grid`` and ``geometry`` are static, ``index`` is the packed layout.

    A module may set ``WANTS_CHANNELS_LAST``: images of any other memory format are then converted before the operator.
    """

    def unsupported(self, desc: OpDesc) -> str | None:
        """Why this backend can't do ``desc``, or None."""

    def linear_forward(self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid) -> Tensor:
        """x [M, I] -> y [M, O]."""

    def linear_dgrad(self, dy: Tensor, values: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
        """dy [M, O] -> dx [M, I]."""

    def linear_wgrad(
        self, dy: Tensor, x: Tensor, index: Tensor, element_mask: Tensor | None, with_bias: bool, grid: BlockGrid
    ) -> tuple[Tensor, Tensor]:
        """dy [M, O], x [M, I] -> dvalues [capacity, bo, bi], dbias [O] ([0] without bias)."""

    def block_scores(self, dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
        """dy [M, O], x [M, I] -> float32 [Ob, Ib], norms of the blocks of dy^T x; -inf where a block is stored."""

    def conv2d_forward(
        self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid, geometry: ConvGeometry
    ) -> Tensor:
        """x [N, C, H, W] -> y [N, O, P, Q], both dense in x's memory format."""

    def conv2d_dgrad(
        self,
        dy: Tensor,
        values: Tensor,
        index: Tensor,
        input_shape: tuple[int, ...],
        channels_last: bool,
        grid: BlockGrid,
        geometry: ConvGeometry,
    ) -> Tensor:
        """dy [N, O, P, Q] -> dx of ``input_shape``, dense in the memory format asked for."""

    def conv2d_wgrad(
        self,
        dy: Tensor,
        x: Tensor,
        index: Tensor,
        element_mask: Tensor | None,
        with_bias: bool,
        grid: BlockGrid,
        geometry: ConvGeometry,
    ) -> tuple[Tensor, Tensor]:
        """dy [N, O, P, Q], x [N, C, H, W] in one memory format -> dvalues [capacity, bo, bi], dbias [O] or [0]."""

    def conv2d_block_scores(
        self, dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid, geometry: ConvGeometry
    ) -> Tensor:
        """dy [N, O, P, Q], x [N, C, H, W] -> float32 [G, Ob, T, Ib], as ``block_scores``."""


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, C, H, W] counts as channels_last: dense in that order and not in N, C, H, W too."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def get(name: str) -> Any:
    """The backend module of this name; raises ``ValueError`` for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"sparsekern.backends.{name}")


def forced() -> str:
    """The value of ``SPARSEKERN_BACKEND``, "auto" if unset."""
    return os.environ.get("SPARSEKERN_BACKEND", AUTO) or AUTO


def candidates(desc: OpDesc) -> list[tuple[str, str | None]]:
    """Every backend with the reason why it can't do ``desc`` (None: it can)."""
    return [(name, get(name).unsupported(desc)) for name in NAMES]


@functools.lru_cache(maxsize=1024)
def _select(desc: OpDesc, wish: str) -> str:
    if wish == AUTO:
        return next(name for name, reason in candidates(desc) if reason is None)
    reason = get(wish).unsupported(desc)
    if reason is not None:
        raise RuntimeError(
            f"SPARSEKERN_BACKEND={wish}: can't do {desc.op} on {desc.device} in {desc.dtype}: {reason}; "
            "unset it to let sparsekern choose"
        )
    return wish


@functools.lru_cache(maxsize=1024)
def _module(desc: OpDesc, wish: str) -> Any:
    name = _select(desc, wish)
    return importlib.import_module("sparsekern.backends.gpu.passes") if name in GPU else get(name)


def select(op: str, tensor: Tensor, block: tuple[int, int]) -> Any:
    """The module with the functions of :class:`Backend` that runs ``op`` on ``tensor``'s device and dtype."""
    return _module(OpDesc(op, tensor.device.type, tensor.dtype, block), forced())


def families(desc: OpDesc, wish: str | None = None) -> tuple[str, ...]:
    """Families of GPU kernels that may run ``desc``, in order of preference; the forced one alone if one is.

    Args:
        wish: instead of :func:`forced`.
    """
    return _families(desc, forced() if wish is None else wish)


@functools.lru_cache(maxsize=1024)
def _families(desc: OpDesc, wish: str) -> tuple[str, ...]:
    return tuple(name for name in GPU if wish in (AUTO, name) and get(name).unsupported(desc) is None)


def backends() -> dict[str, str]:
    """What is there on this machine: {backend: "available" or why not}."""
    out = {}
    for name in NAMES:
        device, dtype = ("cuda", torch.bfloat16) if name in GPU else ("cpu", torch.float32)
        out[name] = get(name).unsupported(OpDesc("linear", device, dtype, (32, 32))) or "available"
    return out


def choice(op: str, device: str, dtype: torch.dtype, block: tuple[int, int]) -> str:
    """Name of the backend that runs ``op``; "dense" for devices without kernels.

    On a GPU the first family of kernels that can run it; which of them runs a pass also depends on shapes.
    """
    return _select(OpDesc(op, device, dtype, block), forced())
