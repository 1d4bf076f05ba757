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

template <class E, int Bm, int Nb> class Result {
    using Storage = typename E::Storage;

public:
    // `pixels`: the table of Tile::fill_pixels.
    SK_DEVICE Result(const StationaryArgs &args, Shared pixels, int64_t first_pixel)
        : args_(args), pixels_(pixels), quad_(lane_id() >> 2), lane_in_quad_(lane_id() & 3),
          group_(block_z() * args.features), first_(first_pixel * args.result_ld + group_) {}

    SK_DEVICE void store(Sums<Bm, Nb> &sums, int unit) const {
        const int feature = unit * Nb;
        if (args_.bias) add_bias(sums, feature);
        if (args_.aligned_result && feature + Nb <= args_.features) {
            store_whole(sums, feature);
        } else {
            store_elements(sums, feature);
        }
    }

private:
    SK_DEVICE void add_bias(Sums<Bm, Nb> &sums, int feature) const {
        const auto *bias = static_cast<const Storage *>(args_.bias) + group_;
        SK_UNROLL
        for (int j = 0; j < Nb / 8; ++j) {
            SK_UNROLL
            for (int e = 0; e < 2; ++e) {
                const int at = feature + j * 8 + lane_in_quad_ * 2 + e;
                const float add = at < args_.features ? widen<E>(load_global(bias + at)) : 0.0f;
                SK_UNROLL
                for (int m = 0; m < Bm / 16; ++m) sums[m][j][e] += add, sums[m][j][e + 2] += add;
            }
        }
    }

    SK_DEVICE void store_whole(const Sums<Bm, Nb> &sums, int feature) const {
        SK_UNROLL
        for (int m = 0; m < Bm / 16; ++m) {
            if constexpr (E::bytes == 2) {
                store_chunks(sums[m], m, feature);
            } else {
                store_pairs(sums[m], m, feature);
            }
        }
    }

    // A lane holds pairs of features. The quad turns every four chunks of 16 bytes so that each of its lanes has one
    // whole: neighbouring lanes then fill sectors of 32 bytes.
    SK_DEVICE void store_chunks(const float (&sums)[Nb / 8][4], int m, int feature) const {
        constexpr int row_chunks = Nb / 8;
        SK_UNROLL
        for (int four = 0; four < 2 * row_chunks; four += 4) {
            uint32_t words[4];
            SK_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int half = (four + i) / row_chunks, j = (four + i) % row_chunks;
                words[i] = pack<E>(sums[j][half * 2], sums[j][half * 2 + 1]);
            }
            transpose_quad(words, lane_in_quad_);
            const int mine = four + lane_in_quad_, half = mine / row_chunks, chunk = mine % row_chunks;
            if (auto *to = pixel(m * 16 + half * 8 + quad_)) {
                store_global(reinterpret_cast<Words4 *>(to + feature + chunk * 8),
                             Words4{words[0], words[1], words[2], words[3]});
            }
        }
    }

    // Two features of 4 bytes per lane: a quad fills a sector.
    SK_DEVICE void store_pairs(const float (&sums)[Nb / 8][4], int m, int feature) const {
        struct alignas(8) Pair {
            float low, high;
        };
        SK_UNROLL
        for (int half = 0; half < 2; ++half) {
            if (auto *to = pixel(m * 16 + half * 8 + quad_)) {
                SK_UNROLL
                for (int j = 0; j < Nb / 8; ++j) {
                    store_global(reinterpret_cast<Pair *>(to + feature + j * 8 + lane_in_quad_ * 2),
                                 Pair{sums[j][half * 2], sums[j][half * 2 + 1]});
                }
            }
        }
    }

    // Rows that are not on 16 bytes, and features beyond the last.
    SK_DEVICE void store_elements(const Sums<Bm, Nb> &sums, int feature) const {
        SK_UNROLL
        for (int m = 0; m < Bm / 16; ++m) {
            SK_UNROLL
            for (int half = 0; half < 2; ++half) {
                if (auto *to = pixel(m * 16 + half * 8 + quad_)) {
                    SK_UNROLL
                    for (int i = 0; i < Nb / 4; ++i) {
                        const int at = feature + (i / 2) * 8 + lane_in_quad_ * 2 + i % 2;
                        if (at < args_.features) store_element(to + at, sums[m][i / 2][half * 2 + i % 2]);
                    }
                }
            }
        }
    }

    SK_DEVICE static void store_element(Storage *to, float sum) {
        if constexpr (E::bytes == 2) {
            store_global(to, static_cast<Storage>(pack<E>(sum, 0.0f)));
        } else {
            store_global(reinterpret_cast<float *>(to), sum);
        }
    }

    // The group's first feature of pixel i of the tile; null outside the image or batch.
    SK_DEVICE Storage *pixel(int i) const {
        const int at = load_shared<int>(pixels_ + static_cast<Shared>(i * 8 + 4));
        return at < 0 ? nullptr : static_cast<Storage *>(args_.result) + (first_ + at * args_.result_ld);
    }

    const StationaryArgs &args_;
    const Shared pixels_;
    const int quad_, lane_in_quad_, group_;
    const int64_t first_;
};

}  // namespace stationary_kernel
}  // namespace cuda
}  // namespace sparsekern
