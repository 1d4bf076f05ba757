// SPDX-License-Identifier: Apache-2.0
// The packed layout as native code sees it, and the arguments of every operator. No PyTorch, no Python.
#pragma once

#include <cstdint>

namespace sparsekern {

// Views over the packed int32 buffer of sparsekern/layout.py, in buffer order.
struct Layout {
    int64_t groups, rows, taps, cols;  // G, Ob and Ib of one group, T = R * S
    int64_t capacity;                  // block slots; row_ptr[groups * rows] of them are used
    int64_t bo, bi;
    const int32_t *row_ptr, *col, *row, *t_ptr, *t_row, *t_perm, *row_order, *t_order;

    Layout(const int32_t *index, int64_t groups, int64_t rows, int64_t taps, int64_t cols, int64_t capacity, int64_t bo,
           int64_t bi)
        : groups(groups), rows(rows), taps(taps), cols(cols), capacity(capacity), bo(bo), bi(bi) {
        row_ptr = index;
        col = row_ptr + groups * rows + 1;
        row = col + capacity;
        t_ptr = row + capacity;
        t_row = t_ptr + groups * cols + 1;
        t_perm = t_row + capacity;
        row_order = t_perm + capacity;
        t_order = row_order + groups * rows;
    }
    int64_t nnz() const { return row_ptr[groups * rows]; }
};

// y = x w^T + bias, dx = dy w, dw = dy^T x. Rows of x, y, dy, dx are ld* floats apart, features contiguous.
struct LinearArgs {
    Layout layout;
    int64_t m, out_features, in_features;
    int threads;
};

struct Conv2dArgs {
    Layout layout;
    int64_t n, c, h, w;  // input image; c counts all groups
    int64_t o, p, q;     // output image; o counts all groups
    int64_t r, s;        // filter taps
    int64_t stride_h, stride_w;
    int64_t pad_top, pad_left;  // bottom and right follow from p and q: a tap outside the image reads zero
    int64_t dilation_h, dilation_w;
    bool channels_last;  // memory order of every image: N,H,W,C or N,C,H,W, dense
    int threads;
};

// One table per instruction set; entries are never null.
struct KernelTable {
    const char *name;
    // values [capacity, bo, bi]; bias [O] or null
    void (*linear_forward)(const LinearArgs &, const float *x, int64_t ldx, const float *values, const float *bias,
                           float *y, int64_t ldy);
    void (*linear_dgrad)(const LinearArgs &, const float *dy, int64_t lddy, const float *values, float *dx,
                         int64_t lddx);
    // Writes every slot of dvalues: zero in spare slots, in the padding of edge blocks and where `element_mask`
    // (packed bits [capacity, ceil(bo*bi/8)], lowest bit first, or null) is 0. dbias [O] or null.
    void (*linear_wgrad)(const LinearArgs &, const float *dy, int64_t lddy, const float *x, int64_t ldx,
                         const uint8_t *element_mask, float *dvalues, float *dbias);
    void (*conv2d_forward)(const Conv2dArgs &, const float *x, const float *values, const float *bias, float *y);
    void (*conv2d_dgrad)(const Conv2dArgs &, const float *dy, const float *values, float *dx);
    void (*conv2d_wgrad)(const Conv2dArgs &, const float *dy, const float *x, const uint8_t *element_mask,
                         float *dvalues, float *dbias);
};

}  // namespace sparsekern
