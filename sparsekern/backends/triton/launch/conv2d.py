"""Launches of the convolution kernels: forward and dgrad over channels_last images."""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparsekern.backends import ConvGeometry
from sparsekern.backends.gpu.problem import is_linear
from sparsekern.backends.triton.kernels import conv2d as kernels
from sparsekern.backends.triton.launch import common, linear
from sparsekern.backends.triton.tile import Tile
from sparsekern.layout import BlockGrid


def as_rows(image: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last memory as [N * H * W, C], no copy."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def alignment(*sizes: int, most: int) -> int:
    """The largest power of two, up to ``most``, that divides all sizes."""
    return math.gcd(*sizes, most)


@functools.lru_cache(maxsize=4096)
def box(n: int, height: int, width: int, pixels: int) -> tuple[int, int, int]:
    """Images x rows x columns of a tile of ``pixels`` (a power of two) that covers the output with the least waste.

    Among equals the larger patch of one image: neighbouring taps then find most of their pixels in L2.
    """
    sides = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (h * w), h, w) for h in sides for w in sides if h * w <= pixels]

    def computed(of: tuple[int, int, int]) -> int:
        return math.prod(-(-size // side) * side for size, side in zip((n, height, width), of, strict=True))

    return min(boxes, key=lambda of: (computed(of), of[0], abs(of[1] - of[2]), of))


def _describable(
    x: Tensor, y: Tensor, values: Tensor, grid: BlockGrid, geometry: ConvGeometry, tile: Tile, transposed: bool
) -> bool:
    """Whether the copy engine can do it: stride 1, whole blocks in every group, sizes in multiples of 16 bytes."""
    edge, bn = grid.block if transposed else grid.block[::-1]
    whole = grid.groups == 1 or (x.shape[1] // grid.groups % edge == 0 and y.shape[1] // grid.groups % bn == 0)
    aligned = all(t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t in (x, y))
    return (
        geometry.stride == (1, 1)
        and whole
        and aligned
        and values.shape[0] > 0
        and values.data_ptr() % 16 == 0
        and edge % tile.bk == 0
        and math.prod(box(y.shape[0], y.shape[2], y.shape[3], tile.bm)) == tile.bm
    )


def _described(image: Tensor, box: list[int]) -> TensorDescriptor:
    """[N, C, H, W] in channels_last memory as [N, H, W, C]; PyTorch leaves strides of size-1 dimensions open."""
    n, c, h, w = image.shape
    return TensorDescriptor(image, [n, h, w, c], [h * w * c, w * c, c, 1], box)


def forward(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, grid: BlockGrid, geometry: ConvGeometry, tile: Tile
) -> Tensor:
    """y = x * w + bias (cross-correlation).

    Args:
        x: [N, C, H, W], bf16, fp16 or fp32; copied if it is not in channels_last memory.
        values: [capacity, bo, bi], x's dtype.
        index: packed layout.
        bias: [O] or None.
        grid: of the weight [O, C/g, R, S].
        geometry: stride, padding and dilation.
        tile: how a program is cut; its tokens are output pixels.

    Returns:
        y [N, O, P, Q] in channels_last memory.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    n, _, h, w = x.shape
    p, q = geometry.output_size(h, w, grid.kernel_size)
    y = torch.empty(n, grid.weight_shape[0], p, q, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if is_linear(grid, geometry):
        linear.product(as_rows(x), as_rows(y), values, index, bias, grid, tile, transposed=False, kind="conv2d")
    else:
        _product(x, y, values, index, bias, grid, geometry, tile, transposed=False)
    return y


def dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_shape: tuple[int, ...],
    grid: BlockGrid,
    geometry: ConvGeometry,
    tile: Tile,
) -> Tensor:
    """dx [N, C, H, W] of ``input_shape``, in channels_last memory, from dy [N, O, P, Q]."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx = torch.empty(input_shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    if is_linear(grid, geometry):
        linear.product(as_rows(dy), as_rows(dx), values, index, None, grid, tile, transposed=True, kind="conv2d")
    else:
        _product(dy, dx, values, index, None, grid, geometry, tile, transposed=True)
    return dx


def _product(
    x: Tensor,
    y: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    grid: BlockGrid,
    geometry: ConvGeometry,
    tile: Tile,
    *,
    transposed: bool,
) -> None:
    """Writes ``y`` from ``x``, both channels_last; the kernel's module says what the geometry's numbers mean."""
    if y.numel() == 0:
        return
    values, at = values.contiguous(), common.offsets(grid, index)
    if tile.variant == "tma" and not _describable(x, y, values, grid, geometry, tile, transposed):
        tile = common.by_pointers(tile)
    groups, block_rows, _, block_cols = grid.shape
    (n, xc, h, w), (_, yc, yh, yw) = x.shape, y.shape
    top, _, left, _ = geometry.padding
    if transposed:
        (edge, bn), block_rows, block_cols = grid.block, block_cols, block_rows
        order, o_ptr, o_col, o_slot = at.t_order, at.t_ptr, at.t_row, at.t_perm
        out_step, mul = geometry.stride, (1, 1)
        offset, step = (top, left), (-geometry.dilation[0], -geometry.dilation[1])
    else:
        bn, edge = grid.block
        order, o_ptr, o_col, o_slot = at.row_order, at.row_ptr, at.col, at.col
        out_step, mul = (1, 1), geometry.stride
        offset, step = (-top, -left), geometry.dilation
    pixels = n * triton.cdiv(yh, out_step[0]) * triton.cdiv(yw, out_step[1])
    work = triton.cdiv(pixels, tile.bm) * math.prod(out_step) * block_rows * groups
    x_group = xc // groups
    options = {"num_warps": tile.warps, "num_stages": tile.stages, **common.OPTIONS}
    if tile.variant == "tma":
        images, bh, bw = box(n, yh, yw, tile.bm)
        m_tiles = triton.cdiv(n, images) * triton.cdiv(yh, bh) * triton.cdiv(yw, bw)
        kernels.conv2d_tma_kernel[common.programs(tile, m_tiles * block_rows * groups, x.device)](
            _described(x, [images, bh, bw, tile.bk]),
            TensorDescriptor.from_tensor(
                values.view(-1, values.shape[2]), [tile.bk, bn] if transposed else [bn, tile.bk]
            ),
            _described(y, [images, bh, bw, bn]),
            bias, index, n, yh, yw, x_group, yc // groups, block_rows, block_cols,
            common.token_group(tile, xc, x.element_size()), *offset, *step, o_ptr, o_col, o_slot, order,
            IMAGES=images, BH=bh, BW=bw, BK=tile.bk, BN=bn, EDGE=edge, S=grid.kernel_size[1], GROUPS=groups,
            TRANSPOSED=transposed, HAS_BIAS=bias is not None, STAGES=tile.stages, **options,
        )  # fmt: skip
        return
    kernels.conv2d_gather_kernel[common.programs(tile, work, x.device)](
        x, values, bias, y, index,
        n, h, w, yh, yw, x_group, yc // groups,
        h * w * xc, w * xc, xc, yh * yw * yc, yw * yc, yc,
        block_rows, block_cols, common.token_group(tile, xc, x.element_size()), *mul, *offset, *step,
        o_ptr, o_col, o_slot, order,
        BM=tile.bm, BK=tile.bk, BN=bn, EDGE=edge,
        ALIGN=alignment(xc, x_group, most=min(edge, tile.bk)), ALIGN_Y=alignment(yc, yc // groups, most=bn),
        S=grid.kernel_size[1], GROUPS=groups,
        OUT_H=out_step[0], OUT_W=out_step[1], TRANSPOSED=transposed, HAS_BIAS=bias is not None,
        EVEN_K=x_group % edge == 0, PRECISION=common.precision(x, "conv2d"), STAGES=tile.stages,
        **options,
    )  # fmt: skip
