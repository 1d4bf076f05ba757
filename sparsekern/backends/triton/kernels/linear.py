"""DSD and DDS kernels: y = x w^T + bias and dx = dy w, one product over the layout of w or its transpose.

Tokens lie on the M side of the tensor-core instruction and the features of one block on its N side, so that blocks of
16 and 32 are native shapes on Hopper (``m64n16k16``). Names follow the forward pass: ``x [M, K]`` is what is read,
``y [M, N]`` what is written, ``EDGE`` the block's edge along K and ``BN`` along N; dgrad reads dy and writes dx.

Three variants (``Tile.variant``):

- ``gather``: pointers and ``cp.async``; several blocks of a row fill one stage where they are narrower than it.
- ``tma``: descriptors; x boxes, weight blocks and the output go through the copy engine (sm_90 and later).
- ``union``: a program owns several block rows and reads each x tile once for all of them; absent blocks are zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsekern.backends.triton.kernels.common import dot

_PLAIN_INTS = ["M", "rows", "group", "o_ptr", "o_col", "o_slot", "o_order"]


@triton.jit
def token_tile_and_row(tile, m_tiles, rows, group):
    """Work item ``tile`` as (token tile, position in the order of rows).

    Token tiles of one group run through all rows before the next group starts, so x is read from memory once and
    stays in L2; within a group the rows come longest first, which balances the last wave.
    """
    in_group = group * rows
    first = tile // in_group * group
    height = tl.minimum(m_tiles - first, group)
    inside = tile % in_group
    return first + inside % height, inside // height


@triton.jit
def write_rows(b_acc, y, bias, o_m, o_y, m_y, M, y_stride, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        b_acc += tl.load(bias + o_y, mask=m_y, other=0.0).to(tl.float32)[None, :]
    p_y = y + o_m.to(tl.int64)[:, None] * y_stride + o_y[None, :]
    tl.store(p_y, b_acc.to(y.dtype.element_ty), mask=(o_m < M)[:, None] & m_y[None, :])


@triton.jit
def load_weights(
    values, slot, o_in, o_n, m_k, EDGE: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr, MASKED: tl.constexpr
):
    """[BK, BN] of the blocks ``slot`` (a scalar or one per k): stored [BN, EDGE], or [EDGE, BN] when transposed."""
    p_w = values + slot.to(tl.int64) * (EDGE * BN)
    if TRANSPOSED:
        p_w = (p_w + o_in * BN)[:, None] + o_n[None, :]
    else:
        p_w = (p_w + o_in)[:, None] + o_n[None, :] * EDGE
    if MASKED:
        return tl.load(p_w, mask=m_k[:, None], other=0.0)
    return tl.load(p_w)


@triton.jit
def slots_of(index, o_slot, k, m_k, TRANSPOSED: tl.constexpr):
    """Positions in ``values`` of the entries k: themselves, or through the permutation of the transpose."""
    if TRANSPOSED:
        return tl.load(index + o_slot + k, mask=m_k, other=0)
    return k


@triton.jit(do_not_specialize=_PLAIN_INTS)
def linear_gather_kernel(
    x, values, bias, y, index,
    M, K, N, x_stride, y_stride, rows, group,
    o_ptr, o_col, o_slot, o_order,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    PACK: tl.constexpr = BK // EDGE if BK > EDGE else 1
    PARTS: tl.constexpr = EDGE // BK if EDGE > BK else 1
    o_k = tl.arange(0, BK)
    o_n = tl.arange(0, BN)
    m_tiles = tl.cdiv(M, BM)
    for tile in range(tl.program_id(0), m_tiles * rows, tl.num_programs(0)):
        i_m, position = token_tile_and_row(tile, m_tiles, rows, group)
        i_row = tl.load(index + o_order + position)
        start = tl.load(index + o_ptr + i_row)
        end = tl.load(index + o_ptr + i_row + 1)
        o_m = i_m * BM + tl.arange(0, BM)
        # Rows past M read row 0 on: in bounds, and the store drops them.
        p_x = x + (o_m % M).to(tl.int64)[:, None] * x_stride
        b_acc = tl.zeros((BM, BN), tl.float32)
        # The index of the next stage is read one iteration early: no copy waits for it.
        if PACK > 1:
            o_j = o_k // EDGE
            o_in = o_k % EDGE
            k_next = start + o_j
            b_col = tl.load(index + o_col + k_next, mask=k_next < end, other=0)
            b_slot = slots_of(index, o_slot, k_next, k_next < end, TRANSPOSED)
            for k in tl.range(start, end, PACK, num_stages=STAGES):
                m_k = k + o_j < end
                # Without the hint on the sum the copies shrink from 16 bytes to 4.
                o_x = tl.max_contiguous(tl.multiple_of(b_col * EDGE + o_in, EDGE), EDGE)
                m_x = m_k if EVEN_K else m_k & (o_x < K)
                b_x = tl.load(p_x + o_x[None, :], mask=m_x[None, :], other=0.0)
                b_w = load_weights(values, b_slot, o_in, o_n, m_k, EDGE, BN, TRANSPOSED, True)
                k_next = k + PACK + o_j
                b_col = tl.load(index + o_col + k_next, mask=k_next < end, other=0)
                b_slot = slots_of(index, o_slot, k_next, k_next < end, TRANSPOSED)
                b_acc = dot(b_x, b_w, b_acc, PRECISION)
        else:
            col = tl.load(index + o_col + start, mask=start < end, other=0)
            slot = slots_of(index, o_slot, start, start < end, TRANSPOSED)
            for k in tl.range(start * PARTS, end * PARTS, num_stages=STAGES):
                o_in = k % PARTS * BK + o_k
                o_x = col * EDGE + o_in
                if EVEN_K:
                    b_x = tl.load(p_x + o_x[None, :])
                else:
                    b_x = tl.load(p_x + o_x[None, :], mask=(o_x < K)[None, :], other=0.0)
                b_w = load_weights(values, slot, o_in, o_n, o_in < EDGE, EDGE, BN, TRANSPOSED, False)
                k_next = (k + 1) // PARTS
                col = tl.load(index + o_col + k_next, mask=k_next < end, other=0)
                slot = slots_of(index, o_slot, k_next, k_next < end, TRANSPOSED)
                b_acc = dot(b_x, b_w, b_acc, PRECISION)
        o_y = i_row * BN + o_n
        write_rows(b_acc, y, bias, o_m, o_y, o_y < N, M, y_stride, HAS_BIAS)


@triton.jit(do_not_specialize=_PLAIN_INTS)
def linear_tma_kernel(
    x_desc, w_desc, y_desc, bias, index,
    M, N, rows, group,
    o_ptr, o_col, o_slot, o_order,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = EDGE // BK
    m_tiles = tl.cdiv(M, BM)
    for tile in range(tl.program_id(0), m_tiles * rows, tl.num_programs(0)):
        i_m, position = token_tile_and_row(tile, m_tiles, rows, group)
        i_row = tl.load(index + o_order + position)
        start = tl.load(index + o_ptr + i_row)
        end = tl.load(index + o_ptr + i_row + 1)
        b_acc = tl.zeros((BM, BN), tl.float32)
        col = tl.load(index + o_col + start, mask=start < end, other=0)
        slot = slots_of(index, o_slot, start, start < end, TRANSPOSED)
        for k in tl.range(start * PARTS, end * PARTS, num_stages=STAGES):
            part = k % PARTS * BK
            b_x = x_desc.load([i_m * BM, col * EDGE + part])
            if TRANSPOSED:
                b_w = w_desc.load([slot * EDGE + part, 0])
            else:
                b_w = w_desc.load([slot * BN, part]).T
            k_next = (k + 1) // PARTS
            col = tl.load(index + o_col + k_next, mask=k_next < end, other=0)
            slot = slots_of(index, o_slot, k_next, k_next < end, TRANSPOSED)
            b_acc = dot(b_x, b_w, b_acc, "ieee")
        if HAS_BIAS:
            o_y = i_row * BN + tl.arange(0, BN)
            b_acc += tl.load(bias + o_y, mask=o_y < N, other=0.0).to(tl.float32)[None, :]
        y_desc.store([i_m * BM, i_row * BN], b_acc.to(y_desc.dtype))


@triton.jit(do_not_specialize=["M", "rows", "panels", "group", "o_ptr", "o_slot", "o_union", "o_entry"])
def linear_union_kernel(
    x, values, bias, y, index,
    M, K, N, x_stride, y_stride, rows, panels, group,
    o_ptr, o_slot, o_union, o_entry,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, PANEL: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = EDGE // BK
    o_k = tl.arange(0, BK)
    o_n = tl.arange(0, PANEL * BN)
    o_r = o_n // BN
    o_in_row = tl.max_contiguous(tl.multiple_of(o_n % BN, BN), BN)
    m_tiles = tl.cdiv(M, BM)
    for tile in range(tl.program_id(0), m_tiles * panels, tl.num_programs(0)):
        i_m, i_panel = token_tile_and_row(tile, m_tiles, panels, group)
        o_row = i_panel * PANEL + o_r
        start = tl.load(index + o_union + i_panel)
        end = tl.load(index + o_union + i_panel + 1)
        o_m = i_m * BM + tl.arange(0, BM)
        p_x = x + (o_m % M).to(tl.int64)[:, None] * x_stride
        b_acc = tl.zeros((BM, PANEL * BN), tl.float32)
        # Next unread entry of each block row; it moves on where the row has the column.
        b_place = tl.load(index + o_ptr + o_row, mask=o_row < rows, other=0)
        for k in tl.range(start * PARTS, end * PARTS, num_stages=STAGES):
            entry = tl.load(index + o_entry + k // PARTS)
            m_r = (entry >> o_r) & 1 != 0
            b_slot = slots_of(index, o_slot, b_place, m_r, TRANSPOSED)
            o_in = k % PARTS * BK + o_k
            o_x = (entry >> PANEL) * EDGE + o_in
            if EVEN_K:
                b_x = tl.load(p_x + o_x[None, :])
            else:
                b_x = tl.load(p_x + o_x[None, :], mask=(o_x < K)[None, :], other=0.0)
            p_w = values + b_slot.to(tl.int64) * (EDGE * BN)
            if TRANSPOSED:
                p_w = (p_w + o_in_row)[None, :] + o_in[:, None] * BN
            else:
                p_w = (p_w + o_in_row * EDGE)[None, :] + o_in[:, None]
            b_w = tl.load(p_w, mask=m_r[None, :], other=0.0)
            b_place += tl.where(m_r & ((k + 1) % PARTS == 0), 1, 0)
            b_acc = dot(b_x, b_w, b_acc, PRECISION)
        o_y = i_panel * (PANEL * BN) + o_n
        write_rows(b_acc, y, bias, o_m, o_y, o_y < N, M, y_stride, HAS_BIAS)
