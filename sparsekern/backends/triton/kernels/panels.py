"""How weight-gradient kernels find their panel: up to PANEL stored blocks of one block row."""

import triton
import triton.language as tl


@triton.jit
def panel_of(
    index, o_ptr, rows, capacity, i_panel, ROWS: tl.constexpr, PANEL: tl.constexpr, EMPTY_TOO: tl.constexpr
):  # fmt: skip
    """Panel ``i_panel`` as (found, block row, its place within the row, first slot, blocks).

    Row lengths are data, so the list of panels is built here from row_ptr, in every program: a load, a scan and a few
    reductions over ROWS (a power of two above ``rows``) numbers. The spare slots count as one more row, number
    ``rows``. EMPTY_TOO: a row without blocks has one panel of none (its bias has a gradient).
    """
    o_r = tl.arange(0, ROWS)
    b_start = tl.load(index + o_ptr + o_r, mask=o_r <= rows, other=0)
    b_end = tl.load(index + o_ptr + o_r + 1, mask=o_r < rows, other=0)
    b_end = tl.where(o_r == rows, capacity, b_end)
    b_count = (b_end - b_start + PANEL - 1) // PANEL
    if EMPTY_TOO:
        b_count = tl.where(o_r < rows, tl.maximum(b_count, 1), b_count)
    b_before = tl.cumsum(b_count, 0) - b_count
    b_mine = (b_before <= i_panel) & (i_panel < b_before + b_count)
    found = tl.sum(b_mine.to(tl.int32), 0) != 0
    i_row = tl.sum(tl.where(b_mine, o_r, 0), 0)
    place = i_panel - tl.sum(tl.where(b_mine, b_before, 0), 0)
    first = tl.sum(tl.where(b_mine, b_start, 0), 0) + place * PANEL
    blocks = tl.minimum(tl.sum(tl.where(b_mine, b_end, 0), 0) - first, PANEL)
    return found, i_row, place, first, blocks


@triton.jit
def learning(element_mask, slot, element, m, BLOCK_BYTES: tl.constexpr):
    """Whether the element of each slot learns: one bit each, lowest bit first."""
    b_bits = tl.load(element_mask + slot.to(tl.int64) * BLOCK_BYTES + element // 8, mask=m, other=0)
    return (b_bits.to(tl.int32) >> (element % 8)) & 1 != 0


@triton.jit
def store_panel(
    b_acc, dvalues, element_mask, i_chunk, capacity, first, blocks,
    BO: tl.constexpr, BI: tl.constexpr, PANEL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Writes [PANEL * BI, BO] to the blocks of ``dvalues`` [chunks, capacity, BO, BI] from slot ``first`` on."""
    o_p = tl.arange(0, PANEL * BI)
    o_j = o_p // BI
    slot = (first + o_j)[:, None]
    m_j = (o_j < blocks)[:, None]
    element = tl.arange(0, BO)[None, :] * BI + (o_p % BI)[:, None]
    if MASKED:
        BLOCK_BYTES: tl.constexpr = (BO * BI + 7) // 8
        b_acc = tl.where(learning(element_mask, slot, element, m_j, BLOCK_BYTES), b_acc, 0.0)
    p_dw = dvalues + (i_chunk.to(tl.int64) * capacity + slot) * (BO * BI) + element
    tl.store(p_dw, b_acc.to(dvalues.dtype.element_ty), mask=m_j)


@triton.jit(do_not_specialize=["elements", "O", "chunks", "value_programs"])
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
        o = (i - value_programs).to(tl.int64) * SIZE + tl.arange(0, SIZE)  # both branches need one type
        m = o < O
        b_sum = tl.zeros((SIZE,), tl.float32)
        p = partial_bias + o
        for _ in range(chunks):
            b_sum += tl.load(p, mask=m, other=0.0)
            p += O
        tl.store(dbias + o, b_sum.to(dbias.dtype.element_ty), mask=m)
