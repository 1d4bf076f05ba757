// SPDX-License-Identifier: Apache-2.0
// What ldmatrix and mma do with the registers of a warp's 32 lanes. Products are exact in double, their sum with c is
// kept in double and rounded to fp32 once.
#pragma once

#include "conversions.h"
#include "machine.h"

namespace sktest {
namespace emulation {

#if defined(__GNUC__) && !defined(__clang__)
#define SKTEST_FAST __attribute__((optimize("O3")))
#else
#define SKTEST_FAST
#endif

struct LoadedMatrices {
    uint32_t row;  // address of the row that the lane names
    uint32_t *to;  // its four registers
};

template <bool transposed> void load_matrices(Machine &on, int warp, Operands &operands, Site site) {
    static const unsigned char poison[16] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                                             0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    uint16_t rows[32][8];
    uint32_t addresses[32];
    for (int l = 0; l < 32; ++l) {
        addresses[l] = static_cast<LoadedMatrices *>(operands[l])->row;
        const unsigned char *from = on.memory.at(addresses[l], 16, warp * 32 + l, Access::ldmatrix, site);
        if (from != nullptr)
            on.memory.read(addresses[l], 16, SharedMemory::warp_reader | warp << 5, Access::ldmatrix, site);
        std::memcpy(rows[l], from != nullptr ? from : poison, 16);
    }
    on.conflicts.judge_rows(addresses, on.memory, site);
    for (int l = 0; l < 32; ++l) {
        uint32_t *to = static_cast<LoadedMatrices *>(operands[l])->to;
        const int outer = l / 4, inner = l % 4 * 2;
        for (int m = 0; m < 4; ++m) {
            const uint32_t low = transposed ? rows[m * 8 + inner][outer] : rows[m * 8 + outer][inner];
            const uint32_t high = transposed ? rows[m * 8 + inner + 1][outer] : rows[m * 8 + outer][inner + 1];
            to[m] = low | high << 16;
        }
    }
}

struct Multiplied {
    float *c;
    const uint32_t *a;
    uint32_t b0, b1;
};

template <Collective kind> float operand_half(uint32_t half) {
    return kind == Collective::mma_bf16 ? float_of(half << 16) : fp16_widened(static_cast<uint16_t>(half));
}

// Optimized whatever the build, because tests spend much of their time here.
template <Collective kind> SKTEST_FAST void multiply(Machine &, int, Operands &operands, Site) {
    // Eight columns at once.
    typedef double Row __attribute__((vector_size(64)));
    constexpr int depth = kind == Collective::mma_tf32 ? 8 : 16;
    double a[16][16];
    Row b[16];
    Row c[16];
    for (int l = 0; l < 32; ++l) {
        const Multiplied &lane = *static_cast<const Multiplied *>(operands[l]);
        const int group = l / 4, member = l % 4;
        const uint32_t pair[2] = {lane.b0, lane.b1};
        for (int i = 0; i < 4; ++i) {
            const int row = group + i % 2 * 8;
            if (kind == Collective::mma_tf32) {
                a[row][member + i / 2 * 4] = float_of(tf32_truncated(lane.a[i]));
            } else {
                const int k = member * 2 + i / 2 * 8;
                a[row][k] = operand_half<kind>(lane.a[i] & 0xffffu);
                a[row][k + 1] = operand_half<kind>(lane.a[i] >> 16);
            }
            c[group + i / 2 * 8][member * 2 + i % 2] = lane.c[i];
        }
        for (int i = 0; i < 2; ++i) {
            if (kind == Collective::mma_tf32) {
                b[member + i * 4][group] = float_of(tf32_truncated(pair[i]));
            } else {
                const int k = member * 2 + i * 8;
                b[k][group] = operand_half<kind>(pair[i] & 0xffffu);
                b[k + 1][group] = operand_half<kind>(pair[i] >> 16);
            }
        }
    }
    for (int row = 0; row < 16; ++row) {
        Row sum = c[row];
        for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k];
        c[row] = sum;
    }
    for (int l = 0; l < 32; ++l) {
        const Multiplied &lane = *static_cast<const Multiplied *>(operands[l]);
        for (int i = 0; i < 4; ++i) lane.c[i] = static_cast<float>(c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
    }
}

}  // namespace emulation
}  // namespace sktest
