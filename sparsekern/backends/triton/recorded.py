"""What the launches hand to the kernels, recorded instead of run: the compiler sees exactly what a GPU would.

The launches run on meta tensors with a driver that only names an architecture, and Triton's own binder turns their
arguments into a signature, constants and alignments. No second description of the kernels exists that could differ.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from sparsekern.backends import ConvGeometry
from sparsekern.backends.gpu.problem import Problem
from sparsekern.backends.triton.launch import block_scores, common, conv2d, conv2d_wgrad, linear, linear_wgrad
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid

SPLITS = 2  # token chunks of the recorded wgrad that has several

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Call:
    """One kernel as a launch asked for it.

    Attributes:
        kernel: its name.
        arguments: type by argument, "constexpr" for constants, as Triton's signature.
        constants: value by argument, those that specialisation found included.
        options: ``num_warps``, ``num_stages``, ... that the launch passed.
        source, target, compile_options: for ``triton.compile``.
    """

    kernel: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    source: Any
    target: Any
    compile_options: Any


def calls(problem: Problem, tile: Tile, arch: int) -> tuple[Call, ...]:
    """Kernels of one op at one tile on sm_``arch``; wgrad both with one and with several token chunks.

    Raises:
        RuntimeError: if Triton's interpreter is on: its kernels can't be compiled.
        ValueError: for an op that no launch here runs.
    """
    if problem.op not in _LAUNCHES:
        raise ValueError(f"op: expected one of {', '.join(_LAUNCHES)}, got {problem.op}")
    with _precision(problem.dtype), _recording(arch) as found:
        _LAUNCHES[problem.op](_Operands(problem), tile)
    return tuple(found)


class _Operands:
    """Tensors of a problem that have shapes, dtypes and aligned addresses, and no memory.

    A convolution has a square filter and strides, padding that keeps the size, and one image of ``Problem.source``
    pixels in a row per stride.
    """

    def __init__(self, problem: Problem) -> None:
        p = problem
        if p.kind == "linear":
            self.grid = BlockGrid((p.out_features, p.in_features), p.block)
            self.x, self.dy = self.floats(p, p.m, p.in_features), self.floats(p, p.m, p.out_features)
        else:
            edge, stride = math.isqrt(p.taps), math.isqrt(p.stride_area)
            self.geometry = ConvGeometry((stride, stride), (edge // 2,) * 4, (1, 1))
            self.grid = BlockGrid((p.out_features, p.in_features // p.groups, edge, edge), p.block, p.groups)
            height, width = stride, p.source // stride
            self.x = self.image(p, p.in_features, height, width)
            self.dy = self.image(p, p.out_features, *self.geometry.output_size(height, width, (edge, edge)))
        self.values, self.bias = self.floats(p, p.capacity, *p.block), self.floats(p, p.out_features)
        self.index = torch.empty(self.grid.index_size(p.capacity), dtype=torch.int32, device="meta")

    @staticmethod
    def floats(problem: Problem, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=_DTYPES[problem.dtype], device="meta")

    @classmethod
    def image(cls, problem: Problem, *shape: int) -> torch.Tensor:
        return cls.floats(problem, 1, *shape).contiguous(memory_format=torch.channels_last)


def _forward(t: _Operands, tile: Tile) -> None:
    linear.forward(t.x, t.values, t.index, t.bias, t.grid, tile)


def _dgrad(t: _Operands, tile: Tile) -> None:
    linear.dgrad(t.dy, t.values, t.index, t.grid, tile)


def _wgrad(t: _Operands, tile: Tile) -> None:
    for splits in (1, SPLITS):
        linear_wgrad.wgrad(t.dy, t.x, t.index, None, True, t.grid, tile, splits)


def _scores(t: _Operands, tile: Tile) -> None:
    block_scores.scores(t.dy, t.x, t.grid, tile)


def _conv_forward(t: _Operands, tile: Tile) -> None:
    conv2d.forward(t.x, t.values, t.index, t.bias, t.grid, t.geometry, tile)


def _conv_dgrad(t: _Operands, tile: Tile) -> None:
    conv2d.dgrad(t.dy, t.values, t.index, t.x.shape, t.grid, t.geometry, tile)


def _conv_wgrad(t: _Operands, tile: Tile) -> None:
    for splits in (1, SPLITS):
        conv2d_wgrad.wgrad(t.dy, t.x, t.index, None, True, t.grid, t.geometry, tile, splits)


def _conv_scores(t: _Operands, tile: Tile) -> None:
    block_scores.conv2d_scores(t.dy, t.x, t.grid, t.geometry, tile)


_LAUNCHES: dict[str, Callable[[_Operands, Tile], None]] = {
    "linear_forward": _forward,
    "linear_dgrad": _dgrad,
    "linear_wgrad": _wgrad,
    "block_scores": _scores,
    "conv2d_forward": _conv_forward,
    "conv2d_dgrad": _conv_dgrad,
    "conv2d_wgrad": _conv_wgrad,
    "conv2d_block_scores": _conv_scores,
}


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    """PyTorch's own switches between fp32 and TF32, which the launches read."""
    cudnn: Any = torch.backends.cudnn
    switches = torch.backends.cuda.matmul, cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        for switch, setting in zip(switches, before, strict=True):
            switch.fp32_precision = setting


@contextlib.contextmanager
def _recording(arch: int) -> Iterator[list[Call]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if common.interpreted():
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter's kernels can't be compiled, unset it")
    target, found = GPUTarget("cuda", arch, 32), []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        with _driver(target):
            *_, backend, binder = self.create_binder()
        given = dict(kwargs)
        kwargs["debug"] = False
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attrs = self._pack_args(backend, kwargs, bound, specialization, options)
        names = tuple(signature)
        found.append(
            Call(
                kernel=self.fn.__name__,
                arguments=dict(signature),
                constants={names[path[0]]: value for path, value in constants.items()},
                options={name: value for name, value in given.items() if name not in names},
                source=ASTSource(self, signature, constants, attrs),
                target=target,
                compile_options=options,
            )
        )

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def _driver(target: Any) -> Iterator[None]:
    """A driver that knows its architecture and nothing else."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    try:
        yield
    finally:
        driver._active = before
