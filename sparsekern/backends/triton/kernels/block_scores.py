"""Frobenius norms of the blocks of dy^T x, stored or not, without the dense gradient in memory.

A program computes one tile of the dense gradient over all tokens in registers and writes one number per block. The
tokens can't be split: norms of parts don't add up.
"""

import triton
import triton.language as tl

from sparsekern.backends.triton.kernels.common import dot


@triton.jit
def store_norms(
    b_acc, scores, i_o, i_i, Ob, Ib, row_stride,
    TO: tl.constexpr, TI: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Norms of the blocks of a tile [TI, TO] of the dense gradient, to ``scores`` [Ob, Ib]."""
    b_square = tl.reshape(b_acc * b_acc, (TI // BI, BI, TO // BO, BO))
    b_norm = tl.sqrt_rn(tl.sum(tl.sum(b_square, 3), 1))
    o_i = i_i * (TI // BI) + tl.arange(0, TI // BI)
    o_o = i_o * (TO // BO) + tl.arange(0, TO // BO)
    m = (o_i < Ib)[:, None] & (o_o < Ob)[None, :]
    tl.store(scores + o_o[None, :] * row_stride + o_i[:, None], b_norm, mask=m)


@triton.jit(do_not_specialize=["M", "I", "O", "Ob", "Ib"])
def block_scores_kernel(
    x, dy, scores, M, I, O, x_stride, dy_stride, Ob, Ib,
    BT: tl.constexpr, TO: tl.constexpr, TI: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``scores`` [Ob, Ib] float32; the tile is TO x TI features, whole blocks of BO x BI; EVEN: I and O fill tiles."""
    i_o = tl.program_id(0)
    i_i = tl.program_id(1)
    o_x = i_i * TI + tl.arange(0, TI)
    o_dy = i_o * TO + tl.arange(0, TO)
    b_acc = tl.zeros((TI, TO), tl.float32)
    for t in tl.range(0, M, BT, num_stages=STAGES):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < M
        m_x = m_t[None, :] if EVEN else m_t[None, :] & (o_x < I)[:, None]
        m_dy = m_t[:, None] if EVEN else m_t[:, None] & (o_dy < O)[None, :]
        b_xt = tl.load(x + o_t.to(tl.int64)[None, :] * x_stride + o_x[:, None], mask=m_x, other=0.0)
        b_dy = tl.load(dy + o_t.to(tl.int64)[:, None] * dy_stride + o_dy[None, :], mask=m_dy, other=0.0)
        b_acc = dot(b_xt, b_dy, b_acc, PRECISION)
    store_norms(b_acc, scores, i_o, i_i, Ob, Ib, Ib, TO, TI, BO, BI)


@triton.jit(
    do_not_specialize=[
        "N", "H", "W", "P", "Q", "XC", "Ob", "Ib", "stride_h", "stride_w", "top", "left", "dilation_h", "dilation_w",
    ]
)  # fmt: skip
def conv2d_block_scores_kernel(
    x, dy, scores, N, H, W, P, Q, XC, YC, x_stride_n, x_stride_h, x_stride_w, dy_stride, Ob, Ib,
    stride_h, stride_w, top, left, dilation_h, dilation_w,
    BT: tl.constexpr, TO: tl.constexpr, TI: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr, GROUPS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``scores`` [GROUPS, Ob, TAPS, Ib]; x [N, H, W, GROUPS * XC], dy [N, P, Q, GROUPS * YC]; a program has one tap."""
    i_o = tl.program_id(0)
    i_i = tl.program_id(1)
    i_tap = tl.program_id(2) % TAPS
    i_group = tl.program_id(2) // TAPS
    d_h = i_tap // S * dilation_h - top
    d_w = i_tap % S * dilation_w - left
    o_c = i_i * TI + tl.arange(0, TI)
    o_x = d_h * x_stride_h + d_w * x_stride_w + (i_group * XC + o_c)
    o_x = tl.max_contiguous(tl.multiple_of(o_x, ALIGN), TI)
    o_f = i_o * TO + tl.arange(0, TO)
    m_f = o_f < YC
    if GROUPS > 1:
        o_f = tl.max_contiguous(tl.multiple_of(o_f + i_group * YC, ALIGN_Y), TO)
    b_acc = tl.zeros((TI, TO), tl.float32)
    for t in tl.range(0, N * P * Q, BT, num_stages=STAGES):
        o_t = t + tl.arange(0, BT)
        x_h = o_t // Q % P * stride_h
        x_w = o_t % Q * stride_w
        p_t = (o_t // (P * Q)).to(tl.int64) * x_stride_n + x_h.to(tl.int64) * x_stride_h + x_w * x_stride_w
        s_h = x_h + d_h
        s_w = x_w + d_w
        m_t = o_t < N * P * Q
        m_x = (m_t & (s_h >= 0) & (s_h < H) & (s_w >= 0) & (s_w < W))[None, :]
        m_dy = m_t[:, None]
        if not EVEN:
            m_x = m_x & (o_c < XC)[:, None]
            m_dy = m_dy & m_f[None, :]
        b_xt = tl.load(x + p_t[None, :] + o_x[:, None], mask=m_x, other=0.0)
        b_dy = tl.load(dy + o_t.to(tl.int64)[:, None] * dy_stride + o_f[None, :], mask=m_dy, other=0.0)
        b_acc = dot(b_xt, b_dy, b_acc, PRECISION)
    first = scores + (i_group * Ob * TAPS + i_tap) * Ib
    store_norms(b_acc, first, i_o, i_i, Ob, Ib, TAPS * Ib, TO, TI, BO, BI)
