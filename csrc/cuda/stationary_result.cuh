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
    struct alignas(8) Pair {
        float low, high;
    };

public:
    // `pixels`: the table of Tile::fill_pixels.
    SK_DEVICE Result(const StationaryArgs &args, Shared pixels, int64_t first_pixel)
        : args_(args), pixels_(pixels), quad_(lane_id() >> 2), lane_in_quad_(lane_id() & 3),
          group_(block_z() * args.features), first_(first_pixel * args.result_ld + group_) {}

    SK_DEVICE void store(const Sums<Bm, Nb> &sums, int unit) const {
        const int feature = unit * Nb;
        Pair bias[Nb / 8];
        load_bias(bias, feature);
        const bool whole = args_.aligned_result && feature + Nb <= args_.features;
        SK_UNROLL
        for (int m = 0; m < Bm / 16; ++m) {
            if (!whole) {
                store_elements(sums[m], bias, m, feature);
            } else if constexpr (E::bytes == 2) {
                store_chunks(sums[m], bias, m, feature);
            } else {
                store_pairs(sums[m], bias, m, feature);
            }
        }
    }

private:
    // Of the features 8 j + this lane's two; zeros without bias and beyond the last feature.
    SK_DEVICE void load_bias(Pair (&bias)[Nb / 8], int feature) const {
        const auto *from = static_cast<const Storage *>(args_.bias) + group_;
        const int present = args_.bias ? args_.features : 0;
        SK_UNROLL
        for (int j = 0; j < Nb / 8; ++j) {
            const int at = feature + j * 8 + lane_in_quad_ * 2;
            bias[j].low = at < present ? widen<E>(load_global(from + at)) : 0.0f;
            bias[j].high = at + 1 < present ? widen<E>(load_global(from + at + 1)) : 0.0f;
        }
    }

    SK_DEVICE static Pair biased(const float (&sums)[4], int half, const Pair &bias) {
        return {sums[half * 2] + bias.low, sums[half * 2 + 1] + bias.high};
    }

    // The quad turns every four chunks of 16 bytes so that each of its lanes has one whole: neighbouring lanes then
    // fill sectors of 32 bytes.
    SK_DEVICE void store_chunks(const float (&sums)[Nb / 8][4], const Pair (&bias)[Nb / 8], int m, int feature) const {
        constexpr int row_chunks = Nb / 8;
        SK_UNROLL
        for (int four = 0; four < 2 * row_chunks; four += 4) {
            uint32_t words[4];
            SK_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int half = (four + i) / row_chunks, j = (four + i) % row_chunks;
                const Pair pair = biased(sums[j], half, bias[j]);
                words[i] = pack<E>(pair.low, pair.high);
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
    SK_DEVICE void store_pairs(const float (&sums)[Nb / 8][4], const Pair (&bias)[Nb / 8], int m, int feature) const {
        SK_UNROLL
        for (int half = 0; half < 2; ++half) {
            if (auto *to = pixel(m * 16 + half * 8 + quad_)) {
                SK_UNROLL
                for (int j = 0; j < Nb / 8; ++j) {
                    store_global(reinterpret_cast<Pair *>(to + feature + j * 8 + lane_in_quad_ * 2),
                                 biased(sums[j], half, bias[j]));
                }
            }
        }
    }

    // Rows that are not on 16 bytes, and features beyond the last.
    SK_DEVICE void store_elements(const float (&sums)[Nb / 8][4], const Pair (&bias)[Nb / 8], int m,
                                  int feature) const {
        SK_UNROLL
        for (int half = 0; half < 2; ++half) {
            if (auto *to = pixel(m * 16 + half * 8 + quad_)) {
                SK_UNROLL
                for (int j = 0; j < Nb / 8; ++j) {
                    const int at = feature + j * 8 + lane_in_quad_ * 2;
                    const Pair pair = biased(sums[j], half, bias[j]);
                    if (at < args_.features) store_element(to + at, pair.low);
                    if (at + 1 < args_.features) store_element(to + at + 1, pair.high);
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
