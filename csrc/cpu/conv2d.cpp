// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "isa.h"

namespace sparsekern {
namespace SK_ISA {
namespace {

int64_t at(const Conv2dArgs &a, int64_t n, int64_t c, int64_t y, int64_t x, int64_t cs, int64_t h, int64_t w) {
    return a.channels_last ? ((n * h + y) * w + x) * cs + c : ((n * cs + c) * h + y) * w + x;
}

// Calls f(slot, in-block row, in-block column, output channel, input channel, tap row, tap column).
template <class F> void each_weight(const Conv2dArgs &a, F f) {
    const Layout &l = a.layout;
    const int64_t og = a.o / l.groups, cg = a.c / l.groups;
    for (int64_t row = 0; row < l.groups * l.rows; ++row)
        for (int64_t slot = l.row_ptr[row]; slot < l.row_ptr[row + 1]; ++slot) {
            const int64_t g = row / l.rows, tap = l.col[slot] / l.cols, ib = l.col[slot] % l.cols;
            for (int64_t m = 0; m < l.bo && (row % l.rows) * l.bo + m < og; ++m)
                for (int64_t k = 0; k < l.bi && ib * l.bi + k < cg; ++k)
                    f(slot, m, k, g * og + (row % l.rows) * l.bo + m, g * cg + ib * l.bi + k, tap / a.s, tap % a.s);
        }
}

template <class F> void each_pixel(const Conv2dArgs &a, int64_t r, int64_t s, F f) {
    for (int64_t n = 0; n < a.n; ++n)
        for (int64_t p = 0; p < a.p; ++p)
            for (int64_t q = 0; q < a.q; ++q) {
                const int64_t y = p * a.stride_h + r * a.dilation_h - a.pad_top;
                const int64_t x = q * a.stride_w + s * a.dilation_w - a.pad_left;
                if (y >= 0 && y < a.h && x >= 0 && x < a.w) f(n, p, q, y, x);
            }
}

}  // namespace

void conv2d_forward(const Conv2dArgs &a, const float *x, const float *values, const float *bias, float *y) {
    for (int64_t n = 0; n < a.n; ++n)
        for (int64_t o = 0; o < a.o; ++o)
            for (int64_t p = 0; p < a.p; ++p)
                for (int64_t q = 0; q < a.q; ++q) y[at(a, n, o, p, q, a.o, a.p, a.q)] = bias ? bias[o] : 0.0f;
    each_weight(a, [&](int64_t slot, int64_t m, int64_t k, int64_t o, int64_t c, int64_t r, int64_t s) {
        const float w = values[(slot * a.layout.bo + m) * a.layout.bi + k];
        each_pixel(a, r, s, [&](int64_t n, int64_t p, int64_t q, int64_t yy, int64_t xx) {
            y[at(a, n, o, p, q, a.o, a.p, a.q)] += w * x[at(a, n, c, yy, xx, a.c, a.h, a.w)];
        });
    });
}

void conv2d_dgrad(const Conv2dArgs &a, const float *dy, const float *values, float *dx) {
    memset(dx, 0, sizeof(float) * size_t(a.n * a.c * a.h * a.w));
    each_weight(a, [&](int64_t slot, int64_t m, int64_t k, int64_t o, int64_t c, int64_t r, int64_t s) {
        const float w = values[(slot * a.layout.bo + m) * a.layout.bi + k];
        each_pixel(a, r, s, [&](int64_t n, int64_t p, int64_t q, int64_t yy, int64_t xx) {
            dx[at(a, n, c, yy, xx, a.c, a.h, a.w)] += w * dy[at(a, n, o, p, q, a.o, a.p, a.q)];
        });
    });
}

void conv2d_wgrad(const Conv2dArgs &a, const float *dy, const float *x, const uint8_t *element_mask, float *dvalues,
                  float *dbias) {
    const Layout &l = a.layout;
    memset(dvalues, 0, sizeof(float) * size_t(l.capacity * l.bo * l.bi));
    each_weight(a, [&](int64_t slot, int64_t m, int64_t k, int64_t o, int64_t c, int64_t r, int64_t s) {
        const int64_t bit = m * l.bi + k;
        if (element_mask && !(element_mask[slot * ((l.bo * l.bi + 7) / 8) + bit / 8] >> (bit % 8) & 1)) return;
        float sum = 0;
        each_pixel(a, r, s, [&](int64_t n, int64_t p, int64_t q, int64_t yy, int64_t xx) {
            sum += dy[at(a, n, o, p, q, a.o, a.p, a.q)] * x[at(a, n, c, yy, xx, a.c, a.h, a.w)];
        });
        dvalues[slot * l.bo * l.bi + bit] = sum;
    });
    for (int64_t o = 0; dbias && o < a.o; ++o) {
        float sum = 0;
        for (int64_t n = 0; n < a.n; ++n)
            for (int64_t p = 0; p < a.p; ++p)
                for (int64_t q = 0; q < a.q; ++q) sum += dy[at(a, n, o, p, q, a.o, a.p, a.q)];
        dbias[o] = sum;
    }
}

}  // namespace SK_ISA
}  // namespace sparsekern
