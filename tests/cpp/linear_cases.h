// SPDX-License-Identifier: Apache-2.0
// The three linear kernels against loops in double.
#pragma once

#include "weights.h"

namespace sktest {

struct LinearCase {
    int64_t m, out, in, bo, bi;
    double density;
    bool empty;     // some block rows and a block column without blocks
    int64_t spare;  // slots beyond nnz
    int64_t gap;    // ld minus row length
    int64_t skew;   // floats off the allocation's alignment
    bool bias, mask;
    int threads;

    std::string text() const {
        char line[256];
        std::snprintf(
            line, sizeof line,
            "M=%ld O=%ld I=%ld block=%ldx%ld density=%.2f empty=%d spare=%ld gap=%ld skew=%ld bias=%d mask=%d "
            "threads=%d",
            long(m), long(out), long(in), long(bo), long(bi), density, empty, long(spare), long(gap), long(skew), bias,
            mask, threads);
        return line;
    }
};

// Matrix [m, n] with rows `ld` apart; the gap between them is NaN and must stay so.
struct Matrix {
    int64_t m, n, ld;
    Buffer data;

    Matrix(int64_t m, int64_t n, int64_t gap, int64_t skew) : m(m), n(n), ld(n + gap), data(m * ld, kNaN, skew) {}
    void fill(Random &random) {
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) data[i * ld + j] = random.value();
    }
    double at(int64_t i, int64_t j) const { return data[i * ld + j]; }
    bool gaps_intact() const {
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = n; j < ld; ++j)
                if (!std::isnan(data[i * ld + j])) return false;
        return data.guards_intact();
    }
};

inline void run_linear(const LinearCase &c, uint64_t seed, Tally &tally) {
    if (!tally.samples(seed)) return;
    Random random(seed);
    const int64_t rows = (c.out + c.bo - 1) / c.bo, cols = (c.in + c.bi - 1) / c.bi;
    const Blocks blocks(1, rows, 1, cols, c.bo, c.bi, c.density, c.empty, c.spare, random);
    const Weights weights(blocks, c.out, c.in, random);
    const std::vector<double> w = weights.dense();
    Matrix x(c.m, c.in, c.gap, c.skew), dy(c.m, c.out, c.gap, c.skew);
    x.fill(random), dy.fill(random);
    Buffer bias(c.out);
    random.fill(bias);
    const LinearArgs args{blocks.layout(), c.m, c.out, c.in, c.threads};
    const KernelTable &table = kernels();

    if (tally.wants("linear_forward")) {
        Matrix y(c.m, c.out, c.gap, c.skew), again(c.m, c.out, c.gap, c.skew);
        for (Matrix *target : {&y, &again})
            table.linear_forward(args, x.data.begin(), x.ld, weights.values.begin(), c.bias ? bias.begin() : nullptr,
                                 target->data.begin(), target->ld);
        Comparison comparison;
        for (int64_t i = 0; i < c.m; ++i)
            for (int64_t o = 0; o < c.out; ++o) {
                double want = c.bias ? bias[o] : 0, magnitude = std::abs(want);
                for (int64_t k = 0; k < c.in; ++k) {
                    const double product = x.at(i, k) * w[o * c.in + k];
                    want += product, magnitude += std::abs(product);
                }
                comparison.add(y.data[i * y.ld + o], want, magnitude, "y", i * c.out + o);
            }
        tally.report(comparison.worst == 0, "linear_forward", c.text() + " " + comparison.where);
        tally.report(y.gaps_intact(), "linear_forward", c.text() + " wrote outside y");
        tally.report(y.data.same_bits(again.data), "linear_forward", c.text() + " a repeat differs");
    }
    if (tally.wants("linear_dgrad")) {
        Matrix dx(c.m, c.in, c.gap, c.skew), again(c.m, c.in, c.gap, c.skew);
        for (Matrix *target : {&dx, &again})
            table.linear_dgrad(args, dy.data.begin(), dy.ld, weights.values.begin(), target->data.begin(), target->ld);
        Comparison comparison;
        for (int64_t i = 0; i < c.m; ++i)
            for (int64_t k = 0; k < c.in; ++k) {
                double want = 0, magnitude = 0;
                for (int64_t o = 0; o < c.out; ++o) {
                    const double product = dy.at(i, o) * w[o * c.in + k];
                    want += product, magnitude += std::abs(product);
                }
                comparison.add(dx.data[i * dx.ld + k], want, magnitude, "dx", i * c.in + k);
            }
        tally.report(comparison.worst == 0, "linear_dgrad", c.text() + " " + comparison.where);
        tally.report(dx.gaps_intact(), "linear_dgrad", c.text() + " wrote outside dx");
        tally.report(dx.data.same_bits(again.data), "linear_dgrad", c.text() + " a repeat differs");
    }
    if (tally.wants("linear_wgrad")) {
        Buffer dvalues(weights.values.size()), again(weights.values.size()), dbias(c.out), dbias_again(c.out);
        for (bool first : {true, false})
            table.linear_wgrad(args, dy.data.begin(), dy.ld, x.data.begin(), x.ld,
                               c.mask ? weights.mask.data() : nullptr, (first ? dvalues : again).begin(),
                               c.bias ? (first ? dbias : dbias_again).begin() : nullptr);
        std::vector<double> dw(w.size(), 0.0), magnitude(w.size(), 0.0), db(c.out, 0.0), db_magnitude(c.out, 0.0);
        for (int64_t i = 0; i < c.m; ++i)
            for (int64_t o = 0; o < c.out; ++o) {
                db[o] += dy.at(i, o), db_magnitude[o] += std::abs(dy.at(i, o));
                for (int64_t k = 0; k < c.in; ++k) {
                    const double product = dy.at(i, o) * x.at(i, k);
                    dw[o * c.in + k] += product, magnitude[o * c.in + k] += std::abs(product);
                }
            }
        Comparison comparison;
        weights.compare(dvalues, dw, magnitude, c.mask, comparison);
        if (c.bias)
            for (int64_t o = 0; o < c.out; ++o) comparison.add(dbias[o], db[o], db_magnitude[o], "dbias", o);
        tally.report(comparison.worst == 0, "linear_wgrad", c.text() + " " + comparison.where);
        tally.report(dvalues.guards_intact() && dbias.guards_intact(), "linear_wgrad",
                     c.text() + " wrote outside dvalues or dbias");
        tally.report(dvalues.same_bits(again) && dbias.same_bits(dbias_again), "linear_wgrad",
                     c.text() + " a repeat differs");
    }
}

