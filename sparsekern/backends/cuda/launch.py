"""Calls of the CUDA kernels: operands made fit, outputs allocated, addresses handed over.

All facts but addresses are static for a layer at one input size, so the objects that hold them are remembered, and a
call costs a few microseconds. Work is queued on the current stream of the operands' device: as with any operator of
PyTorch, tensors used on another stream are the caller's to synchronise.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparsekern.backends import ConvGeometry, native, precision
from sparsekern.backends.cuda.plan import Plan
from sparsekern.backends.cuda.plans import unfit, window_of
from sparsekern.backends.gpu.problem import Problem, layer_problem
from sparsekern.layout import BlockGrid, capacity_of

ALIGNMENT = 16  # bytes, of values and of what wgrad writes
MASK_ALIGNMENT = 4


def kernels() -> Any:
    """The module ``sparsekern._C.cuda``."""
    return native.load().cuda


@functools.lru_cache(maxsize=8192)
def problem_object(problem: Problem) -> Any:
    """The C++ twin of ``problem``.

    Raises:
        ValueError: no CUDA kernel runs it.
    """
    if (reason := unfit(problem)) is not None:
        raise ValueError(f"{problem.op}: {reason}")
    window = window_of(problem)
    assert window is not None
    return kernels().Problem(
        problem.dtype,
        problem.groups,
        *problem.block,
        problem.capacity,
        window.images,
        problem.in_features,
        window.height,
        window.width,
        problem.out_features,
        *window.out,
        *window.kernel,
        *window.stride,
        *window.padding,
        *window.dilation,
    )


@functools.lru_cache(maxsize=1024)
def plan_object(plan: Plan) -> Any:
    """The C++ twin of ``plan``."""
    cut = (*plan.tile, plan.warps, plan.stages, plan.splits)
    if plan.family == "wgrad":
        return kernels().WgradPlan(plan.rows, plan.cols, *cut)
    return kernels().ProductPlan(plan.bm, *cut)


@functools.lru_cache(maxsize=8192)
def _product(
    step: str,
    dtype: torch.dtype,
    number: str,
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    x_shape: tuple[int, ...],
    capacity: int,
    plan: Plan,
) -> functools.partial[None]:
    """A forward or dgrad kernel with everything but addresses given; by raw facts, as ``passes.chosen``."""
    problem = layer_problem(step, dtype, grid, geometry, x_shape, capacity)
    module = kernels()
    facts = problem_object(problem), getattr(module.Step, step), plan_object(plan)
    return functools.partial(getattr(module, plan.family), *facts)


@functools.lru_cache(maxsize=8192)
def _gradient(
    dtype: torch.dtype,
    number: str,
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    x_shape: tuple[int, ...],
    capacity: int,
    plan: Plan,
    with_bias: bool,
) -> tuple[functools.partial[None], int]:
    """The wgrad kernel with everything but addresses given, and the bytes of its workspace."""
    problem = layer_problem("wgrad", dtype, grid, geometry, x_shape, capacity)
    module, facts = kernels(), (problem_object(problem), plan_object(plan))
    return functools.partial(module.wgrad, *facts), module.wgrad_workspace_bytes(*facts, with_bias)


def _number(dtype: torch.dtype, geometry: ConvGeometry | None) -> str:
    return precision(dtype, "linear" if geometry is None else "conv2d")


def forward(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    kernel: Plan,
) -> Tensor:
    facts = grid, geometry, tuple(x.shape), capacity_of(grid, index)
    call = _product("forward", x.dtype, _number(x.dtype, geometry), *facts, kernel)
    source, ld = _pixels(x)
    out_features = grid.weight_shape[0]
    if geometry is None:
        y = x.new_empty(x.shape[0], out_features)
    else:
        size = geometry.output_size(x.shape[2], x.shape[3], grid.kernel_size)
        y = _empty_image((x.shape[0], out_features, *size), x)
    _run_product(call, source, ld, values, index, bias, y)
    return y


def dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_shape: tuple[int, ...],
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    kernel: Plan,
) -> Tensor:
    facts = grid, geometry, tuple(input_shape), capacity_of(grid, index)
    call = _product("dgrad", dy.dtype, _number(dy.dtype, geometry), *facts, kernel)
    source, ld = _pixels(dy)
    dx = dy.new_empty(input_shape) if geometry is None else _empty_image(input_shape, dy)
    _run_product(call, source, ld, values, index, None, dx)
    return dx


def _run_product(
    call: functools.partial[None],
    source: Tensor,
    ld: int,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    result: Tensor,
) -> None:
    values, index = _dense(values, source, "values"), _index(index, source)
    bias = None if bias is None else _dense(bias, source, "bias")
    device = source.device
    call(
        source.data_ptr(),
        ld,
        values.data_ptr(),
        index.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        result.data_ptr(),
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )


def wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    element_mask: Tensor | None,
    with_bias: bool,
    grid: BlockGrid,
    geometry: ConvGeometry | None,
    kernel: Plan,
) -> tuple[Tensor, Tensor]:
    capacity = capacity_of(grid, index)
    facts = grid, geometry, tuple(x.shape), capacity
    call, workspace_bytes = _gradient(dy.dtype, _number(dy.dtype, geometry), *facts, kernel, with_bias)
    (dy_source, dy_ld), (x_source, x_ld) = _pixels(dy), _pixels(x)
    _same_kind(x, dy, "x")
    index, device = _index(index, dy), dy.device
    if element_mask is not None:
        element_mask = _aligned(element_mask.contiguous(), MASK_ALIGNMENT)
    dvalues = dy.new_empty(capacity, *grid.block)
    dbias = dy.new_empty(grid.weight_shape[0] if with_bias else 0)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device) if workspace_bytes else None
    call(
        dy_source.data_ptr(),
        dy_ld,
        x_source.data_ptr(),
        x_ld,
        index.data_ptr(),
        0 if element_mask is None else element_mask.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        dvalues.data_ptr(),
        dbias.data_ptr() if with_bias else 0,
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return dvalues, dbias


# -- operands ----------------------------------------------------------------------------------------------------------


def _pixels(tensor: Tensor) -> tuple[Tensor, int]:
    """x [M, K] or an image, and the elements from one token or pixel to the next; a copy where strides don't fit."""
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last), tensor.shape[1]
    tokens, features = tensor.shape
    if tokens <= 1:
        return tensor.contiguous(), features
    if (tensor.stride(1) == 1 or features == 1) and tensor.stride(0) >= features:
        return tensor, tensor.stride(0)
    return tensor.contiguous(), features


def _empty_image(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _same_kind(tensor: Tensor, like: Tensor, name: str) -> None:
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name}: expected {like.dtype} on {like.device} as the activations, got {tensor.dtype} on {tensor.device}"
        )


def _dense(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    """Contiguous and aligned, on the activations' device and of their dtype."""
    _same_kind(tensor, like, name)
    return _aligned(tensor.contiguous(), ALIGNMENT)


def _aligned(tensor: Tensor, size: int) -> Tensor:
    return tensor if tensor.data_ptr() % size == 0 else tensor.clone()


def _index(index: Tensor, like: Tensor) -> Tensor:
    if index.dtype != torch.int32 or index.device != like.device:
        raise ValueError(f"index: expected int32 on {like.device}, got {index.dtype} on {index.device}")
    return index.contiguous()
