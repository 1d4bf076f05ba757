"""Backends: who computes an operator, and why.

A backend is a module with the functions of :class:`Backend`. The choice depends on static facts alone (device, dtype,
block), never on layout contents, so it costs no host sync and no recompile. ``SPARSEKERN_BACKEND`` forces one; a forced
backend that can't do an operator raises and never falls back.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsekern.layout import BlockGrid

NAMES = ("cpu", "triton", "dense")  # in order of preference


@dataclass(frozen=True)
class OpDesc:
    """What a backend is asked to do: ``op`` is "linear" or "conv2d"."""

    op: str
    device: str
    dtype: torch.dtype
    block: tuple[int, int]


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
    return os.environ.get("SPARSEKERN_BACKEND", "auto") or "auto"


def candidates(desc: OpDesc) -> list[tuple[str, str | None]]:
    """Every backend with the reason why it can't do ``desc`` (None: it can)."""
    return [(name, get(name).unsupported(desc)) for name in NAMES]


@functools.lru_cache(maxsize=1024)
def _select(desc: OpDesc, wish: str) -> Any:
    if wish == "auto":
        return next(get(name) for name, reason in candidates(desc) if reason is None)
    backend = get(wish)
    reason = backend.unsupported(desc)
    if reason is not None:
        raise RuntimeError(
            f"SPARSEKERN_BACKEND={wish}: can't do {desc.op} on {desc.device} in {desc.dtype}: {reason}; "
            "unset it to let sparsekern choose"
        )
    return backend


def select(op: str, tensor: Tensor, block: tuple[int, int]) -> Any:
    """The backend for ``op`` on ``tensor``'s device and dtype."""
    return _select(OpDesc(op, tensor.device.type, tensor.dtype, block), forced())


def backends() -> dict[str, str]:
    """What is there on this machine: {backend: "available" or why not}."""
    out = {}
    for name in NAMES:
        device = "cuda" if name in ("triton", "cuda") else "cpu"
        reason = get(name).unsupported(OpDesc("linear", device, torch.float32, (32, 32)))
        out[name] = reason or "available"
    return out


def choice(op: str, device: str, dtype: torch.dtype, block: tuple[int, int]) -> str:
    """Name of the backend that runs ``op``; "dense" for devices without kernels."""
    return _select(OpDesc(op, device, dtype, block), forced()).__name__.rpartition(".")[2]
