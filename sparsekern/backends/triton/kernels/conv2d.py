"""Implicit GEMM over channels_last images: forward and dgrad, one kernel over the layout or its transpose.

Pixels lie on the M side of the tensor-core instruction, one block's channels on its N side; a stored block is a (tap,
channel block) pair, and its operand tile is read straight from the image: no im2col. Names follow the forward pass:
``x`` is the image that is read, ``y`` the one that is written; dgrad reads dy and writes dx.

Output pixel ``i`` of phase ``f`` along one axis lies at ``i * OUT_STEP + f`` and tap ``t`` reads source pixel
``i * mul + (offset + f + t * step) / OUT_STEP`` where that is a whole number inside the image:

- forward: OUT_STEP = 1, one phase, mul = stride, offset = -padding, step = dilation;
- dgrad: OUT_STEP = stride (so a strided convolution has stride^2 phases), mul = 1, offset = padding, step = -dilation.
"""

import triton
import triton.language as tl

from sparsekern.backends.triton.kernels.common import dot
from sparsekern.backends.triton.kernels.linear import load_weights, slots_of, token_tile_and_row

_PLAIN_INTS = [
    "N", "H", "W", "YH", "YW", "XC", "rows", "cols", "group",
    "mul_h", "mul_w", "offset_h", "offset_w", "step_h", "step_w", "o_ptr", "o_col", "o_slot", "o_order",
]  # fmt: skip


# A tap that the phase does not have reads this far above every image.
_NOWHERE = tl.constexpr(-(1 << 20))


