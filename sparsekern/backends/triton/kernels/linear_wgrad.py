"""SDD kernels: dw = dy^T x at the stored blocks, and dbias = the column sums of dy.

A program owns one panel (up to PANEL stored blocks of one block row, so that dy's features are read once for all of
them) and one chunk of the tokens. The gathered x features lie on the M side of the tensor-core instruction and the
block's output features on its N side: narrow blocks stay native shapes. Chunks are summed by a second kernel in a fixed
order, so the result does not depend on scheduling.
"""

import triton
import triton.language as tl

from sparsekern.backends.triton.kernels.common import dot
from sparsekern.backends.triton.kernels.panels import panel_of, store_panel


@triton.jit
def accumulate(
    x, dy, b_acc, b_bias, o_x, m_x, o_dy, m_dy, first, last, x_stride, dy_stride,
    BT: tl.constexpr, EVEN_O: tl.constexpr, SUM_DY: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds x^T dy over the tokens first..last, and dy itself token by token of a stage if SUM_DY.

    x is addressed as its transpose: through ``tl.trans`` the copies of sm_80 are not asynchronous.
    """
    for t in tl.range(first, last, BT, num_stages=STAGES):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < last
        p_x = x + o_t.to(tl.int64)[None, :] * x_stride + o_x[:, None]
        p_dy = dy + o_t.to(tl.int64)[:, None] * dy_stride + o_dy[None, :]
        b_xt = tl.load(p_x, mask=m_t[None, :] & m_x[:, None], other=0.0)
        b_dy = tl.load(p_dy, mask=m_t[:, None] if EVEN_O else m_t[:, None] & m_dy[None, :], other=0.0)
        b_acc = dot(b_xt, b_dy, b_acc, PRECISION)
        if SUM_DY:
            b_bias += b_dy.to(tl.float32)
    return b_acc, b_bias


@triton.jit(do_not_specialize=["M", "rows", "capacity", "chunk", "o_ptr", "o_col"])
def linear_wgrad_kernel(
    x, dy, dvalues, dbias, index, element_mask,
    M, I, O, x_stride, dy_stride, rows, capacity, chunk, o_ptr, o_col,
    ROWS: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, PANEL: tl.constexpr,
    EVEN_O: tl.constexpr, EVEN_I: tl.constexpr, WITH_BIAS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``dvalues`` [chunks, capacity, BO, BI] and ``dbias`` [chunks, O]; ROWS is a power of two above ``rows``.

    EVEN_O, EVEN_I: features fill whole blocks. A mask of single features would cut the copies to one element.
    """
    i_chunk = tl.program_id(1)
    found, i_row, place, first, blocks = panel_of(
        index, o_ptr, rows, capacity, tl.program_id(0), ROWS, PANEL, WITH_BIAS
    )
    if not found:
        return
    b_acc = tl.zeros((PANEL * BI, BO), tl.float32)
    if i_row < rows:
        o_p = tl.arange(0, PANEL * BI)
        m_x = o_p // BI < blocks
        b_col = tl.load(index + o_col + first + o_p // BI, mask=m_x, other=0)
        o_x = tl.max_contiguous(tl.multiple_of(b_col * BI + o_p % BI, BI), BI)
        if not EVEN_I:
            m_x = m_x & (o_x < I)
        o_dy = i_row * BO + tl.arange(0, BO)
        m_dy = o_dy < O
        t = i_chunk * chunk
        last = tl.minimum(t + chunk, M)
        # dbias comes with the row's first panel; in the others its registers are free.
        if WITH_BIAS and place == 0:
            b_bias = tl.zeros((BT, BO), tl.float32)
            b_acc, b_bias = accumulate(
                x, dy, b_acc, b_bias, o_x, m_x, o_dy, m_dy, t, last, x_stride, dy_stride,
                BT, EVEN_O, True, PRECISION, STAGES,
            )  # fmt: skip
            b_sum = tl.sum(b_bias, 0).to(dbias.dtype.element_ty)
            tl.store(dbias + i_chunk.to(tl.int64) * O + o_dy, b_sum, mask=m_dy)
        else:
            b_acc, _ = accumulate(
                x, dy, b_acc, 0.0, o_x, m_x, o_dy, m_dy, t, last, x_stride, dy_stride,
                BT, EVEN_O, False, PRECISION, STAGES,
            )  # fmt: skip
    store_panel(b_acc, dvalues, element_mask, i_chunk, capacity, first, blocks, BO, BI, PANEL, MASKED)
