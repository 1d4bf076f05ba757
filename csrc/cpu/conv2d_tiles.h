// SPDX-License-Identifier: Apache-2.0
// Register tiles of the convolution kernels. All accumulators stay in registers over a whole list of blocks (forward,
// dgrad) or a whole image (wgrad).
#pragma once

#include "simd.h"

namespace sparsekern {
namespace SK_ISA {

// One stored block of a block row, as the kernels walk it.
struct Entry {
    int32_t x;      // offset of its first input channel, shifted by its tap, in the tile's copy of the input
    int32_t slot;   // block of the weights
    int32_t depth;  // input channels inside the image: less than the block's at a ragged edge
};

// L pixels of one output row.
struct PixelVector {
    int64_t y;      // offset in the output
    int32_t x;      // offset in the copy of the input
    int32_t count;  // pixels to store
};

// Weights of a list as [slot][k][m].
struct Weights {
    const float *data;
    int64_t block, ld;
};

// BM output channels x PV vectors of pixels: vectors of pixels times broadcast weights. Any block size; input planes.
template <int L, int BM, int PV>
static void pixel_tile(const Entry *entry, const Entry *end, const float *x, int64_t plane, Weights weights,
                       const PixelVector *pixels, const float *bias, float *y, int64_t y_plane) {
    Vec<L> acc[BM][PV];
    const float *base[PV];
    SK_UNROLL
    for (int p = 0; p < PV; ++p) base[p] = x + pixels[p].x;
    SK_UNROLL
    for (int m = 0; m < BM; ++m) {
        SK_UNROLL
        for (int p = 0; p < PV; ++p) acc[m][p] = bias ? broadcast<L>(bias[m]) : Vec<L>{};
    }
    for (; entry < end; ++entry) {
        const float *w = weights.data + entry->slot * weights.block;
        const int64_t stop = entry->x + entry->depth * plane;
        for (int64_t k = entry->x; k < stop; k += plane, w += weights.ld) {
            Vec<L> v[PV];
            SK_UNROLL
            for (int p = 0; p < PV; ++p) v[p] = load<L>(base[p] + k);
            SK_UNROLL
            for (int m = 0; m < BM; ++m) {
                const Vec<L> b = broadcast<L>(w[m]);
                SK_UNROLL
                for (int p = 0; p < PV; ++p) acc[m][p] += b * v[p];
            }
        }
    }
    SK_UNROLL
    for (int p = 0; p < PV; ++p) {
        float *out = y + pixels[p].y;
        const int64_t count = pixels[p].count;
        if (count == L) {
            SK_UNROLL
            for (int m = 0; m < BM; ++m) store<L>(out + m * y_plane, acc[m][p]);
        } else {
            SK_UNROLL
            for (int m = 0; m < BM; ++m) store_partial<L>(out + m * y_plane, acc[m][p], count);
        }
    }
}

using PixelTile = decltype(&pixel_tile<4, 1, 1>);

// Most vectors of a tile of 1, 2, 4 and 8 channels; 0 where the tile is not used. 8 x 3 and 4 x 3 leave room for the
// loaded vectors and one broadcast in 32 and 16 registers.
constexpr int PIXEL_VECTORS[4] = {8, REGISTERS == 32 ? 8 : 4, REGISTERS == 32 ? 6 : 3, REGISTERS == 32 ? 3 : 0};

template <int L, int LOG_BM, int PV = PIXEL_VECTORS[LOG_BM]> SK_INLINE PixelTile pick_vectors(int64_t vectors) {
    if constexpr (PV <= 1)
        return &pixel_tile<L, 1 << LOG_BM, 1>;
    else
        return vectors >= PV ? &pixel_tile<L, 1 << LOG_BM, PV> : pick_vectors<L, LOG_BM, PV - 1>(vectors);
}
template <int L> static PixelTile pick_pixel_tile(int log_bm, int64_t vectors) {
    switch (log_bm) {
    case 0: return pick_vectors<L, 0>(vectors);
    case 1: return pick_vectors<L, 1>(vectors);
    case 2: return pick_vectors<L, 2>(vectors);
    default: return pick_vectors<L, REGISTERS == 32 ? 3 : 2>(vectors);
    }
}
constexpr int MAX_LOG_BM = REGISTERS == 32 ? 3 : 2;

}  // namespace SK_ISA
}  // namespace sparsekern
