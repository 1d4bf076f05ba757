"""Operands of one row and the calls that are timed: dense twin and sparse operator on the same tensors.

Correctness is measured on the timed operands: max |error| against float64 of the same rounded operands, relative to the
same product of absolute values. A sound float32 kernel keeps it below 1e-5 whatever the cancellation; one that
accumulates in float32 and rounds once to a 16-bit result adds that rounding, 2^-8 for bfloat16 and 2^-11 for float16.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as dense_grad

import sparsekern as sk
from benchmarks.shapes import ConvShape, LinearShape
from sparsekern.backends import choice
from sparsekern.layout import BlockGrid, BlockLayout, as_block

ERROR_BOUND = 1e-5  # float32
_TOKENS_CHECKED = 64
_IMAGES_CHECKED = 1


def error_bound(dtype: torch.dtype) -> float:
    """The largest relative error a sound kernel of this dtype makes: float32 accumulation, one final rounding.

    Triton's interpreter cuts bfloat16 off where a GPU rounds (3.6 and 3.9), twice the error.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return ERROR_BOUND
    cut = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return ERROR_BOUND + torch.finfo(dtype).eps / (1 if cut else 2)


def random_layout(
    weight_shape: tuple[int, ...], block: int, sparsity: int, device: str | torch.device = "cpu"
) -> BlockLayout:
    """A layout with the exact number of blocks drawn at random, at least one; the same on every device.

    Args:
        weight_shape: ``(O, I)`` or ``(O, C, R, S)``.
        block: edge of the square blocks.
        sparsity: percent of the blocks left out.
    """
    grid = BlockGrid(weight_shape, as_block(block))
    generator = torch.Generator().manual_seed(block * 1000 + sparsity)
    keep = max(1, round(grid.blocks * (100 - sparsity) / 100))
    mask = torch.zeros(grid.blocks, dtype=torch.bool)
    mask[torch.randperm(grid.blocks, generator=generator)[:keep]] = True
    return BlockLayout.from_block_mask(grid, mask.to(device))


def relative_error(got: Tensor, want: Tensor, absolute: Tensor) -> float:
    """max |got - want| / absolute, where ``want`` and ``absolute`` are float64; 0/0 counts as 0."""
    difference = (got.double() - want).abs()
    return float((difference / absolute.clamp_min(torch.finfo(torch.float32).tiny)).max())


@dataclass(frozen=True)
class Calls:
    """The two contenders of a row."""

    dense: Callable[[], object]
    sparse: Callable[[], object]


