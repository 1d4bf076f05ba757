"""Operators: schema, fake kernel, autograd, autocast, FLOP formula. No kernels in this file.

Eager calls go through a plain ``autograd.Function`` straight to the backend (27 us forward and backward; a registered
operator with autograd costs 50 us). Under ``torch.compile``, export, functorch and dispatch modes such as
``FlopCounterMode`` the registered operators ``torch.ops.sparsekern.*`` run, which compute the same.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.backends import ConvGeometry, choice, dense, get, is_channels_last, select
from sparsekern.flops import register_when_asked
from sparsekern.layout import BlockGrid, BlockLayout

_LIBRARY = torch.library.Library("sparsekern", "DEF")
_CONV = "SymInt[2] kernel_size, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups"
_LIBRARY.define(
    "linear(Tensor x, Tensor values, Tensor index, Tensor? bias, SymInt out_features, "
    "Tensor? element_mask=None, Tensor? probe=None) -> Tensor"
)
_LIBRARY.define("linear_dgrad(Tensor dy, Tensor values, Tensor index, SymInt in_features) -> Tensor")
_LIBRARY.define(
    "linear_wgrad(Tensor dy, Tensor x, Tensor index, SymInt capacity, SymInt bo, SymInt bi, bool with_bias, "
    "Tensor? element_mask=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"conv2d(Tensor x, Tensor values, Tensor index, Tensor? bias, SymInt out_channels, {_CONV}, "
    "Tensor? element_mask=None, Tensor? probe=None) -> Tensor"
)
_LIBRARY.define(
    "conv2d_dgrad(Tensor dy, Tensor values, Tensor index, SymInt[4] input_shape, bool channels_last, "
    f"{_CONV}) -> Tensor"
)
_LIBRARY.define(
    f"conv2d_wgrad(Tensor dy, Tensor x, Tensor index, SymInt capacity, SymInt bo, SymInt bi, {_CONV}, bool with_bias, "
    "Tensor? element_mask=None) -> (Tensor, Tensor)"
)

_LIBRARY.define("block_scores(Tensor dy, Tensor x, Tensor index, SymInt bo, SymInt bi) -> Tensor")
_LIBRARY.define(f"conv2d_block_scores(Tensor dy, Tensor x, Tensor index, SymInt bo, SymInt bi, {_CONV}) -> Tensor")
_LIBRARY.define("linear_dense_wgrad(Tensor dy, Tensor x) -> Tensor")
_LIBRARY.define(f"conv2d_dense_wgrad(Tensor dy, Tensor x, {_CONV}) -> Tensor")

Pair = Sequence[int]


@functools.lru_cache(maxsize=4096)
def _grid(weight_shape: tuple[int, ...], block: tuple[int, int], groups: int) -> BlockGrid:
    return BlockGrid(weight_shape, block, groups)


@functools.lru_cache(maxsize=4096)
def _geometry(stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]) -> ConvGeometry:
    return ConvGeometry(
        (stride[0], stride[1]), (padding[0], padding[1], padding[2], padding[3]), (dilation[0], dilation[1])
    )


def _block(values: Tensor) -> tuple[int, int]:
    return values.shape[1], values.shape[2]


# -- what runs: leading dimensions flattened, backend chosen -----------------------------------------------------------


def _linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out_features: int,
    element_mask: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    grid = _grid((out_features, x.shape[-1]), _block(values), 1)
    kernel = select("linear", x, grid.block)
    y = kernel.linear_forward(x.reshape(-1, x.shape[-1]), values, index, bias, grid)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
    grid = _grid((dy.shape[-1], in_features), _block(values), 1)
    kernel = select("linear", dy, grid.block)
    dx = kernel.linear_dgrad(dy.reshape(-1, dy.shape[-1]), values, index, grid)
    return dx.view(*dy.shape[:-1], in_features)


def _linear_wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    capacity: int,
    bo: int,
    bi: int,
    with_bias: bool,
    element_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grid = _grid((dy.shape[-1], x.shape[-1]), (bo, bi), 1)
    kernel = select("linear", dy, grid.block)
    return kernel.linear_wgrad(
        dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), index, element_mask, with_bias, grid
    )


def _conv2d(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    element_mask: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    grid = _grid((out_channels, x.shape[1] // groups, *kernel_size), _block(values), groups)
    kernel = select("conv2d", x, grid.block)
    return kernel.conv2d_forward(
        x, values, index, bias, grid, _geometry(tuple(stride), tuple(padding), tuple(dilation))
    )


def _conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_shape: Sequence[int],
    channels_last: bool,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    grid = _grid((dy.shape[1], input_shape[1] // groups, *kernel_size), _block(values), groups)
    kernel = select("conv2d", dy, grid.block)
    geometry = _geometry(tuple(stride), tuple(padding), tuple(dilation))
    return kernel.conv2d_dgrad(dy, values, index, tuple(input_shape), channels_last, grid, geometry)


def _conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    capacity: int,
    bo: int,
    bi: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    with_bias: bool,
    element_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grid = _grid((dy.shape[1], x.shape[1] // groups, *kernel_size), (bo, bi), groups)
    kernel = select("conv2d", dy, grid.block)
    geometry = _geometry(tuple(stride), tuple(padding), tuple(dilation))
    return kernel.conv2d_wgrad(dy, x, index, element_mask, with_bias, grid, geometry)


def _block_scores(dy: Tensor, x: Tensor, index: Tensor, bo: int, bi: int) -> Tensor:
    grid = _grid((dy.shape[-1], x.shape[-1]), (bo, bi), 1)
    kernel = select("linear", dy, grid.block)
    return kernel.block_scores(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), index, grid)


def _conv2d_block_scores(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    bo: int,
    bi: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    grid = _grid((dy.shape[1], x.shape[1] // groups, *kernel_size), (bo, bi), groups)
    kernel = select("conv2d", dy, grid.block)
    return kernel.conv2d_block_scores(dy, x, index, grid, _geometry(tuple(stride), tuple(padding), tuple(dilation)))


def _linear_dense_wgrad(dy: Tensor, x: Tensor) -> Tensor:
    return dense.linear_weight_gradient(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))


def _conv2d_dense_wgrad(
    dy: Tensor, x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    grid = _grid((dy.shape[1], x.shape[1] // groups, *kernel_size), (1, 1), groups)
    return dense.conv2d_weight_gradient(dy, x, grid, _geometry(tuple(stride), tuple(padding), tuple(dilation)))


for _name, _function in {
    "block_scores": _block_scores,
    "conv2d_block_scores": _conv2d_block_scores,
    "linear": _linear,
    "linear_dgrad": _linear_dgrad,
    "linear_wgrad": _linear_wgrad,
    "conv2d": _conv2d,
    "conv2d_dgrad": _conv2d_dgrad,
    "conv2d_wgrad": _conv2d_wgrad,
    "linear_dense_wgrad": _linear_dense_wgrad,
    "conv2d_dense_wgrad": _conv2d_dense_wgrad,
}.items():
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _device)


# -- fake kernels ------------------------------------------------------------------------------------------------------


@torch.library.register_fake("sparsekern::linear", lib=_LIBRARY)
def _(x, values, index, bias, out_features, element_mask=None, probe=None):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("sparsekern::linear_dgrad", lib=_LIBRARY)
def _(dy, values, index, in_features):  # type: ignore[no-untyped-def]
    return dy.new_empty(*dy.shape[:-1], in_features)


@torch.library.register_fake("sparsekern::linear_wgrad", lib=_LIBRARY)
def _(dy, x, index, capacity, bo, bi, with_bias, element_mask=None):  # type: ignore[no-untyped-def]
    return dy.new_empty(capacity, bo, bi), dy.new_empty(dy.shape[-1] if with_bias else 0)


def _fake_image(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=fmt)


@torch.library.register_fake("sparsekern::conv2d", lib=_LIBRARY)
def _(  # type: ignore[no-untyped-def]
    x, values, index, bias, out_channels, kernel_size, stride, padding, dilation, groups, element_mask=None, probe=None
):
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation))
    p, q = geometry.output_size(x.shape[2], x.shape[3], kernel_size)
    return _fake_image(x, (x.shape[0], out_channels, p, q), is_channels_last(x))


@torch.library.register_fake("sparsekern::conv2d_dgrad", lib=_LIBRARY)
def _(  # type: ignore[no-untyped-def]
    dy, values, index, input_shape, channels_last, kernel_size, stride, padding, dilation, groups
):
    return _fake_image(dy, tuple(input_shape), channels_last)


@torch.library.register_fake("sparsekern::conv2d_wgrad", lib=_LIBRARY)
def _(  # type: ignore[no-untyped-def]
    dy, x, index, capacity, bo, bi, kernel_size, stride, padding, dilation, groups, with_bias, element_mask=None
):
    return dy.new_empty(capacity, bo, bi), dy.new_empty(dy.shape[1] if with_bias else 0)


@torch.library.register_fake("sparsekern::block_scores", lib=_LIBRARY)
def _(dy, x, index, bo, bi):  # type: ignore[no-untyped-def]
    return dy.new_empty(-(-dy.shape[-1] // bo), -(-x.shape[-1] // bi), dtype=torch.float32)


@torch.library.register_fake("sparsekern::conv2d_block_scores", lib=_LIBRARY)
def _(dy, x, index, bo, bi, kernel_size, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    shape = groups, -(-dy.shape[1] // groups // bo), kernel_size[0] * kernel_size[1], -(-x.shape[1] // groups // bi)
    return dy.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("sparsekern::linear_dense_wgrad", lib=_LIBRARY)
def _(dy, x):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[-1], x.shape[-1], dtype=dense.gradient_dtype(dy.dtype))


@torch.library.register_fake("sparsekern::conv2d_dense_wgrad", lib=_LIBRARY)
def _(dy, x, kernel_size, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[1], x.shape[1] // groups, *kernel_size, dtype=dense.gradient_dtype(dy.dtype))


# -- autograd ----------------------------------------------------------------------------------------------------------


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "sparsekern: expected a first-order backward, got a request to differentiate through it (double backward is "
        "not implemented); use sparsekern.densify_ on the model for second-order methods"
    )


for _name in (
    "linear_dgrad", "linear_wgrad", "block_scores", "linear_dense_wgrad",
    "conv2d_dgrad", "conv2d_wgrad", "conv2d_block_scores", "conv2d_dense_wgrad",
):  # fmt: skip
    torch.library.register_autograd(f"sparsekern::{_name}", _no_double_backward, lib=_LIBRARY)


class _Passes(NamedTuple):
    """What a backward calls: the functions themselves, or the registered operators where something watches them."""

    dgrad: Any
    wgrad: Any
    block_scores: Any
    dense_wgrad: Any


_LINEAR = _Passes(_linear_dgrad, _linear_wgrad, _block_scores, _linear_dense_wgrad)
_CONV2D = _Passes(_conv2d_dgrad, _conv2d_wgrad, _conv2d_block_scores, _conv2d_dense_wgrad)


@functools.lru_cache(maxsize=2)
def _registered(op: str) -> _Passes:
    ops = torch.ops.sparsekern
    scores = ops.block_scores if op == "linear" else ops.conv2d_block_scores
    return _Passes(getattr(ops, f"{op}_dgrad"), getattr(ops, f"{op}_wgrad"), scores, getattr(ops, f"{op}_dense_wgrad"))


def _probe_gradient(probe: Tensor, dy: Tensor, x: Tensor, index: Tensor, values: Tensor, passes: _Passes,
                    geometry: tuple[Any, ...]) -> Tensor:  # fmt: skip
    """What a probe collects: norms of the gradient's blocks [blocks], or the dense gradient, the weight's shape."""
    if probe.dim() == 1:
        found = passes.block_scores(dy, x, index, *values.shape[1:], *geometry)
    else:
        found = passes.dense_wgrad(dy, x, *geometry)
    return found.reshape(probe.shape).to(probe.dtype)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, bias, _, element_mask, probe = inputs
    ctx.save_for_backward(x, values, index, element_mask, probe)
    ctx.with_bias = bias is not None


def _linear_backward(ctx: Any, dy: Tensor, passes: _Passes) -> tuple[Any, ...]:
    x, values, index, element_mask, probe = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx = dvalues = dbias = found = None
    if need[0]:
        dx = passes.dgrad(dy, values, index, x.shape[-1])
    if need[1]:
        with_bias = ctx.with_bias and need[3]
        dvalues, dbias = passes.wgrad(dy, x, index, *values.shape, with_bias, element_mask)
        dbias = dbias if with_bias else None
    elif ctx.with_bias and need[3]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    if probe is not None:
        found = _probe_gradient(probe, dy, x, index, values, passes, ())
    return dx, dvalues, None, dbias, None, None, found


def _setup_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, bias, _, kernel_size, stride, padding, dilation, groups, element_mask, probe = inputs
    ctx.save_for_backward(x, values, index, element_mask, probe)
    ctx.with_bias = bias is not None
    ctx.geometry = (kernel_size, stride, padding, dilation, groups)


def _conv2d_backward(ctx: Any, dy: Tensor, passes: _Passes) -> tuple[Any, ...]:
    x, values, index, element_mask, probe = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx = dvalues = dbias = found = None
    if need[0]:
        dx = passes.dgrad(dy, values, index, x.shape, is_channels_last(x), *ctx.geometry)
    if need[1]:
        with_bias = ctx.with_bias and need[3]
        dvalues, dbias = passes.wgrad(dy, x, index, *values.shape, *ctx.geometry, with_bias, element_mask)
        dbias = dbias if with_bias else None
    elif ctx.with_bias and need[3]:
        dbias = dy.sum((0, 2, 3))
    if probe is not None:
        found = _probe_gradient(probe, dy, x, index, values, passes, ctx.geometry)
    return dx, dvalues, None, dbias, *[None] * 7, found


torch.library.register_autograd(
    "sparsekern::linear",
    lambda ctx, dy: _linear_backward(ctx, dy, _registered("linear")),
    setup_context=_setup_linear,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "sparsekern::conv2d",
    lambda ctx, dy: _conv2d_backward(ctx, dy, _registered("conv2d")),
    setup_context=_setup_conv2d,
    lib=_LIBRARY,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        y = _linear(*inputs)
        _setup_linear(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        # With create_graph=True: the registered operators refuse a second derivative.
        return _linear_backward(ctx, dy, _registered("linear") if torch.is_grad_enabled() else _LINEAR)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        y = _conv2d(*inputs)
        _setup_conv2d(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return _conv2d_backward(ctx, dy, _registered("conv2d") if torch.is_grad_enabled() else _CONV2D)


register_when_asked()

# -- what users call ---------------------------------------------------------------------------------------------------


_PLAIN = (Tensor, torch.nn.Parameter)


def _traced(x: Tensor, values: Tensor) -> bool:
    """Whether something watches the dispatcher, which the direct path would hide from it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or x.device.type == "meta"
        or type(x) not in _PLAIN
        or type(values) not in _PLAIN
    )


