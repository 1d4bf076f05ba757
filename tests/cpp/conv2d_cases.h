// SPDX-License-Identifier: Apache-2.0
// The three convolution kernels against loops in double.
#pragma once

#include "weights.h"

namespace sktest {

struct Conv2dCase {
    int64_t n, c, h, w, o;  // c and o count all groups
    int64_t r, s, groups, bo, bi;
    int64_t stride_h, stride_w, dilation_h, dilation_w;
    int64_t pad[4];  // top, bottom, left, right
    double density;
    bool empty;
    int64_t spare, skew;
    bool bias, mask, channels_last;
    int threads;

    int64_t p() const { return (h + pad[0] + pad[1] - dilation_h * (r - 1) - 1) / stride_h + 1; }
    int64_t q() const { return (w + pad[2] + pad[3] - dilation_w * (s - 1) - 1) / stride_w + 1; }
    bool fits() const {
        return h + pad[0] + pad[1] > dilation_h * (r - 1) && w + pad[2] + pad[3] > dilation_w * (s - 1);
    }
    std::string text() const {
        char line[320];
        std::snprintf(
            line, sizeof line,
            "x=[%ld,%ld,%ld,%ld] O=%ld kernel=%ldx%ld groups=%ld block=%ldx%ld stride=%ld,%ld dilation=%ld,%ld "
            "pad=%ld,%ld,%ld,%ld density=%.2f empty=%d spare=%ld skew=%ld bias=%d mask=%d %s threads=%d",
            long(n), long(c), long(h), long(w), long(o), long(r), long(s), long(groups), long(bo), long(bi),
            long(stride_h), long(stride_w), long(dilation_h), long(dilation_w), long(pad[0]), long(pad[1]),
            long(pad[2]), long(pad[3]), density, empty, long(spare), long(skew), bias, mask,
            channels_last ? "NHWC" : "NCHW", threads);
        return line;
    }
};

// Image batch [n, c, h, w], dense in either memory order.
struct Images {
    int64_t n, c, h, w;
    bool channels_last;
    Buffer data;

