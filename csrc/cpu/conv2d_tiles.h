// SPDX-License-Identifier: Apache-2.0
// Register tiles of the convolution kernels. All accumulators stay in registers over a whole list of blocks (forward,
// dgrad) or a whole image (wgrad).
#pragma once

#include "simd.h"
#include "threads.h"

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

// Weights of a list as [slot][k][m]. Tiles take it by reference: copied, its freshly stored halves are loaded as one
// vector, which no processor forwards, and every tile waited for the output of the one before it (6 % of a forward
// pass).
struct Weights {
    const float *data;
    int64_t block, ld;
};

// BM output channels x PV vectors of pixels: vectors of pixels times broadcast weights. Any block size; input planes.
template <int L, int BM, int PV>
static void pixel_tile(const Entry *entry, const Entry *end, const float *x, int64_t plane, const Weights &weights,
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
    // The output's cache lines arrive while the tile is computed.
    SK_UNROLL
    for (int p = 0; p < PV; ++p) {
        SK_UNROLL
        for (int m = 0; m < BM; ++m) __builtin_prefetch(y + pixels[p].y + m * y_plane, 1, 3);
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
    case 0:
        return pick_vectors<L, 0>(vectors);
    case 1:
        return pick_vectors<L, 1>(vectors);
    case 2:
        return pick_vectors<L, 2>(vectors);
    default:
        return pick_vectors<L, REGISTERS == 32 ? 3 : 2>(vectors);
    }
}
constexpr int MAX_LOG_BM = REGISTERS == 32 ? 3 : 2;

// A line of pixels with the same taps, and where its lists start.
struct PixelLine {
    int64_t y, y_step;  // offset of the first pixel in the output, floats to the next
    int64_t x, x_step;  // the same in the copy of the input
    int64_t count;
    int64_t list, tap0, tap1;
};

// A vector of output channels x PX pixels: weights times broadcast pixels. Input by channel blocks. Only the first
// `channels` are stored. Two vectors of channels to a tile were tried: 10 to 25 % slower for blocks of 32 and more.
template <int PX>
static void channel_tile(const Entry *entry, const Entry *end, const float *x, int64_t x_step, const Weights &weights,
                         const float *bias, int64_t channels, float *y, int64_t y_step, bool streamed) {
    constexpr int L = LANES;
    Vec<L> acc[PX];
    const Vec<L> init = bias ? load_partial<L>(bias, min64(L, channels)) : Vec<L>{};
    SK_UNROLL
    for (int p = 0; p < PX; ++p) {
        acc[p] = init;
        if (!streamed) __builtin_prefetch(y + p * y_step, 1, 3);
    }
    for (; entry < end; ++entry) {
        const float *w = weights.data + entry->slot * weights.block;
        // Three pixels to a pointer, [at], [at + step] and [at + 2 step] being addresses that an instruction can form;
        // with one offset for each pixel the compiler runs out of registers.
        const float *in[(PX + 2) / 3];
        SK_UNROLL
        for (int p = 0; p < PX; p += 3) in[p / 3] = x + entry->x + p * x_step;
        for (int64_t k = 0; k < entry->depth; ++k, w += weights.ld) {
            const Vec<L> wv = load<L>(w);
            SK_UNROLL
            for (int p = 0; p < PX; ++p) acc[p] += broadcast<L>(in[p / 3][k + p % 3 * x_step]) * wv;
        }
    }
    SK_UNROLL
    for (int p = 0; p < PX; ++p) {
        if (streamed && channels >= L)
            stream(y + p * y_step, acc[p]);
        else if (channels >= L)
            store<L>(y + p * y_step, acc[p]);
        else
            store_partial<L>(y + p * y_step, acc[p], channels);
    }
}

using ChannelTile = decltype(&channel_tile<1>);

// Most pixels of a tile.
constexpr int CHANNEL_PIXELS = REGISTERS == 32 ? 14 : 12;

