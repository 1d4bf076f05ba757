// SPDX-License-Identifier: Apache-2.0
// How operands lie in shared memory and come into the registers of one multiply instruction, and results out of them.
//
// A step is the depth of one instruction: 32 bytes of a row of activations, whatever the element.
#pragma once

#include "primitives.cuh"

namespace sparsekern {
namespace cuda {

// The place of lane l in a 16-row, 32-byte operand tile that ldmatrix_x4 reads: its row, and its byte in that row.
SK_DEVICE int operand_row(int lane) {
    return lane & 15;
}
SK_DEVICE int operand_byte(int lane) {
    return (lane >> 4) * 16;
}

// Weights of one step for Nb features. Forward: a row is a feature and holds the step's 32 bytes of channels.
// Transposed: a row is a channel and holds the Nb features. Chunks of 16 bytes are permuted within a row, so that the
// 8 rows of a matrix (and the 4 rows of the 4-byte loads of transposed Tf32) lie in different banks.
template <class E, bool Transposed, int Nb> struct WeightStep {
    static constexpr int bytes = Nb * 32;
    static constexpr int row_bytes = Transposed ? Nb * E::bytes : 32;
    static constexpr int row_chunks = row_bytes / 16;
    static constexpr bool by_words = Transposed && E::bytes == 4;

    SK_DEVICE static int place(int row, int chunk) {
        constexpr int rows_per_line = 8 / row_chunks;
        const int line = static_cast<int>(static_cast<unsigned>(row) / rows_per_line);
        const int turn = by_words ? line % (row_chunks / 2) * 2 : line % row_chunks;
        return row * row_bytes + (chunk ^ turn) * 16;
    }

    // What a lane adds to the step's address, a multiple of 128, before it calls load.
    SK_DEVICE static int lane_place(int lane) {
        if (by_words) return place(lane & 3, lane >> 4) + (lane >> 2 & 3) * 4;
        const int matrix = lane >> 3, row = lane & 7;
        return Transposed ? place((matrix & 1) * 8 + row, matrix >> 1) : place((matrix >> 1) * 8 + row, matrix & 1);
    }

    // b[j]: the operand for features 8 j to 8 j + 7.
    SK_DEVICE static void load(uint32_t (&b)[Nb / 8][2], Shared at) {
        if constexpr (by_words) {
            SK_UNROLL
            for (int j = 0; j < Nb / 8; ++j) {
                const Shared word = at ^ static_cast<Shared>(j * 32);
                b[j][0] = round_operand<E>(load_shared<uint32_t>(word));
                b[j][1] = round_operand<E>(load_shared<uint32_t>(word + 4 * row_bytes));
            }
        } else {
            SK_UNROLL
            for (int j = 0; j < Nb / 8; j += 2) {
                uint32_t pair[4];
                if (Transposed) {
                    ldmatrix_x4_trans(pair, at ^ static_cast<Shared>(j * 16));
                } else {
                    ldmatrix_x4(pair, at + static_cast<Shared>(j * 8 * row_bytes));
                }
                b[j][0] = round_operand<E>(pair[0]), b[j][1] = round_operand<E>(pair[1]);
                b[j + 1][0] = round_operand<E>(pair[2]), b[j + 1][1] = round_operand<E>(pair[3]);
            }
        }
    }
};

// Four lanes hold a 4 x 4 matrix, lane t its column t; afterwards lane t holds its row t.
SK_DEVICE void transpose_quad(uint32_t (&v)[4], int lane) {
    SK_UNROLL
    for (int step = 1; step <= 2; step *= 2) {
        const bool upper = lane & step;
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const uint32_t received = shuffle_xor(upper ? v[i] : v[i + step], step);
            v[i] = upper ? received : v[i];
            v[i + step] = upper ? v[i + step] : received;
        }
    }
}

}  // namespace cuda
}  // namespace sparsekern
