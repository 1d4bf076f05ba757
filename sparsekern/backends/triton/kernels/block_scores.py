"""Frobenius norms of the blocks of dy^T x, stored or not, without the dense gradient in memory.

A program computes one tile of the dense gradient over all tokens in registers and writes one number per block. The
tokens can't be split: norms of parts don't add up.
"""

import triton
import triton.language as tl

from sparsekern.backends.triton.kernels.common import dot


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
    b_square = tl.reshape(b_acc * b_acc, (TI // BI, BI, TO // BO, BO))
    b_norm = tl.sqrt_rn(tl.sum(tl.sum(b_square, 3), 1))
    o_i = i_i * (TI // BI) + tl.arange(0, TI // BI)
    o_o = i_o * (TO // BO) + tl.arange(0, TO // BO)
    tl.store(scores + o_o[None, :] * Ib + o_i[:, None], b_norm, mask=(o_i < Ib)[:, None] & (o_o < Ob)[None, :])
