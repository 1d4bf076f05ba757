// SPDX-License-Identifier: Apache-2.0
// What the kernels compute, by definition: loops over a dense weight, in double. Nothing here knows how a kernel works.
#pragma once

#include "blocks.h"

namespace sktest {

// A result and the sum of the absolute values of what was added up for it.
struct Sums {
    std::vector<double> value, magnitude;

    explicit Sums(int64_t size) : value(static_cast<size_t>(size), 0.0), magnitude(value) {}
    void add(int64_t i, double term) {
        value[static_cast<size_t>(i)] += term;
        magnitude[static_cast<size_t>(i)] += std::abs(term);
    }
};

// Operands in double, dense: x [N, H, W, C], dy [N, P, Q, O], bias [O], weight [O, C/g, T] of which the elements
// outside stored blocks do not exist (a NaN in x does not reach a result through them).
struct Operands {
    std::vector<double> x, dy, bias, weight;
    std::vector<char> exists;
};

// Calls visit(slot, element of the block, index into weight [O, C/g, T] or -1 in the padding of an edge block).
template <class Visit> void for_each_element(const Problem &a, const Blocks &blocks, Visit visit) {
    const int64_t out = a.out_per_group(), in = a.in_per_group(), taps = a.taps();
    for (int64_t g = 0; g < a.groups; ++g)
        for (int64_t row = 0; row < a.rows(); ++row)
            for (int64_t tap = 0; tap < taps; ++tap)
                for (int64_t col = 0; col < a.cols(); ++col) {
                    const int64_t slot = blocks.slot(g, row, tap, col);
                    if (slot < 0) continue;
                    for (int64_t i = 0; i < int64_t{a.bo} * a.bi; ++i) {
                        const int64_t o = row * a.bo + i / a.bi, c = col * a.bi + i % a.bi;
                        visit(slot, i, o < out && c < in ? ((g * out + o) * in + c) * taps + tap : -1);
                    }
                }
}

// Calls visit(index into x, index into weight, index into dy) for each product of the layer.
template <class Visit> void for_each_product(const Problem &a, const Operands &operands, Visit visit) {
    const int64_t out = a.out_per_group(), in = a.in_per_group(), taps = a.taps();
    for (int64_t o = 0; o < a.o; ++o)
        for (int64_t k = 0; k < in; ++k)
            for (int64_t t = 0; t < taps; ++t) {
                const int64_t at_weight = (o * in + k) * taps + t;
                if (!operands.exists[static_cast<size_t>(at_weight)]) continue;
                for (int64_t n = 0; n < a.n; ++n)
                    for (int64_t p = 0; p < a.p; ++p)
                        for (int64_t q = 0; q < a.q; ++q) {
                            const int64_t h = p * a.stride_h - a.pad_top + t / a.s * a.dilation_h;
                            const int64_t w = q * a.stride_w - a.pad_left + t % a.s * a.dilation_w;
                            if (h < 0 || h >= a.h || w < 0 || w >= a.w) continue;
                            visit(((n * a.h + h) * a.w + w) * a.c + o / out * in + k, at_weight,
                                  ((n * a.p + p) * a.q + q) * a.o + o);
                        }
            }
}

inline double value_at(const std::vector<double> &values, int64_t i) {
    return values[static_cast<size_t>(i)];
}

// Products multiply operands as mma takes them; what is only added (bias, dy in dbias) keeps all its digits.
inline Sums reference_forward(const Problem &a, const Operands &operands, bool with_bias) {
    Sums y(a.n * a.p * a.q * a.o);
    for (int64_t i = 0; with_bias && i < a.n * a.p * a.q * a.o; ++i) y.add(i, value_at(operands.bias, i % a.o));
    for_each_product(a, operands, [&](int64_t x, int64_t w, int64_t to) {
        y.add(to, operand(a.dtype, value_at(operands.x, x)) * operand(a.dtype, value_at(operands.weight, w)));
    });
    return y;
}
inline Sums reference_dgrad(const Problem &a, const Operands &operands) {
    Sums dx(a.n * a.h * a.w * a.c);
    for_each_product(a, operands, [&](int64_t to, int64_t w, int64_t dy) {
        dx.add(to, operand(a.dtype, value_at(operands.dy, dy)) * operand(a.dtype, value_at(operands.weight, w)));
    });
    return dx;
}
inline Sums reference_wgrad(const Problem &a, const Operands &operands) {
    Sums dw(int64_t{a.o} * a.in_per_group() * a.taps());
    for_each_product(a, operands, [&](int64_t x, int64_t to, int64_t dy) {
        dw.add(to, operand(a.dtype, value_at(operands.dy, dy)) * operand(a.dtype, value_at(operands.x, x)));
    });
    return dw;
}
inline Sums reference_dbias(const Problem &a, const Operands &operands) {
    Sums dbias(a.o);
    for (int64_t i = 0; i < a.n * a.p * a.q * a.o; ++i) dbias.add(i % a.o, value_at(operands.dy, i));
    return dbias;
}

}  // namespace sktest
