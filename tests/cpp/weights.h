// SPDX-License-Identifier: Apache-2.0
// Stored values and the dense weight they stand for.
#pragma once

#include "support.h"

namespace sktest {

// Values [capacity, bo, bi] of a weight [G * out, in, T]: random inside, zero in the padding of edge blocks, NaN in
// spare slots (which no kernel may read), and the packed element mask that wgrad takes.
struct Weights {
    const Blocks &blocks;
    int64_t out, in;  // features or channels of one group
    Buffer values;
    std::vector<uint8_t> mask;  // [capacity, ceil(bo * bi / 8)]
    int64_t mask_stride;

    Weights(const Blocks &blocks, int64_t out, int64_t in, Random &random)
        : blocks(blocks), out(out), in(in), values(blocks.capacity * blocks.bo * blocks.bi, kNaN),
          mask_stride((blocks.bo * blocks.bi + 7) / 8) {
        mask.assign(static_cast<size_t>(blocks.capacity * mask_stride), 0);
        for_each([&](int64_t slot, int64_t i, int64_t, int64_t, int64_t, bool inside) {
            values[slot * blocks.bo * blocks.bi + i] = inside ? random.value() : 0.f;
            if (random.flip(0.6)) mask[slot * mask_stride + i / 8] |= uint8_t(1u << (i % 8));
        });
    }

    // Calls visit(slot, i, o, c, tap, inside) for element i of each stored block: weight[o][c][tap] where inside.
    template <class Visit> void for_each(Visit visit) const {
        const int64_t bo = blocks.bo, bi = blocks.bi;
        for (int64_t g = 0; g < blocks.groups; ++g)
            for (int64_t row = 0; row < blocks.rows; ++row)
                for (int64_t tap = 0; tap < blocks.taps; ++tap)
                    for (int64_t col = 0; col < blocks.cols; ++col) {
                        const int64_t slot = blocks.slot(g, row, tap, col);
                        if (slot < 0) continue;
                        for (int64_t i = 0; i < bo * bi; ++i) {
                            const int64_t o = row * bo + i / bi, c = col * bi + i % bi;
                            visit(slot, i, g * out + o, c, tap, o < out && c < in);
                        }
                    }
    }

    // [G * out, in, T]
    std::vector<double> dense() const {
        std::vector<double> w(static_cast<size_t>(blocks.groups * out * in * blocks.taps), 0.0);
        for_each([&](int64_t slot, int64_t i, int64_t o, int64_t c, int64_t tap, bool inside) {
            if (inside) w[(o * in + c) * blocks.taps + tap] = values[slot * blocks.bo * blocks.bi + i];
        });
        return w;
    }

    // Compares every slot of dvalues with the dense gradient and its magnitude, both [G * out, in, T].
    void compare(const Buffer &dvalues, const std::vector<double> &dw, const std::vector<double> &magnitude,
                 bool masked, Comparison &comparison) const {
        std::vector<double> want(static_cast<size_t>(dvalues.size()), 0.0), size(want.size(), 0.0);
        for_each([&](int64_t slot, int64_t i, int64_t o, int64_t c, int64_t tap, bool inside) {
            const bool kept = !masked || (mask[slot * mask_stride + i / 8] >> (i % 8) & 1);
            const int64_t at = slot * blocks.bo * blocks.bi + i, from = (o * in + c) * blocks.taps + tap;
            if (inside && kept) want[at] = dw[from], size[at] = magnitude[from];
        });
        for (int64_t i = 0; i < dvalues.size(); ++i) comparison.add(dvalues[i], want[i], size[i], "dvalues", i);
    }
};

}  // namespace sktest