    Images(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, int64_t skew)
        : n(n), c(c), h(h), w(w), channels_last(channels_last), data(n * c * h * w, kNaN, skew) {}
    int64_t at(int64_t in, int64_t ic, int64_t ih, int64_t iw) const {
        return channels_last ? ((in * h + ih) * w + iw) * c + ic : ((in * c + ic) * h + ih) * w + iw;
    }
};

inline void run_conv2d(const Conv2dCase &c, uint64_t seed, Tally &tally) {
    if (!tally.samples(seed)) return;
    Random random(seed);
    const int64_t p = c.p(), q = c.q(), out = c.o / c.groups, in = c.c / c.groups, taps = c.r * c.s;
    const Blocks blocks(c.groups, (out + c.bo - 1) / c.bo, taps, (in + c.bi - 1) / c.bi, c.bo, c.bi, c.density, c.empty,
                        c.spare, random);
    const Weights weights(blocks, out, in, random);
    const std::vector<double> w = weights.dense();
    Images x(c.n, c.c, c.h, c.w, c.channels_last, c.skew), dy(c.n, c.o, p, q, c.channels_last, c.skew);
    random.fill(x.data), random.fill(dy.data);
    Buffer bias(c.o);
    random.fill(bias);
    const Conv2dArgs args{blocks.layout(),
                          c.n,
                          c.c,
                          c.h,
                          c.w,
                          c.o,
                          p,
                          q,
                          c.r,
                          c.s,
                          c.stride_h,
                          c.stride_w,
                          c.pad[0],
                          c.pad[2],
                          c.dilation_h,
                          c.dilation_w,
                          c.channels_last,
                          c.threads};
    const KernelTable &table = kernels();

    // One pass over all products: x element, weight element, y element.
    const auto products = [&](auto visit) {
        for (int64_t n = 0; n < c.n; ++n)
            for (int64_t o = 0; o < c.o; ++o)
                for (int64_t k = 0; k < in; ++k)
                    for (int64_t t = 0; t < taps; ++t)
                        for (int64_t ip = 0; ip < p; ++ip)
                            for (int64_t iq = 0; iq < q; ++iq) {
                                const int64_t ih = ip * c.stride_h - c.pad[0] + t / c.s * c.dilation_h;
                                const int64_t iw = iq * c.stride_w - c.pad[2] + t % c.s * c.dilation_w;
                                if (ih < 0 || ih >= c.h || iw < 0 || iw >= c.w) continue;
                                visit(x.at(n, o / out * in + k, ih, iw), (o * in + k) * taps + t, dy.at(n, o, ip, iq));
                            }
    };
    const auto sums = [](int64_t size) { return std::vector<double>(static_cast<size_t>(size), 0.0); };

    if (tally.wants("conv2d_forward")) {
        Images y(c.n, c.o, p, q, c.channels_last, c.skew), again(c.n, c.o, p, q, c.channels_last, c.skew);
        for (Images *target : {&y, &again})
            table.conv2d_forward(args, x.data.begin(), weights.values.begin(), c.bias ? bias.begin() : nullptr,
                                 target->data.begin());
        std::vector<double> want = sums(y.data.size()), magnitude = want;
        if (c.bias)
            for (int64_t n = 0; n < c.n; ++n)
                for (int64_t o = 0; o < c.o; ++o)
                    for (int64_t i = 0; i < p * q; ++i) {
                        const int64_t at = y.at(n, o, i / q, i % q);
                        want[at] = bias[o], magnitude[at] = std::abs(bias[o]);
                    }
        products([&](int64_t ix, int64_t iw, int64_t iy) {
            const double product = x.data[ix] * w[iw];
            want[iy] += product, magnitude[iy] += std::abs(product);
        });
        Comparison comparison;
        for (int64_t i = 0; i < y.data.size(); ++i) comparison.add(y.data[i], want[i], magnitude[i], "y", i);
        tally.report(comparison.worst == 0, "conv2d_forward", c.text() + " " + comparison.where);
        tally.report(y.data.guards_intact(), "conv2d_forward", c.text() + " wrote outside y");
        tally.report(y.data.same_bits(again.data), "conv2d_forward", c.text() + " a repeat differs");
    }
    if (tally.wants("conv2d_dgrad")) {
        Images dx(c.n, c.c, c.h, c.w, c.channels_last, c.skew), again(c.n, c.c, c.h, c.w, c.channels_last, c.skew);
        for (Images *target : {&dx, &again})
            table.conv2d_dgrad(args, dy.data.begin(), weights.values.begin(), target->data.begin());
        std::vector<double> want = sums(dx.data.size()), magnitude = want;
        products([&](int64_t ix, int64_t iw, int64_t iy) {
            const double product = dy.data[iy] * w[iw];
            want[ix] += product, magnitude[ix] += std::abs(product);
        });
        Comparison comparison;
        for (int64_t i = 0; i < dx.data.size(); ++i) comparison.add(dx.data[i], want[i], magnitude[i], "dx", i);
        tally.report(comparison.worst == 0, "conv2d_dgrad", c.text() + " " + comparison.where);
        tally.report(dx.data.guards_intact(), "conv2d_dgrad", c.text() + " wrote outside dx");
        tally.report(dx.data.same_bits(again.data), "conv2d_dgrad", c.text() + " a repeat differs");
    }
    if (tally.wants("conv2d_wgrad")) {
        Buffer dvalues(weights.values.size()), again(weights.values.size()), dbias(c.o), dbias_again(c.o);
        for (bool first : {true, false})
            table.conv2d_wgrad(args, dy.data.begin(), x.data.begin(), c.mask ? weights.mask.data() : nullptr,
                               (first ? dvalues : again).begin(),
                               c.bias ? (first ? dbias : dbias_again).begin() : nullptr);
        std::vector<double> dw = sums(int64_t(w.size())), magnitude = dw, db = sums(c.o), db_magnitude = db;
        products([&](int64_t ix, int64_t iw, int64_t iy) {
            const double product = double(dy.data[iy]) * x.data[ix];
            dw[iw] += product, magnitude[iw] += std::abs(product);
        });
        for (int64_t n = 0; n < c.n; ++n)
            for (int64_t o = 0; o < c.o; ++o)
                for (int64_t i = 0; i < p * q; ++i) {
                    const double v = dy.data[dy.at(n, o, i / q, i % q)];
                    db[o] += v, db_magnitude[o] += std::abs(v);
                }
        Comparison comparison;
        weights.compare(dvalues, dw, magnitude, c.mask, comparison);
        if (c.bias)
            for (int64_t o = 0; o < c.o; ++o) comparison.add(dbias[o], db[o], db_magnitude[o], "dbias", o);
        tally.report(comparison.worst == 0, "conv2d_wgrad", c.text() + " " + comparison.where);
        tally.report(dvalues.guards_intact() && dbias.guards_intact(), "conv2d_wgrad",
                     c.text() + " wrote outside dvalues or dbias");
        tally.report(dvalues.same_bits(again) && dbias.same_bits(dbias_again), "conv2d_wgrad",
                     c.text() + " a repeat differs");
    }
}

inline void run_conv2d_cases(Tally &tally) {
    struct Geometry {
        int64_t n, h, w, r, s, stride_h, stride_w, dilation_h, dilation_w, pad[4];
    };
    const Geometry geometries[] = {
        {2, 8, 8, 3, 3, 1, 1, 1, 1, {1, 1, 1, 1}},    // the common one
        {1, 9, 7, 3, 3, 2, 2, 1, 1, {1, 1, 1, 1}},    // stride, odd sizes
        {3, 5, 6, 1, 1, 1, 1, 1, 1, {0, 0, 0, 0}},    // pointwise
        {2, 7, 7, 1, 1, 2, 2, 1, 1, {0, 0, 0, 0}},    // strided pointwise: inputs that no output reads
        {1, 10, 12, 3, 3, 1, 1, 2, 2, {2, 2, 2, 2}},  // dilation
        {2, 6, 11, 5, 2, 3, 1, 1, 2, {0, 3, 1, 0}},   // nothing symmetric
        {1, 4, 4, 3, 3, 1, 1, 1, 1, {3, 3, 3, 3}},    // padding wider than the filter: outputs that read nothing
        {1, 17, 33, 3, 3, 1, 1, 1, 1, {1, 1, 1, 1}},  // wide rows
        {1, 8, 8, 2, 2, 2, 2, 1, 1, {0, 0, 0, 0}},    // patches
        {1, 3, 3, 3, 3, 1, 1, 1, 1, {0, 0, 0, 0}},    // one output pixel
        {0, 5, 5, 3, 3, 1, 1, 1, 1, {1, 1, 1, 1}},    // empty batch
        {5, 1, 1, 3, 3, 1, 1, 1, 1, {1, 1, 1, 1}},    // one input pixel
    };
    struct Channels {
        int64_t c, o, groups, bo, bi;
    };
    const Channels channels[] = {
        {5, 7, 1, 1, 1},     {8, 8, 1, 4, 4},     {10, 11, 1, 3, 5},   {16, 24, 1, 8, 8},
        {32, 32, 1, 16, 16}, {37, 41, 1, 16, 16}, {40, 36, 1, 32, 32}, {12, 18, 3, 4, 4},
        {24, 20, 2, 8, 16},  {20, 12, 1, 1, 8},   {9, 33, 1, 32, 2},   {4, 8, 4, 2, 1},
    };
    uint64_t seed = 100000;
    for (const Geometry &g : geometries)
        for (const Channels &k : channels)
            for (const bool channels_last : {false, true})
                for (int variant = 0; variant < 3; ++variant) {
                    Conv2dCase c{g.n,
                                 k.c,
                                 g.h,
                                 g.w,
                                 k.o,
                                 g.r,
                                 g.s,
                                 k.groups,
                                 k.bo,
                                 k.bi,
                                 g.stride_h,
                                 g.stride_w,
                                 g.dilation_h,
                                 g.dilation_w,
                                 {g.pad[0], g.pad[1], g.pad[2], g.pad[3]},
                                 0.35,
                                 false,
                                 0,
                                 0,
                                 true,
                                 false,
                                 channels_last,
                                 1 + int(seed % 3)};
                    if (variant == 1) c.empty = true, c.spare = 3, c.mask = true, c.skew = 1;
                    if (variant == 2) c.density = seed % 2 ? 1.0 : 0.0, c.bias = seed % 4 < 2, c.spare = 1;
                    run_conv2d(c, seed++, tally);
                }
    // Large blocks and images that cross the tiles.
    for (const int threads : {1, 2, 4})
        for (const bool channels_last : {false, true}) {
            run_conv2d({2, 130,          6,   5,     140, 3, 3,    1,     128,           128,    1, 1, 1,
                        1, {1, 1, 1, 1}, 0.5, false, 1,   0, true, false, channels_last, threads},
                       seed++, tally);
            run_conv2d({3,      32, 32, 32,           16,  3,    3, 1, 16,   16,   1,
                        1,      1,  1,  {1, 1, 1, 1}, 0.3, true, 0, 0, true, true, channels_last,
                        threads},
                       seed++, tally);
            run_conv2d({9,      32, 13, 11,           32,  3,     3, 2, 8,    8,     2,
                        2,      1,  1,  {1, 1, 1, 1}, 0.3, false, 2, 1, true, false, channels_last,
                        threads},
                       seed++, tally);
            run_conv2d({4,      12, 19, 23,           20,   3,     3, 1, 1,    1,     1,
                        1,      1,  1,  {1, 1, 1, 1}, 0.15, false, 0, 0, true, false, channels_last,
                        threads},
                       seed++, tally);
        }
}

}  // namespace sktest
