// SPDX-License-Identifier: Apache-2.0
// From a warp's sums to the result in memory: bias, rounding, stores.
#pragma once

#include "fragments.cuh"
#include "stationary_args.h"

namespace sparsekern {
namespace cuda {
namespace stationary_kernel {

// Sums of a warp: [16 pixels][8 features][registers of one instruction].
template <int Bm, int Nb> using Sums = float[Bm / 16][Nb / 8][4];

// Of one unit. A lane holds features 8 j + 2 t and the next (t: its place in the quad of lanes) of the pixels
// 16 m + 8 half + quad.
template <class E, int Bm, int Nb> class Result {
    using Storage = typename E::Storage;
    struct alignas(8) Pair {
        float low, high;
    };

public:
    // `pixels`: the table of Tile::fill_pixels.
    SK_DEVICE Result(const StationaryArgs &args, Shared pixels, int64_t first_pixel, int unit)
        : args_(args), pixels_(pixels), quad_(lane_id() >> 2), t_(lane_id() & 3), features_(args.features - unit * Nb) {
        const int feature = block_z() * args.features + unit * Nb;
        start_ = static_cast<char *>(args.result) + first_pixel * args.result_row_bytes + feature * int64_t{E::bytes};
        load_bias(feature);
    }

    SK_DEVICE void store(const Sums<Bm, Nb> &sums) const {
        if (!args_.aligned_result || features_ < Nb) {
            store_elements(sums);
        } else if constexpr (E::bytes == 2) {
            store_chunks(sums);
        } else {
            store_pairs(sums);
        }
    }

private:
    // Zeros without bias and beyond the last feature.
    SK_DEVICE void load_bias(int feature) {
        const auto *from = static_cast<const Storage *>(args_.bias) + (feature + t_ * 2);
        const int present = args_.bias ? features_ - t_ * 2 : 0;
        SK_UNROLL
        for (int j = 0; j < Nb / 8; ++j) {
            bias_[j].low = j * 8 < present ? widen<E>(load_global(from + j * 8)) : 0.0f;
            bias_[j].high = j * 8 + 1 < present ? widen<E>(load_global(from + j * 8 + 1)) : 0.0f;
        }
    }

    SK_DEVICE Pair result(const Sums<Bm, Nb> &sums, int m, int half, int j) const {
        return {sums[m][j][half * 2] + bias_[j].low, sums[m][j][half * 2 + 1] + bias_[j].high};
    }

    // The quad turns every four chunks of 16 bytes so that each of its lanes has one whole: neighbouring lanes then
    // fill sectors of 32 bytes.
    SK_DEVICE void store_chunks(const Sums<Bm, Nb> &sums) const {
        constexpr int row_chunks = Nb / 8;
        const int my_half = t_ / row_chunks, my_chunk = t_ % row_chunks;
        SK_UNROLL
        for (int i = 0; i < Bm / 8; i += 4 / row_chunks) {
            uint32_t words[4];
            SK_UNROLL
            for (int k = 0; k < 4; ++k) {
                const int row = i + k / row_chunks;
                const Pair pair = result(sums, row / 2, row % 2, k % row_chunks);
                words[k] = pack<E>(pair.low, pair.high);
            }
            transpose_quad(words, t_);
            char *to;
            if (find(i + my_half, to)) put(to + my_chunk * 16, Words4{words[0], words[1], words[2], words[3]});
        }
    }

    // Two features of 4 bytes per lane: a quad fills a sector.
    SK_DEVICE void store_pairs(const Sums<Bm, Nb> &sums) const {
        SK_UNROLL
        for (int row = 0; row < Bm / 8; ++row) {
            char *to;
            if (!find(row, to)) continue;
            SK_UNROLL
            for (int j = 0; j < Nb / 8; ++j) put(to + (j * 8 + t_ * 2) * E::bytes, result(sums, row / 2, row % 2, j));
        }
    }

    // Rows that are not on 16 bytes, and features beyond the last.
    SK_DEVICE void store_elements(const Sums<Bm, Nb> &sums) const {
        const int present = features_ - t_ * 2;
        SK_UNROLL
        for (int row = 0; row < Bm / 8; ++row) {
            char *to;
            if (!find(row, to)) continue;
            to += t_ * 2 * E::bytes;
            SK_UNROLL
            for (int j = 0; j < Nb / 8; ++j) {
                const Pair pair = result(sums, row / 2, row % 2, j);
                if (j * 8 < present) put(to + j * 8 * E::bytes, element(pair.low));
                if (j * 8 + 1 < present) put(to + (j * 8 + 1) * E::bytes, element(pair.high));
            }
        }
    }

    SK_DEVICE static auto element(float sum) {
        if constexpr (E::bytes == 2) {
            return static_cast<Storage>(pack<E>(sum, 0.0f));
        } else {
            return sum;
        }
    }

    // Where pixel 8 row + quad of the tile has the unit; false where it lies outside the image or batch.
    SK_DEVICE bool find(int row, char *&to) const {
        const int pixel = load_shared<int>(pixels_ + static_cast<Shared>((row * 8 + quad_) * 8 + 4));
        to = start_ + int64_t{pixel} * args_.result_row_bytes;
        return pixel >= 0;
    }
    template <class T> SK_DEVICE static void put(char *to, const T &value) {
        store_global(reinterpret_cast<T *>(to), value);
    }

    const StationaryArgs &args_;
    const Shared pixels_;
    const int quad_, t_;
    const int features_;  // from the unit's first on
    char *start_;         // of the unit in the tile's first image
    Pair bias_[Nb / 8];
};

}  // namespace stationary_kernel
}  // namespace cuda
}  // namespace sparsekern