@triton.jit
def shift_of(col, cols, S: tl.constexpr, offset_h, offset_w, step_h, step_w, OUT_H: tl.constexpr, OUT_W: tl.constexpr):
    """Entry ``col`` of a row as (source shift along h, along w, channel block)."""
    tap = col // cols
    shift_h = offset_h + tap // S * step_h
    shift_w = offset_w + tap % S * step_w
    if OUT_H * OUT_W > 1:
        has = (shift_h % OUT_H == 0) & (shift_w % OUT_W == 0)
        shift_h = tl.where(has, shift_h // OUT_H, _NOWHERE)
        shift_w = shift_w // OUT_W
    return shift_h, shift_w, col % cols


@triton.jit(do_not_specialize=_PLAIN_INTS)
def conv2d_gather_kernel(
    x, values, bias, y, index,
    N, H, W, YH, YW, XC, YC,
    x_stride_n, x_stride_h, x_stride_w, y_stride_n, y_stride_h, y_stride_w,
    rows, cols, group, mul_h, mul_w, offset_h, offset_w, step_h, step_w,
    o_ptr, o_col, o_slot, o_order,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [N, H, W, GROUPS * XC], y [N, YH, YW, GROUPS * YC]; ``rows``, ``cols``: block rows and columns of a group.

    ALIGN, ALIGN_Y: elements that pixels and channel blocks of x and of y start at multiples of.
    """
    PACK: tl.constexpr = BK // EDGE if BK > EDGE else 1
    PARTS: tl.constexpr = EDGE // BK if EDGE > BK else 1
    o_k = tl.arange(0, BK)
    o_n = tl.arange(0, BN)
    height = tl.cdiv(YH, OUT_H)
    width = tl.cdiv(YW, OUT_W)
    m_tiles = tl.cdiv(N * height * width, BM)
    for tile in range(tl.program_id(0), m_tiles * (OUT_H * OUT_W) * rows * GROUPS, tl.num_programs(0)):
        i_m, position = token_tile_and_row(tile, m_tiles * (OUT_H * OUT_W), rows * GROUPS, group)
        i_row = tl.load(index + o_order + position)
        start = tl.load(index + o_ptr + i_row)
        end = tl.load(index + o_ptr + i_row + 1)
        phase = i_m // m_tiles
        phase_h = phase // OUT_W
        phase_w = phase % OUT_W
        o_m = i_m % m_tiles * BM + tl.arange(0, BM)
        i_n = o_m // (height * width)
        i_h = o_m // width % height
        i_w = o_m % width
        m_m = (i_n < N) & (i_h * OUT_H + phase_h < YH) & (i_w * OUT_W + phase_w < YW)
        x_h = i_h * mul_h
        x_w = i_w * mul_w
        p_x = x + i_n.to(tl.int64) * x_stride_n + x_h.to(tl.int64) * x_stride_h + x_w * x_stride_w
        first_channel = i_row // rows * XC if GROUPS > 1 else 0
        from_h = offset_h + phase_h
        from_w = offset_w + phase_w
        b_acc = tl.zeros((BM, BN), tl.float32)
        if PACK > 1:
            o_j = o_k // EDGE
            o_in = o_k % EDGE
            k_next = start + o_j
            b_col = tl.load(index + o_col + k_next, mask=k_next < end, other=0)
            b_slot = slots_of(index, o_slot, k_next, k_next < end, TRANSPOSED)
            for k in tl.range(start, end, PACK, num_stages=STAGES):
                d_h, d_w, block = shift_of(b_col, cols, S, from_h, from_w, step_h, step_w, OUT_H, OUT_W)
                m_k = k + o_j < end
                o_c = block * EDGE + o_in
                if not EVEN_K:
                    m_k = m_k & (o_c < XC)
                o_x = d_h * x_stride_h + d_w * x_stride_w + (first_channel + o_c)
                o_x = tl.max_contiguous(tl.multiple_of(o_x, ALIGN), EDGE)
                s_h = x_h[:, None] + d_h[None, :]
                s_w = x_w[:, None] + d_w[None, :]
                m_x = (s_h >= 0) & (s_h < H) & (s_w >= 0) & (s_w < W) & m_m[:, None] & m_k[None, :]
                b_x = tl.load(p_x[:, None] + o_x[None, :], mask=m_x, other=0.0)
                b_w = load_weights(values, b_slot, o_in, o_n, k + o_j < end, EDGE, BN, TRANSPOSED, True)
                k_next = k + PACK + o_j
                b_col = tl.load(index + o_col + k_next, mask=k_next < end, other=0)
                b_slot = slots_of(index, o_slot, k_next, k_next < end, TRANSPOSED)
                b_acc = dot(b_x, b_w, b_acc, PRECISION)
        else:
            col = tl.load(index + o_col + start, mask=start < end, other=0)
            slot = slots_of(index, o_slot, start, start < end, TRANSPOSED)
            for k in tl.range(start * PARTS, end * PARTS, num_stages=STAGES):
                d_h, d_w, block = shift_of(col, cols, S, from_h, from_w, step_h, step_w, OUT_H, OUT_W)
                o_in = k % PARTS * BK + o_k
                s_h = x_h + d_h
                s_w = x_w + d_w
                m_x = (m_m & (s_h >= 0) & (s_h < H) & (s_w >= 0) & (s_w < W))[:, None]
                o_c = block * EDGE + o_in
                if not EVEN_K:
                    m_x = m_x & (o_c < XC)[None, :]
                o_x = d_h * x_stride_h + d_w * x_stride_w + (first_channel + o_c)
                o_x = tl.max_contiguous(tl.multiple_of(o_x, ALIGN), BK)
                b_x = tl.load(p_x[:, None] + o_x[None, :], mask=m_x, other=0.0)
                b_w = load_weights(values, slot, o_in, o_n, o_in < EDGE, EDGE, BN, TRANSPOSED, False)
                k_next = (k + 1) // PARTS
                col = tl.load(index + o_col + k_next, mask=k_next < end, other=0)
                slot = slots_of(index, o_slot, k_next, k_next < end, TRANSPOSED)
                b_acc = dot(b_x, b_w, b_acc, PRECISION)
        o_c = i_row % rows * BN + o_n
        m_c = o_c < YC
        if GROUPS > 1:  # the sum's alignment is lost on the compiler, and narrow stores would cost a register per row
            o_c = tl.max_contiguous(tl.multiple_of(o_c + i_row // rows * YC, ALIGN_Y), BN)
        if HAS_BIAS:
            b_acc += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        p_y = y + i_n.to(tl.int64) * y_stride_n + (i_h * OUT_H + phase_h).to(tl.int64) * y_stride_h
        p_y += (i_w * OUT_W + phase_w) * y_stride_w
        tl.store(p_y[:, None] + o_c[None, :], b_acc.to(y.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@triton.jit(
    do_not_specialize=[
        "N", "YH", "YW", "YC", "rows", "cols", "group", "offset_h", "offset_w", "step_h", "step_w",
        "XC", "o_ptr", "o_col", "o_slot", "o_order",
    ]
)  # fmt: skip
def conv2d_tma_kernel(
    x_desc, w_desc, y_desc, bias, index,
    N, YH, YW, XC, YC, rows, cols, group, offset_h, offset_w, step_h, step_w,
    o_ptr, o_col, o_slot, o_order,
    IMAGES: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
    S: tl.constexpr, GROUPS: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stride 1: a tile is a box of IMAGES x BH x BW pixels, read at each tap's shift by one copy.

    The copy engine fills pixels outside the image with zeros and clips the output, so padding needs no masks.
    """
    PARTS: tl.constexpr = EDGE // BK
    n_h = tl.cdiv(YH, BH)
    n_w = tl.cdiv(YW, BW)
    m_tiles = tl.cdiv(N, IMAGES) * n_h * n_w
    for tile in range(tl.program_id(0), m_tiles * rows * GROUPS, tl.num_programs(0)):
        i_m, position = token_tile_and_row(tile, m_tiles, rows * GROUPS, group)
        i_row = tl.load(index + o_order + position)
        start = tl.load(index + o_ptr + i_row)
        end = tl.load(index + o_ptr + i_row + 1)
        i_n = i_m // (n_h * n_w) * IMAGES
        i_h = i_m // n_w % n_h * BH
        i_w = i_m % n_w * BW
        first_channel = i_row // rows * XC
        b_acc = tl.zeros((IMAGES * BH * BW, BN), tl.float32)
        col = tl.load(index + o_col + start, mask=start < end, other=0)
        slot = slots_of(index, o_slot, start, start < end, TRANSPOSED)
        for k in tl.range(start * PARTS, end * PARTS, num_stages=STAGES):
            part = k % PARTS * BK
            d_h, d_w, block = shift_of(col, cols, S, offset_h, offset_w, step_h, step_w, 1, 1)
            b_x = x_desc.load([i_n, i_h + d_h, i_w + d_w, first_channel + block * EDGE + part])
            b_x = b_x.reshape(IMAGES * BH * BW, BK)
            if TRANSPOSED:
                b_w = w_desc.load([slot * EDGE + part, 0])
            else:
                b_w = w_desc.load([slot * BN, part]).T
            k_next = (k + 1) // PARTS
            col = tl.load(index + o_col + k_next, mask=k_next < end, other=0)
            slot = slots_of(index, o_slot, k_next, k_next < end, TRANSPOSED)
            b_acc = dot(b_x, b_w, b_acc, "ieee")
        o_c = i_row % rows * BN + tl.arange(0, BN)
        if HAS_BIAS:
            p_bias = bias + i_row // rows * YC + o_c
            b_acc += tl.load(p_bias, mask=o_c < YC, other=0.0).to(tl.float32)[None, :]
        b_y = b_acc.to(y_desc.dtype).reshape(IMAGES, BH, BW, BN)
        y_desc.store([i_n, i_h, i_w, i_row // rows * YC + i_row % rows * BN], b_y)