inline void run_linear_cases(Tally &tally) {
    const int64_t blocks[][2] = {{1, 1},  {2, 2},  {3, 5},  {4, 4},   {8, 8},     {16, 16}, {32, 32}, {64, 64},
                                 {1, 16}, {16, 1}, {8, 32}, {32, 16}, {128, 128}, {16, 64}, {5, 128}};
    uint64_t seed = 1;
    for (const auto &block : blocks) {
        const int64_t bo = block[0], bi = block[1];
        // whole blocks, ragged edges, fewer features than one block
        const int64_t shapes[][2] = {
            {bo * 4, bi * 4}, {bo * 3 + bo / 2 + 1, bi * 2 + bi / 3 + 1}, {(bo + 1) / 2, (bi + 2) / 3}};
        for (const auto &shape : shapes)
            for (const int64_t m : {0, 1, 2, 7, 16, 33, 67}) {
                if (m == 67 && bo * bi > 4096) continue;
                for (int variant = 0; variant < 4; ++variant) {
                    LinearCase c{m, shape[0], shape[1], bo, bi, 0.4, false, 0, 0, 0, true, false, 1 + int(seed % 3)};
                    if (variant == 1) c.empty = true, c.spare = 3, c.gap = 5, c.mask = true;
                    if (variant == 2) c.density = 1.0, c.skew = 1, c.bias = false, c.gap = 16;
                    if (variant == 3) c.density = 0.0, c.spare = int64_t(seed % 2) * 2, c.gap = 1;
                    run_linear(c, seed++, tally);
                }
            }
    }
    // Sizes that cross the tiles of M and of the features, at low density and with many rows.
    for (const int threads : {1, 2, 4}) {
        run_linear({515, 96, 200, 1, 1, 0.1, true, 2, 0, 0, true, false, threads}, seed++, tally);
        run_linear({1030, 80, 112, 16, 16, 0.3, false, 1, 3, 1, true, true, threads}, seed++, tally);
        run_linear({259, 160, 288, 32, 32, 0.2, true, 0, 0, 0, false, false, threads}, seed++, tally);
        run_linear({300, 130, 70, 4, 4, 0.15, false, 5, 0, 0, true, true, threads}, seed++, tally);
        run_linear({193, 100, 90, 8, 8, 0.2, true, 0, 2, 1, true, false, threads}, seed++, tally);
    }
}

}  // namespace sktest