template <int PX = CHANNEL_PIXELS> static ChannelTile pick_channel_tile(int64_t pixels) {
    if constexpr (PX <= 1)
        return &channel_tile<1>;
    else
        return pixels >= PX ? &channel_tile<PX> : pick_channel_tile<PX - 1>(pixels);
}

// wgrad, vectors along pixels: the sums over all pixels of dy[m] * x[c] for BM output channels and BC columns, a column
// being an input channel under a tap. sums[m * BC + c]
constexpr int DOT_TILE = REGISTERS == 32 ? 16 : 8;
constexpr int MAX_LOG_DOT = REGISTERS == 32 ? 2 : 1;

struct DotVector {
    int32_t x, dy;  // offsets of L pixels in both copies
};

struct DotImages {
    int64_t count, x, dy;  // images, and floats between them
};

template <int L, int BM, int BC = DOT_TILE / BM>
static void dot_tile(const float *dy, int64_t dy_plane, const float *x, const int32_t *column, const DotVector *vector,
                     const DotVector *end, DotImages images, float *sums) {
    Vec<L> acc[BM * BC] = {};
    const float *base[BC];
    SK_UNROLL
    for (int c = 0; c < BC; ++c) base[c] = x + column[c];
    for (int64_t n = 0; n < images.count; ++n) {
        for (const DotVector *v = vector; v < end; ++v) {
            Vec<L> g[BM];
            SK_UNROLL
            for (int m = 0; m < BM; ++m) g[m] = load<L>(dy + m * dy_plane + v->dy);
            SK_UNROLL
            for (int c = 0; c < BC; ++c) {
                const Vec<L> b = load<L>(base[c] + v->x);
                SK_UNROLL
                for (int m = 0; m < BM; ++m) acc[m * BC + c] += g[m] * b;
            }
        }
        dy += images.dy;
        SK_UNROLL
        for (int c = 0; c < BC; ++c) base[c] += images.x;
    }
    SK_UNROLL
    for (int i = 0; i < BM * BC; i += L) {
        Vec<L> part[L];
        SK_UNROLL
        for (int j = 0; j < L; ++j) part[j] = acc[i + j];
        store<L>(sums + i, sum_lanes<L>(part));
    }
}

// wgrad, vectors along input channels: dw[m][k] += the outer products dy[m] * x[k] of every pixel.
struct PixelBlock {
    const float *data;
    int64_t pixel, row, image;  // floats between them
};

template <int L, int BM, int VK>
static void outer_tile(PixelBlock dy, PixelBlock x, int64_t images, int64_t rows, int64_t cols, float *dw, int64_t ld) {
    Vec<L> acc[BM][VK];
    SK_UNROLL
    for (int m = 0; m < BM; ++m) {
        SK_UNROLL
        for (int k = 0; k < VK; ++k) acc[m][k] = load<L>(dw + m * ld + k * L);
    }
    for (int64_t n = 0; n < images; ++n)
        for (int64_t i = 0; i < rows; ++i) {
            const float *g = dy.data + n * dy.image + i * dy.row, *v = x.data + n * x.image + i * x.row;
            for (int64_t j = 0; j < cols; ++j, g += dy.pixel, v += x.pixel) {
                Vec<L> xv[VK];
                SK_UNROLL
                for (int k = 0; k < VK; ++k) xv[k] = load<L>(v + k * L);
                SK_UNROLL
                for (int m = 0; m < BM; ++m) {
                    const Vec<L> b = broadcast<L>(g[m]);
                    SK_UNROLL
                    for (int k = 0; k < VK; ++k) acc[m][k] += b * xv[k];
                }
            }
        }
    SK_UNROLL
    for (int m = 0; m < BM; ++m) {
        SK_UNROLL
        for (int k = 0; k < VK; ++k) store<L>(dw + m * ld + k * L, acc[m][k]);
    }
}

}  // namespace SK_ISA
}  // namespace sparsekern