def _autocast(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """Operands in autocast's dtype and the context that switches autocast off for the call."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, values, bias, None
    dtype = torch.get_autocast_dtype(device)
    off = torch.autocast(device, enabled=False)
    return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype), off


def _check(
    what: str, x: Tensor, values: Tensor, layout: BlockLayout, bias: Tensor | None, probe: Tensor | None
) -> None:
    grid = layout.grid
    if tuple(values.shape[1:]) != grid.block or values.shape[0] != layout.capacity:
        raise ValueError(
            f"{what}: expected values {[layout.capacity, *grid.block]} for this layout, got {list(values.shape)}"
        )
    if x.dtype != values.dtype:
        raise TypeError(
            f"{what}: expected x and values of one dtype, got {x.dtype} and {values.dtype}; "
            "cast one or use torch.autocast"
        )
    if not (x.device == values.device == layout.index.device):
        raise ValueError(
            f"{what}: expected x, values and layout on one device, "
            f"got {x.device}, {values.device}, {layout.index.device}"
        )
    if bias is not None and tuple(bias.shape) != (grid.weight_shape[0],):
        raise ValueError(f"{what}: expected bias [{grid.weight_shape[0]}], got {list(bias.shape)}")
    if probe is not None and tuple(probe.shape) not in ((grid.blocks,), grid.weight_shape):
        raise ValueError(
            f"{what}: expected a probe [{grid.blocks}] for norms of blocks or {list(grid.weight_shape)} for the dense "
            f"gradient, got {list(probe.shape)}"
        )


def sparse_linear(
    x: Tensor,
    values: Tensor,
    layout: BlockLayout,
    bias: Tensor | None = None,
    *,
    element_mask: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    """y = x w^T + bias for the block-sparse w [O, I] that ``values`` and ``layout`` hold.

    Args:
        x: [..., I], any leading dimensions, any strides.
        values: [capacity, bo, bi], x's dtype (under autocast: any).
        layout: a layout of a linear grid [O, I].
        bias: [O] or None.
        element_mask: packed bits uint8 [capacity, ceil(bo*bi/8)] of the elements that learn, or None for all.
        probe: leaf that collects in its ``.grad`` what a topology update wants to know of the backward: [blocks] the
            norms of the weight gradient's blocks, -inf at stored ones; or the weight's shape, the dense gradient.

    Returns:
        y [..., O].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message says what was expected.
    """
    grid = layout.grid
    if len(grid.weight_shape) != 2:
        raise ValueError(f"sparse_linear: expected a layout of a weight [O, I], got {list(grid.weight_shape)}")
    if x.dim() < 1 or x.shape[-1] != grid.weight_shape[1]:
        raise ValueError(
            f"sparse_linear: expected x [..., {grid.weight_shape[1]}] (block {grid.block[0]}x{grid.block[1]}), "
            f"got {list(x.shape)}"
        )
    x, values, bias, off = _autocast(x, values, bias)
    _check("sparse_linear", x, values, layout, bias, probe)
    with off if off is not None else contextlib.nullcontext():
        if _traced(x, values):
            return torch.ops.sparsekern.linear(x, values, layout.index, bias, grid.weight_shape[0], element_mask, probe)
        # Flattened out here: a view made inside an autograd.Function could not be written in place (inplace ReLU).
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = _Linear.apply(rows, values, layout.index, bias, grid.weight_shape[0], element_mask, probe)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], grid.weight_shape[0])


class _Probed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, probe: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.grid = grid
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> Any:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return dw, dense.norms_of_blocks(dw, index, ctx.grid).flatten(), None, None


def probed(weight: Tensor, probe: Tensor, layout: BlockLayout) -> Tensor:
    """``weight`` itself; its gradient also reaches ``probe``, as :func:`sparse_linear` describes, for masked layers.

    Args:
        weight: the dense weight of ``layout``.
        probe: [blocks] or the weight's shape.
    """
    if probe.dim() > 1:
        return weight + probe.to(weight.dtype)  # a probe is zero
    return _Probed.apply(weight, probe, layout.index, layout.grid)


def _pair(value: int | Sequence[int], what: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"sparse_conv2d: expected {what} as an int or a pair, got {value!r}")
    return pair[0], pair[1]


def _padding4(
    padding: str | int | Sequence[int], kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right), as PyTorch reads ints, pairs, "valid" and "same"."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"sparse_conv2d: padding='same' expects stride 1, got {stride}")
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    if isinstance(padding, str):
        raise ValueError(f"sparse_conv2d: expected padding 'valid', 'same', an int or a pair, got {padding!r}")
    ph, pw = _pair(padding, "padding")
    return ph, ph, pw, pw


def _wants_channels_last(device: str, dtype: torch.dtype, block: tuple[int, int]) -> bool:
    """Whether the backend has kernels for channels_last alone; says once what that costs."""
    kernel = choice("conv2d", device, dtype, block)
    wants = bool(getattr(get(kernel), "WANTS_CHANNELS_LAST", False))
    if wants:
        _warn_of_conversion(kernel)
    return wants


# What torch.compiler.assume_constant_result does; calling it would import torch._dynamo, a second, with this package.
_wants_channels_last._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1)
def _warn_of_conversion(kernel: str) -> None:
    warnings.warn(
        f"sparse_conv2d: the {kernel} kernels compute in channels_last memory, got a contiguous NCHW image; it is "
        "converted here, and its gradient back. To avoid both copies: "
        "model.to(memory_format=torch.channels_last) and x.to(memory_format=torch.channels_last)",
        stacklevel=2,
    )


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    layout: BlockLayout,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    element_mask: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    """Cross-correlation of x with the block-sparse w [O, C/g, R, S] that ``values`` and ``layout`` hold.

    Args:
        x: [N, C, H, W] or [C, H, W], contiguous or channels_last (the result follows it); others are copied once.
        values: [capacity, bo, bi], x's dtype (under autocast: any).
        layout: a layout of a convolution grid.
        bias: [O] or None.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        element_mask: packed bits uint8 [capacity, ceil(bo*bi/8)] of the elements that learn, or None for all.
        probe: leaf that collects in its ``.grad`` what a topology update wants to know of the backward: [blocks] the
            norms of the weight gradient's blocks, -inf at stored ones; or the weight's shape, the dense gradient.

    Returns:
        y [N, O, P, Q] or [O, P, Q].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message says what was expected.
    """
    grid = layout.grid
    if len(grid.weight_shape) != 4:
        raise ValueError(f"sparse_conv2d: expected a layout of a weight [O, C/g, R, S], got {list(grid.weight_shape)}")
    if groups != grid.groups:
        raise ValueError(f"sparse_conv2d: expected groups={grid.groups} as in the layout, got {groups}")
    channels = grid.weight_shape[1] * groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(f"sparse_conv2d: expected x [N, {channels}, H, W] or [{channels}, H, W], got {list(x.shape)}")
    if x.dim() == 3:
        y = sparse_conv2d(
            x.unsqueeze(0), values, layout, bias, stride, padding, dilation, groups,
            element_mask=element_mask, probe=probe,
        )  # fmt: skip
        return y.squeeze(0)
    steps, spread = _pair(stride, "stride"), _pair(dilation, "dilation")
    pad = _padding4(padding, grid.kernel_size, steps, spread)
    if min(*steps, *spread) < 1 or min(pad) < 0:
        raise ValueError(
            "sparse_conv2d: expected positive stride and dilation and padding of 0 or more, "
            f"got {steps}, {spread}, {pad}"
        )
    p, q = ConvGeometry(steps, pad, spread).output_size(x.shape[2], x.shape[3], grid.kernel_size)
    if p < 1 or q < 1:
        raise ValueError(
            f"sparse_conv2d: expected a positive output size, got {p}x{q} from input {x.shape[2]}x{x.shape[3]}, "
            f"kernel {grid.kernel_size}, stride {steps}, padding {pad}, dilation {spread}"
        )
    x, values, bias, off = _autocast(x, values, bias)
    _check("sparse_conv2d", x, values, layout, bias, probe)
    if not x.is_contiguous(memory_format=torch.channels_last) and _wants_channels_last(
        x.device.type, x.dtype, grid.block
    ):
        x = x.contiguous(memory_format=torch.channels_last)
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)
    call = torch.ops.sparsekern.conv2d if _traced(x, values) else _Conv2d.apply
    args = (
        x, values, layout.index, bias, grid.weight_shape[0], grid.kernel_size, steps, pad, spread, groups, element_mask,
        probe,
    )  # fmt: skip
    with off if off is not None else contextlib.nullcontext():
        return call(*args)
