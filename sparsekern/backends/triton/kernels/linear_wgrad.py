"""SDD kernels: dw = dy^T x at the stored blocks, and dbias = the column sums of dy.

A program owns one panel (up to PANEL stored blocks of one block row, so that dy's features are read once for all of
them) and one chunk of the tokens. The gathered x features lie on the M side of the tensor-core instruction and the
block's output features on its N side: narrow blocks stay native shapes. Chunks are summed by a second kernel in a fixed
order, so the result does not depend on scheduling.
"""

import triton
import triton.language as tl

from sparsekern.backends.triton.kernels.common import dot


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


@triton.jit
def learning(element_mask, slot, element, m, BLOCK_BYTES: tl.constexpr):
    """Whether the element of each slot learns: one bit each, lowest bit first."""
    b_bits = tl.load(element_mask + slot.to(tl.int64) * BLOCK_BYTES + element // 8, mask=m, other=0)
    return (b_bits.to(tl.int32) >> (element % 8)) & 1 != 0


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
    i_panel = tl.program_id(0)
    i_chunk = tl.program_id(1)
    # Which panel of which row: row lengths are data, so the list of panels is built here from row_ptr. The spare slots
    # count as one more row, whose panels write zeros.
    o_r = tl.arange(0, ROWS)
    b_start = tl.load(index + o_ptr + o_r, mask=o_r <= rows, other=0)
    b_end = tl.load(index + o_ptr + o_r + 1, mask=o_r < rows, other=0)
    b_end = tl.where(o_r == rows, capacity, b_end)
    b_count = (b_end - b_start + PANEL - 1) // PANEL
    if WITH_BIAS:
        b_count = tl.where(o_r < rows, tl.maximum(b_count, 1), b_count)  # an empty row still has a bias
    b_before = tl.cumsum(b_count, 0) - b_count
    b_mine = (b_before <= i_panel) & (i_panel < b_before + b_count)
    if tl.sum(b_mine.to(tl.int32), 0) == 0:
        return
    i_row = tl.sum(tl.where(b_mine, o_r, 0), 0)
    place = i_panel - tl.sum(tl.where(b_mine, b_before, 0), 0)
    first = tl.sum(tl.where(b_mine, b_start, 0), 0) + place * PANEL
    blocks = tl.minimum(tl.sum(tl.where(b_mine, b_end, 0), 0) - first, PANEL)

    o_p = tl.arange(0, PANEL * BI)
    o_j = o_p // BI
    o_in = o_p % BI
    o_out = tl.arange(0, BO)
    m_j = o_j < blocks
    b_acc = tl.zeros((PANEL * BI, BO), tl.float32)
    if i_row < rows:
        b_col = tl.load(index + o_col + first + o_j, mask=m_j, other=0)
        o_x = tl.max_contiguous(tl.multiple_of(b_col * BI + o_in, BI), BI)
        m_x = m_j if EVEN_I else m_j & (o_x < I)
        o_dy = i_row * BO + o_out
        m_dy = o_dy < O
        t = i_chunk * chunk
        last = tl.minimum(t + chunk, M)
        # dbias comes with the row's first panel; in the others its registers are free.
        if WITH_BIAS and place == 0:
            b_bias = tl.zeros((BT, BO), tl.float32)
            b_acc, b_bias = accumulate(
                x,
                dy,
                b_acc,
                b_bias,
                o_x,
                m_x,
                o_dy,
                m_dy,
                t,
                last,
                x_stride,
                dy_stride,
                BT,
                EVEN_O,
                True,
                PRECISION,
                STAGES,
            )
            b_sum = tl.sum(b_bias, 0).to(dbias.dtype.element_ty)
            tl.store(dbias + i_chunk.to(tl.int64) * O + o_dy, b_sum, mask=m_dy)
        else:
            b_acc, _ = accumulate(
                x,
                dy,
                b_acc,
                0.0,
                o_x,
                m_x,
                o_dy,
                m_dy,
                t,
                last,
                x_stride,
                dy_stride,
                BT,
                EVEN_O,
                False,
                PRECISION,
                STAGES,
            )
    slot = first + o_j
    element = o_out[None, :] * BI + o_in[:, None]
    p_dw = dvalues + i_chunk.to(tl.int64) * capacity * (BO * BI) + (slot.to(tl.int64) * (BO * BI))[:, None] + element
    if MASKED:
        BLOCK_BYTES: tl.constexpr = (BO * BI + 7) // 8
        b_acc = tl.where(learning(element_mask, slot[:, None], element, m_j[:, None], BLOCK_BYTES), b_acc, 0.0)
    tl.store(p_dw, b_acc.to(dvalues.dtype.element_ty), mask=m_j[:, None])


@triton.jit(do_not_specialize=["elements", "O", "chunks"])
def sum_chunks_kernel(
    partial, partial_bias, dvalues, dbias, element_mask, elements, O, chunks, value_programs,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, WITH_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Second pass: sums [chunks, elements] and [chunks, O] over the chunks; BLOCK is the elements of one block."""
    i = tl.program_id(0)
    if i < value_programs:
        o = i.to(tl.int64) * SIZE + tl.arange(0, SIZE)
        m = o < elements
        b_sum = tl.zeros((SIZE,), tl.float32)
        p = partial + o
        for _ in range(chunks):
            b_sum += tl.load(p, mask=m, other=0.0)
            p += elements
        if MASKED:
            BLOCK_BYTES: tl.constexpr = (BLOCK + 7) // 8
            b_sum = tl.where(learning(element_mask, o // BLOCK, (o % BLOCK).to(tl.int32), m, BLOCK_BYTES), b_sum, 0.0)
        tl.store(dvalues + o, b_sum.to(dvalues.dtype.element_ty), mask=m)
    elif WITH_BIAS:
        o = (i - value_programs) * SIZE + tl.arange(0, SIZE)
        m = o < O
        b_sum = tl.zeros((SIZE,), tl.float32)
        p = partial_bias + o
        for _ in range(chunks):
            b_sum += tl.load(p, mask=m, other=0.0)
            p += O
        tl.store(dbias + o, b_sum.to(dbias.dtype.element_ty), mask=m)
