// SPDX-License-Identifier: Apache-2.0
// Operands of wgrad's multiply instructions from tiles in shared memory, and which elements of a piece a lane then
// holds. M is o, N is i, K are pixels: a[o, pixel] comes from rows of dy, b[pixel, i] from rows of x, both transposed
// on the way. Pixels lie an odd number of 16-byte chunks apart, so that neither dtype meets bank conflicts on
// neighbouring pixels.
#pragma once

#include "wgrad_cut.h"

namespace sparsekern {
namespace cuda {

// A piece is O x I elements of a block; m_tiles x n_tiles instructions multiply E::depth pixels of it.
template <class E_, int O, int I> struct WgradTraits {
    using E = E_;
    static constexpr int o = O, i = I;
    static constexpr int m_tiles = O / 16, n_tiles = I / 8;
    static constexpr int pieces = wgrad_pieces_per_warp(O, I);
};

template <class T> struct Accumulators {
    float at[T::pieces][T::m_tiles][T::n_tiles][4];
};

template <class T, int Bytes = T::E::bytes> struct WgradOperands;

// 16-bit: ldmatrix transposes; each lane names 8 channels of one pixel.
template <class T> struct WgradOperands<T, 2> {
    using DyRows = Shared;
    using XRows = Shared;

    SK_DEVICE static DyRows dy_rows(Shared tile, int pitch) {
        const int lane = lane_id();
        return tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 16;
    }
    // Of E::depth output pixels from `pixel` on; `table` holds their rows in the tile of x.
    SK_DEVICE static XRows x_rows(Shared tile, Shared table, int pixel) {
        const int lane = lane_id();
        return tile + load_shared<uint32_t>(table + (pixel + lane % 16) * 4) + lane / 16 * 16;
    }
    // Where not `wanted`, which is equal over the warp, `a` stays.
    SK_DEVICE static void load_dy(bool wanted, uint32_t (&a)[T::m_tiles][4], DyRows rows, int) {
        SK_UNROLL
        for (int m = 0; m < T::m_tiles; ++m) ldmatrix_x4_trans_if(wanted, a[m], rows + m * 32);
    }
    SK_DEVICE static void load_x(uint32_t (&b)[T::n_tiles][2], XRows rows, int offset) {
        SK_UNROLL
        for (int n = 0; n < T::n_tiles; n += 2) {
            uint32_t words[4];
            ldmatrix_x4_trans(words, rows + offset + n * 16);
            b[n][0] = words[0], b[n][1] = words[1], b[n + 1][0] = words[2], b[n + 1][1] = words[3];
        }
    }
    // o of the lane's results c[m][n][2 * half] and [2 * half + 1]; their i is 8 * n + lane % 4 * 2 and the next.
    SK_DEVICE static int row(int m, int half) { return 16 * m + 8 * half + lane_id() / 4; }
};

// tf32: plain loads. Which element an index of the instruction means is free, as long as both operands and the result
// agree: k counts pixels 2 * (lane % 4) + {0, 1}, so that 16-byte steps between them meet no bank conflict, and m
// counts o so that one load brings two operands. x has been rounded (round_tile).
template <class T> struct WgradOperands<T, 4> {
    using DyRows = Shared;
    struct XRows {
        Shared at[2];
    };

    SK_DEVICE static DyRows dy_rows(Shared tile, int pitch) {
        const int lane = lane_id();
        return tile + lane % 4 * 2 * pitch + lane / 4 * 8;
    }
    SK_DEVICE static XRows x_rows(Shared tile, Shared table, int pixel) {
        const int lane = lane_id();
        const Words2 rows = load_shared<Words2>(table + (pixel + lane % 4 * 2) * 4);
        const Shared channel = tile + lane / 4 * 4;
        return {{channel + rows.x, channel + rows.y}};
    }
    SK_DEVICE static void load_dy(bool wanted, uint32_t (&a)[T::m_tiles][4], DyRows rows, int pitch) {
        if (!wanted) return;
        SK_UNROLL
        for (int m = 0; m < T::m_tiles; ++m) {
            SK_UNROLL
            for (int k = 0; k < 2; ++k) {
                const Words2 words = load_shared<Words2>(rows + k * pitch + m * 64);
                a[m][2 * k] = round_operand<Tf32>(words.x), a[m][2 * k + 1] = round_operand<Tf32>(words.y);
            }
        }
    }
    SK_DEVICE static void load_x(uint32_t (&b)[T::n_tiles][2], const XRows &rows, int offset) {
        SK_UNROLL
        for (int n = 0; n < T::n_tiles; ++n) {
            SK_UNROLL
            for (int k = 0; k < 2; ++k) b[n][k] = load_shared<uint32_t>(rows.at[k] + offset + n * 32);
        }
    }
    SK_DEVICE static int row(int m, int half) { return 16 * m + lane_id() / 4 * 2 + half; }
};

}  // namespace cuda
}  // namespace sparsekern