class LinearOperands:
    """Random x [M, I], dy [M, O], w [O, I], bias [O] of one shape; the same on every run and device."""

    def __init__(self, shape: LinearShape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

        self.shape = shape
        self.x = draw(shape.m, shape.i)
        self.dy = draw(shape.m, shape.o)
        self.weight = draw(shape.o, shape.i, scale=shape.i**-0.5)
        self.bias = draw(shape.o) if shape.bias else None

    @functools.cached_property
    def wgrad_reference(self) -> tuple[Tensor, Tensor]:
        """float64 weight gradient [O, I] and the product of absolute values; no mask enters it."""
        x, dy = self.x.double(), self.dy.double()
        return dy.t() @ x, dy.abs().t() @ x.abs()


class ConvOperands:
    """Random x [N, C, H, W], dy [N, O, P, Q], w [O, C, R, S] in one memory format; the same on every run."""

    def __init__(
        self, shape: ConvShape, memory_format: str, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        fmt = torch.channels_last if memory_format == "nhwc" else torch.contiguous_format

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

        self.shape = shape
        self.channels_last = memory_format == "nhwc"
        fan_in = shape.c * shape.r * shape.r
        self.x = draw(shape.n, shape.c, shape.h, shape.h).contiguous(memory_format=fmt)
        self.dy = draw(shape.n, shape.o, shape.p, shape.p).contiguous(memory_format=fmt)
        self.weight = draw(shape.o, shape.c, shape.r, shape.r, scale=fan_in**-0.5).contiguous(memory_format=fmt)
        self.bias = draw(shape.o) if shape.bias else None

    @functools.cached_property
    def wgrad_reference(self) -> tuple[Tensor, Tensor]:
        """float64 weight gradient [O, C, R, S] and the product of absolute values; no mask enters it."""
        x, dy = self.x.double().contiguous(), self.dy.double().contiguous()
        size, options = self.weight.shape, {"stride": self.shape.stride, "padding": self.shape.padding}
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):  # no search for a product that runs once
            return (
                dense_grad.conv2d_weight(x, size, dy, **options),
                dense_grad.conv2d_weight(x.abs(), size, dy.abs(), **options),
            )


@functools.lru_cache(maxsize=1)
def linear_operands(shape: LinearShape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LinearOperands:
    return LinearOperands(shape, device, dtype)


@functools.lru_cache(maxsize=1)
def conv_operands(
    shape: ConvShape, memory_format: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ConvOperands:
    return ConvOperands(shape, memory_format, device, dtype)


class Problem:
    """One layer at one block and sparsity: its contenders per pass, its error, its size."""

    op: str

    def __init__(self, operands: Any, block: int, sparsity: int) -> None:
        self.operands = operands
        self.shape = operands.shape
        self.layout = random_layout(tuple(operands.weight.shape), block, sparsity, operands.weight.device)
        self.values = self.layout.from_dense(operands.weight)
        self.block = block

    @property
    def backend(self) -> str:
        """Name of the backend that runs; on a GPU of the first family of kernels, of which each pass has its own."""
        return choice(self.op, self.device, self.dtype, self.layout.grid.block)

    @property
    def device(self) -> str:
        return str(self.operands.x.device.type)

    @property
    def dtype(self) -> torch.dtype:
        return self.operands.x.dtype

    @property
    def error_bound(self) -> float:
        return error_bound(self.dtype)

    @property
    def density(self) -> float:
        """Weights stored over weights of the dense layer. Padding of edge blocks is not counted."""
        return float(self.layout.mask().double().mean())

    def flops(self, pass_: str) -> float:
        """Floating-point operations on stored weights; a step is all three passes."""
        return 2.0 * self.shape.macs * self.density * (3 if pass_ == "step" else 1)

    def bytes_moved(self, pass_: str) -> float:
        """Lower bound of the memory traffic: every operand of the sparse pass read or written once."""
        x, dy, values = (t.numel() * t.element_size() for t in (self.operands.x, self.operands.dy, self.values))
        index = self.layout.index.numel() * self.layout.index.element_size()
        one_pass = float(x + dy + values + index)
        return one_pass * 3 if pass_ == "step" else one_pass

    def calls(self, pass_: str) -> Calls:
        if pass_ == "step":
            return self.step()
        return {"forward": self.forward, "dgrad": self.dgrad, "wgrad": self.wgrad}[pass_]()

    def forward(self) -> Calls:
        raise NotImplementedError

    def dgrad(self) -> Calls:
        raise NotImplementedError

    def wgrad(self) -> Calls:
        raise NotImplementedError

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """The dense module and its sparse twin."""
        raise NotImplementedError

    def error(self, pass_: str) -> float:
        """Largest relative error of the sparse pass, see :func:`relative_error`; of a step the worst of its tensors."""
        raise NotImplementedError

    def step(self) -> Calls:
        """Forward and backward through the modules, autograd included, gradients for x, weight and bias."""
        x, dy = self.operands.x.detach().clone().requires_grad_(), self.operands.dy
        dense, sparse = self.modules()

        def run(module: nn.Module) -> object:
            x.grad = None
            for parameter in module.parameters():
                parameter.grad = None
            module(x).backward(dy)
            return x.grad

        return Calls(functools.partial(run, dense), functools.partial(run, sparse))

    def step_outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """y, dx and dvalues of one step through the sparse module."""
        x = self.operands.x.detach().clone().requires_grad_()
        module = self.modules()[1]
        y = module(x)
        y.backward(self.operands.dy)
        assert x.grad is not None and isinstance(module.values, Tensor) and module.values.grad is not None
        return y.detach(), x.grad, module.values.grad

    def wgrad_error(self, dvalues: Tensor) -> float:
        want, absolute = self.operands.wgrad_reference
        layout = self.layout
        got, mask = layout.to_dense(dvalues), layout.mask()
        return relative_error(got, want * mask, absolute * mask)


class LinearProblem(Problem):
    """``nn.Linear`` against ``SparseLinear``."""

    op = "linear"
    operands: LinearOperands

    def forward(self) -> Calls:
        o, ops = self.operands, torch.ops.sparsekern
        values, index, out = self.values, self.layout.index, self.shape.o
        return Calls(lambda: F.linear(o.x, o.weight, o.bias), lambda: ops.linear(o.x, values, index, o.bias, out))

    def dgrad(self) -> Calls:
        o, ops = self.operands, torch.ops.sparsekern
        values, index, width = self.values, self.layout.index, self.shape.i
        return Calls(lambda: o.dy @ o.weight, lambda: ops.linear_dgrad(o.dy, values, index, width))

    def wgrad(self) -> Calls:
        o, ops = self.operands, torch.ops.sparsekern
        index, (capacity, bo, bi), bias = self.layout.index, self.values.shape, o.bias is not None

        def dense() -> object:
            return o.dy.t() @ o.x, o.dy.sum(0) if bias else None

        return Calls(dense, lambda: ops.linear_wgrad(o.dy, o.x, index, capacity, bo, bi, bias))

    def modules(self) -> tuple[nn.Module, nn.Module]:
        o = self.operands
        dense = nn.Linear(self.shape.i, self.shape.o, bias=o.bias is not None, device=o.x.device, dtype=o.x.dtype)
        with torch.no_grad():
            dense.weight.copy_(o.weight)
            if o.bias is not None:
                dense.bias.copy_(o.bias)
        return dense, sk.SparseLinear.from_dense(dense, self.layout.mask(), block=self.block)

    def error(self, pass_: str) -> float:
        if pass_ == "step":
            y, dx, dvalues = self.step_outputs()
            return max(self.forward_error(y), self.dgrad_error(dx), self.wgrad_error(dvalues))
        out = self.calls(pass_).sparse()
        if pass_ == "wgrad":
            assert isinstance(out, tuple)
            dvalues, dbias = out
            dy = self.operands.dy.double()
            bias = relative_error(dbias, dy.sum(0), dy.abs().sum(0)) if self.operands.bias is not None else 0.0
            return max(self.wgrad_error(dvalues), bias)
        assert isinstance(out, Tensor)
        return self.forward_error(out) if pass_ == "forward" else self.dgrad_error(out)

    def rows_checked(self) -> Tensor:
        rows = torch.linspace(0, self.shape.m - 1, min(_TOKENS_CHECKED, self.shape.m)).long()
        return rows.to(self.operands.x.device)

    def forward_error(self, y: Tensor) -> float:
        rows = self.rows_checked()
        x, w = self.operands.x[rows].double(), self.layout.to_dense(self.values).double()
        bias = x.new_zeros(self.shape.o) if self.operands.bias is None else self.operands.bias.double()
        return relative_error(y[rows], F.linear(x, w, bias), F.linear(x.abs(), w.abs(), bias.abs()))

    def dgrad_error(self, dx: Tensor) -> float:
        rows = self.rows_checked()
        dy, w = self.operands.dy[rows].double(), self.layout.to_dense(self.values).double()
        return relative_error(dx[rows], dy @ w, dy.abs() @ w.abs())


class ConvProblem(Problem):
    """``nn.Conv2d`` against ``SparseConv2d``."""

    op = "conv2d"
    operands: ConvOperands

    def _geometry(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        """kernel_size, stride, padding on four sides, dilation, groups."""
        s = self.shape
        return [s.r, s.r], [s.stride] * 2, [s.padding] * 4, [1, 1], 1

    def _dense_backward(self, output_mask: list[bool]) -> Callable[[], object]:
        o, s = self.operands, self.shape
        sizes = [s.o] if o.bias is not None else None
        stride, padding = [s.stride] * 2, [s.padding] * 2
        return lambda: torch.ops.aten.convolution_backward(
            o.dy, o.x, o.weight, sizes, stride, padding, [1, 1], False, [0, 0], 1, output_mask
        )

    def forward(self) -> Calls:
        o, s, ops, geometry = self.operands, self.shape, torch.ops.sparsekern, self._geometry()
        values, index = self.values, self.layout.index
        return Calls(
            lambda: F.conv2d(o.x, o.weight, o.bias, s.stride, s.padding),
            lambda: ops.conv2d(o.x, values, index, o.bias, s.o, *geometry),
        )

    def dgrad(self) -> Calls:
        o, ops, geometry = self.operands, torch.ops.sparsekern, self._geometry()
        values, index, size, channels_last = self.values, self.layout.index, list(o.x.shape), o.channels_last
        return Calls(
            self._dense_backward([True, False, False]),
            lambda: ops.conv2d_dgrad(o.dy, values, index, size, channels_last, *geometry),
        )

    def wgrad(self) -> Calls:
        o, ops, geometry = self.operands, torch.ops.sparsekern, self._geometry()
        index, (capacity, bo, bi), bias = self.layout.index, self.values.shape, o.bias is not None
        return Calls(
            self._dense_backward([False, True, bias]),
            lambda: ops.conv2d_wgrad(o.dy, o.x, index, capacity, bo, bi, *geometry, bias),
        )

    def modules(self) -> tuple[nn.Module, nn.Module]:
        o, s = self.operands, self.shape
        options: dict[str, Any] = {"bias": o.bias is not None, "device": o.x.device, "dtype": o.x.dtype}
        dense = nn.Conv2d(s.c, s.o, s.r, s.stride, s.padding, **options)
        if o.channels_last:
            dense = dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            dense.weight.copy_(o.weight)
            if o.bias is not None:
                dense.bias.copy_(o.bias)  # type: ignore[union-attr]
        return dense, sk.SparseConv2d.from_dense(dense, self.layout.mask(), block=self.block)

    def error(self, pass_: str) -> float:
        if pass_ == "step":
            y, dx, dvalues = self.step_outputs()
            return max(self.forward_error(y), self.dgrad_error(dx), self.wgrad_error(dvalues))
        out = self.calls(pass_).sparse()
        if pass_ == "wgrad":
            assert isinstance(out, tuple)
            dvalues, dbias = out
            dy = self.operands.dy.double()
            bias = 0.0
            if self.operands.bias is not None:
                bias = relative_error(dbias, dy.sum((0, 2, 3)), dy.abs().sum((0, 2, 3)))
            return max(self.wgrad_error(dvalues), bias)
        assert isinstance(out, Tensor)
        return self.forward_error(out) if pass_ == "forward" else self.dgrad_error(out)

    def forward_error(self, y: Tensor) -> float:
        o, s = self.operands, self.shape
        x, w = o.x[-_IMAGES_CHECKED:].double().contiguous(), self.layout.to_dense(self.values).double().contiguous()
        bias = x.new_zeros(s.o) if o.bias is None else o.bias.double()
        want = F.conv2d(x, w, bias, s.stride, s.padding)
        return relative_error(y[-_IMAGES_CHECKED:], want, F.conv2d(x.abs(), w.abs(), bias.abs(), s.stride, s.padding))

    def dgrad_error(self, dx: Tensor) -> float:
        o, s = self.operands, self.shape
        dy, w = o.dy[-_IMAGES_CHECKED:].double().contiguous(), self.layout.to_dense(self.values).double().contiguous()
        size = dy.shape[0], s.c, s.h, s.h
        want = dense_grad.conv2d_input(size, w, dy, s.stride, s.padding)
        absolute = dense_grad.conv2d_input(size, w.abs(), dy.abs(), s.stride, s.padding)
        return relative_error(dx[-_IMAGES_CHECKED:], want, absolute)


@functools.lru_cache(maxsize=1)
def linear_problem(
    shape: LinearShape, block: int, sparsity: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LinearProblem:
    return LinearProblem(linear_operands(shape, device, dtype), block, sparsity)


@functools.lru_cache(maxsize=1)
def conv_problem(
    shape: ConvShape,
    memory_format: str,
    block: int,
    sparsity: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ConvProblem:
    return ConvProblem(conv_operands(shape, memory_format, device, dtype), block, sparsity)
