"""C++ kernels on the CPU: fp32 natively; fp16 and bf16 computed in fp32 and rounded once at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekern.backends import ConvGeometry, OpDesc, dense, is_channels_last, native
from sparsekern.layout import BlockGrid, capacity_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(desc: OpDesc) -> str | None:
    if desc.device != "cpu":
        return f"expected tensors on the CPU, got {desc.device}"
    if desc.dtype not in DTYPES:
        return f"expected float32, bfloat16 or float16, got {desc.dtype}"
    return None if native.available() else native.why()


def _rows(x: Tensor) -> Tensor:
    """x [M, K] in fp32 with contiguous features; a copy only where the strides don't allow it."""
    if x.dtype is not torch.float32:
        x = x.to(torch.float32)
    usable = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return x if usable or x.shape[0] == 0 else x.contiguous()


def _image(x: Tensor, channels_last: bool) -> Tensor:
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(torch.float32).contiguous(memory_format=fmt)


def _flat(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype is torch.float32 else tensor.to(torch.float32)).contiguous()


def _ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _linear_args(grid: BlockGrid, index: Tensor, m: int) -> Any:
    out_features, in_features = grid.weight_shape
    capacity = capacity_of(grid, index)
    return native.load().LinearArgs(
        index.data_ptr(), capacity, *grid.block, m, out_features, in_features, torch.get_num_threads()
    )


def linear_forward(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid) -> Tensor:
    rows, stored, b = _rows(x), _flat(values), None if bias is None else _flat(bias)
    y = torch.empty(x.shape[0], grid.weight_shape[0])
    args = _linear_args(grid, index, x.shape[0])
    native.load().linear_forward(
        args, rows.data_ptr(), rows.stride(0), stored.data_ptr(), _ptr(b), y.data_ptr(), y.stride(0)
    )
    return y if x.dtype is y.dtype else y.to(x.dtype)


def linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    rows, stored = _rows(dy), _flat(values)
    dx = torch.empty(dy.shape[0], grid.weight_shape[1])
    args = _linear_args(grid, index, dy.shape[0])
    native.load().linear_dgrad(args, rows.data_ptr(), rows.stride(0), stored.data_ptr(), dx.data_ptr(), dx.stride(0))
    return dx if dy.dtype is dx.dtype else dx.to(dy.dtype)


def linear_wgrad(
    dy: Tensor, x: Tensor, index: Tensor, element_mask: Tensor | None, with_bias: bool, grid: BlockGrid
) -> tuple[Tensor, Tensor]:
    dy_rows, x_rows = _rows(dy), _rows(x)
    dvalues = torch.empty(capacity_of(grid, index), *grid.block)
    dbias = torch.empty(grid.weight_shape[0] if with_bias else 0)
    args = _linear_args(grid, index, dy.shape[0])
    native.load().linear_wgrad(
        args,
        dy_rows.data_ptr(),
        dy_rows.stride(0),
        x_rows.data_ptr(),
        x_rows.stride(0),
        _ptr(element_mask),
        dvalues.data_ptr(),
        dbias.data_ptr() if with_bias else 0,
    )
    return (dvalues, dbias) if dy.dtype is dvalues.dtype else (dvalues.to(dy.dtype), dbias.to(dy.dtype))


def _conv2d_args(
    grid: BlockGrid, index: Tensor, geometry: ConvGeometry, x: torch.Size | tuple[int, ...], channels_last: bool
) -> Any:
    p, q = geometry.output_size(x[2], x[3], grid.kernel_size)
    top, _, left, _ = geometry.padding
    return native.load().Conv2dArgs(
        index.data_ptr(),
        capacity_of(grid, index),
        *grid.block,
        grid.groups,
        *x,
        grid.weight_shape[0],
        p,
        q,
        *grid.kernel_size,
        *geometry.stride,
        top,
        left,
        *geometry.dilation,
        channels_last,
        torch.get_num_threads(),
    )


def _empty_image(shape: tuple[int, ...], channels_last: bool) -> Tensor:
    return torch.empty(shape, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def conv2d_forward(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid, geometry: ConvGeometry
) -> Tensor:
    last = is_channels_last(x)
    image, stored, b = _image(x, last), _flat(values), None if bias is None else _flat(bias)
    p, q = geometry.output_size(x.shape[2], x.shape[3], grid.kernel_size)
    y = _empty_image((x.shape[0], grid.weight_shape[0], p, q), last)
    args = _conv2d_args(grid, index, geometry, x.shape, last)
    native.load().conv2d_forward(args, image.data_ptr(), stored.data_ptr(), _ptr(b), y.data_ptr())
    return y if x.dtype is y.dtype else y.to(x.dtype)


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_shape: tuple[int, ...],
    channels_last: bool,
    grid: BlockGrid,
    geometry: ConvGeometry,
) -> Tensor:
    image, stored = _image(dy, channels_last), _flat(values)
    dx = _empty_image(input_shape, channels_last)
    args = _conv2d_args(grid, index, geometry, input_shape, channels_last)
    native.load().conv2d_dgrad(args, image.data_ptr(), stored.data_ptr(), dx.data_ptr())
    return dx if dy.dtype is dx.dtype else dx.to(dy.dtype)


def conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    element_mask: Tensor | None,
    with_bias: bool,
    grid: BlockGrid,
    geometry: ConvGeometry,
) -> tuple[Tensor, Tensor]:
    last = is_channels_last(x) or (is_channels_last(dy) and x.is_contiguous(memory_format=torch.channels_last))
    dy_image, x_image = _image(dy, last), _image(x, last)
    dvalues = torch.empty(capacity_of(grid, index), *grid.block)
    dbias = torch.empty(grid.weight_shape[0] if with_bias else 0)
    args = _conv2d_args(grid, index, geometry, x.shape, last)
    native.load().conv2d_wgrad(
        args,
        dy_image.data_ptr(),
        x_image.data_ptr(),
        _ptr(element_mask),
        dvalues.data_ptr(),
        dbias.data_ptr() if with_bias else 0,
    )
    return (dvalues, dbias) if dy.dtype is dvalues.dtype else (dvalues.to(dy.dtype), dbias.to(dy.dtype))


def block_scores(dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    return dense.block_scores(dy, x, index, grid)  # nearly all blocks are absent: a dense product, which MKL does best


def conv2d_block_scores(dy: Tensor, x: Tensor, index: Tensor, grid: BlockGrid, geometry: ConvGeometry) -> Tensor:
    return dense.conv2d_block_scores(dy, x, index, grid, geometry)
