"""SDD over pixels: dw of a convolution at the stored blocks, and dbias.

As for linear layers, with output pixels as tokens: a panel's blocks of one block row may have different taps, each of
which reads the image x shifted by its own offset.
"""

import triton
import triton.language as tl

from sparsekern.backends.triton.kernels.common import dot
from sparsekern.backends.triton.kernels.panels import panel_of, store_panel


@triton.jit
def accumulate_pixels(
    x, dy, b_acc, b_bias, o_x, d_h, d_w, m_x, o_dy, m_dy, first, last,
    H, W, P, Q, x_stride_n, x_stride_h, x_stride_w, dy_stride, stride_h, stride_w,
    BT: tl.constexpr, EVEN_O: tl.constexpr, SUM_DY: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds x^T dy over the output pixels first..last; x at ``(p * stride_h + d_h, q * stride_w + d_w)`` per channel."""
    for t in tl.range(first, last, BT, num_stages=STAGES):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < last
        x_h = o_t // Q % P * stride_h
        x_w = o_t % Q * stride_w
        p_t = (o_t // (P * Q)).to(tl.int64) * x_stride_n + x_h.to(tl.int64) * x_stride_h + x_w * x_stride_w
        s_h = x_h[None, :] + d_h[:, None]
        s_w = x_w[None, :] + d_w[:, None]
        m = m_t[None, :] & m_x[:, None] & (s_h >= 0) & (s_h < H) & (s_w >= 0) & (s_w < W)
        b_xt = tl.load(x + p_t[None, :] + o_x[:, None], mask=m, other=0.0)
        p_dy = dy + o_t.to(tl.int64)[:, None] * dy_stride + o_dy[None, :]
        b_dy = tl.load(p_dy, mask=m_t[:, None] if EVEN_O else m_t[:, None] & m_dy[None, :], other=0.0)
        b_acc = dot(b_xt, b_dy, b_acc, PRECISION)
        if SUM_DY:
            b_bias += b_dy.to(tl.float32)
    return b_acc, b_bias


@triton.jit(
    do_not_specialize=[
        "N", "H", "W", "P", "Q", "XC", "rows", "cols", "capacity", "chunk",
        "stride_h", "stride_w", "top", "left", "dilation_h", "dilation_w", "o_ptr", "o_col",
    ]
)  # fmt: skip
def conv2d_wgrad_kernel(
    x, dy, dvalues, dbias, index, element_mask,
    N, H, W, P, Q, XC, YC, x_stride_n, x_stride_h, x_stride_w, dy_stride,
    rows, cols, capacity, chunk, stride_h, stride_w, top, left, dilation_h, dilation_w, o_ptr, o_col,
    ROWS: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, PANEL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    EVEN_O: tl.constexpr, EVEN_I: tl.constexpr, WITH_BIAS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [N, H, W, GROUPS * XC], dy [N, P, Q, GROUPS * YC]; ``rows``, ``cols``: block rows and columns of a group."""
    i_chunk = tl.program_id(1)
    found, i_row, place, first, blocks = panel_of(
        index, o_ptr, rows * GROUPS, capacity, tl.program_id(0), ROWS, PANEL, WITH_BIAS
    )
    if not found:
        return
    b_acc = tl.zeros((PANEL * BI, BO), tl.float32)
    if i_row < rows * GROUPS:
        o_p = tl.arange(0, PANEL * BI)
        m_x = o_p // BI < blocks
        b_col = tl.load(index + o_col + first + o_p // BI, mask=m_x, other=0)
        tap = b_col // cols
        d_h = tap // S * dilation_h - top
        d_w = tap % S * dilation_w - left
        o_c = b_col % cols * BI + o_p % BI
        if not EVEN_I:
            m_x = m_x & (o_c < XC)
        i_group = i_row // rows
        o_x = d_h * x_stride_h + d_w * x_stride_w + (i_group * XC + o_c)
        o_x = tl.max_contiguous(tl.multiple_of(o_x, ALIGN), BI)
        o_dy = i_row % rows * BO + tl.arange(0, BO)
        m_dy = o_dy < YC
        if GROUPS > 1:
            o_dy = tl.max_contiguous(tl.multiple_of(o_dy + i_group * YC, ALIGN_Y), BO)
        t = i_chunk * chunk
        last = tl.minimum(t + chunk, N * P * Q)
        if WITH_BIAS and place == 0:
            b_bias = tl.zeros((BT, BO), tl.float32)
            b_acc, b_bias = accumulate_pixels(
                x, dy, b_acc, b_bias, o_x, d_h, d_w, m_x, o_dy, m_dy, t, last,
                H, W, P, Q, x_stride_n, x_stride_h, x_stride_w, dy_stride, stride_h, stride_w,
                BT, EVEN_O, True, PRECISION, STAGES,
            )  # fmt: skip
            b_sum = tl.sum(b_bias, 0).to(dbias.dtype.element_ty)
            tl.store(dbias + i_chunk.to(tl.int64) * (YC * GROUPS) + o_dy, b_sum, mask=m_dy)
        else:
            b_acc, _ = accumulate_pixels(
                x, dy, b_acc, 0.0, o_x, d_h, d_w, m_x, o_dy, m_dy, t, last,
                H, W, P, Q, x_stride_n, x_stride_h, x_stride_w, dy_stride, stride_h, stride_w,
                BT, EVEN_O, False, PRECISION, STAGES,
            )  # fmt: skip
    store_panel(b_acc, dvalues, element_mask, i_chunk, capacity, first, blocks, BO, BI, PANEL, MASKED)
