// SPDX-License-Identifier: Apache-2.0
// From a warp's sums to the result in memory: bias, rounding, stores.
#pragma once

#include "fragments.cuh"
#include "streamed_copies.cuh"

namespace sparsekern {
namespace cuda {
namespace streaming {

// Sums of a warp: [16 pixels][8 outputs][registers of one instruction].
template <int Outputs> using Sums = float[2][Outputs / 8][4];

template <class E, bool Transposed, int Outputs> class Result {
    using Storage = typename E::Storage;

public:
    SK_DEVICE Result(const Args &a, const Spot &spot, int warp) : aligned_(a.aligned_result) {
        const int first = spot.panel * Outputs, channel = spot.group * a.features + first;
        left_ = a.features - first;
        bias_ = a.bias ? static_cast<const Storage *>(a.bias) + channel : nullptr;
        result_ = static_cast<Storage *>(a.result) + channel;
        const Pixel own = pixel_of<Transposed>(a, spot, warp * 32 + lane_id());
        const int y = own.y * a.y.result_step(Transposed) + spot.phase_y;
        const int x = own.x * a.x.result_step(Transposed) + spot.phase_x;
        const int64_t pixel = ((spot.image0 + own.image) * a.result_h + y) * a.result_w + x;
        const int64_t place = own.inside ? pixel * a.result_ld : -1;
        SK_UNROLL
        for (int i = 0; i < ROWS; ++i) place_[i] = shuffle(place, i * 8 + lane_id() / 4);
    }

    SK_DEVICE void store(Sums<Outputs> &sums) const {
        if (bias_) add_bias(sums);
        if (aligned_ && left_ >= Outputs) {
            store_rows<true>(sums);
        } else {
            store_rows<false>(sums);
        }
    }

private:
    static constexpr int ROWS = 4;  // pixels of a lane: rows lane / 4 + 8 i of the warp's 32

    SK_DEVICE void add_bias(Sums<Outputs> &sums) const {
        SK_UNROLL
        for (int j = 0; j < Outputs / 8; ++j) {
            SK_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int output = j * 8 + lane_id() % 4 * 2 + i;
                if (output >= left_) continue;
                const float bias = widen<E>(load_global(bias_ + output));
                SK_UNROLL
                for (int m = 0; m < 2; ++m) sums[m][j][i] += bias, sums[m][j][i + 2] += bias;
            }
        }
    }

    template <bool Whole> SK_DEVICE void store_rows(const Sums<Outputs> &sums) const {
        SK_UNROLL
        for (int row = 0; row < ROWS; ++row) {
            if constexpr (E::bytes == 2) {
                store_chunks<Whole>(sums[row / 2], row);
            } else {
                store_pairs<Whole>(sums[row / 2], row);
            }
        }
    }

    // A lane holds pairs of outputs. The quad turns four chunks of 16 bytes so that each of its lanes has one whole:
    // neighbouring lanes then fill sectors of 32 bytes.
    template <bool Whole> SK_DEVICE void store_chunks(const float (&sums)[Outputs / 8][4], int row) const {
        SK_UNROLL
        for (int four = 0; four < Outputs / 8; four += 4) {
            uint32_t words[4];
            SK_UNROLL
            for (int i = 0; i < 4; ++i) {
                words[i] = pack<E>(sums[four + i][row % 2 * 2], sums[four + i][row % 2 * 2 + 1]);
            }
            transpose_quad(words, lane_id());
            const int output = (four + lane_id() % 4) * 8;
            if (place_[row] >= 0) store_chunk<Whole>(result_ + place_[row] + output, words, left_ - output);
        }
    }

    template <bool Whole> SK_DEVICE static void store_chunk(Storage *to, const uint32_t (&words)[4], int count) {
        if constexpr (Whole) {
            store_global(reinterpret_cast<Words4 *>(to), Words4{words[0], words[1], words[2], words[3]});
        } else {
            SK_UNROLL
            for (int i = 0; i < 8; ++i) {
                if (i < count) store_global(to + i, static_cast<Storage>(words[i / 2] >> (i % 2 * 16)));
            }
        }
    }

    // Two outputs of 4 bytes per lane: a quad fills a sector.
    template <bool Whole> SK_DEVICE void store_pairs(const float (&sums)[Outputs / 8][4], int row) const {
        SK_UNROLL
        for (int j = 0; j < Outputs / 8; ++j) {
            const int output = j * 8 + lane_id() % 4 * 2;
            auto *to = reinterpret_cast<float *>(result_) + place_[row] + output;
            if (place_[row] >= 0) store_pair<Whole>(to, sums[j][row % 2 * 2], sums[j][row % 2 * 2 + 1], left_ - output);
        }
    }

    template <bool Whole> SK_DEVICE static void store_pair(float *to, float low, float high, int count) {
        struct alignas(8) Pair {
            float low, high;
        };
        if (Whole) {
            store_global(reinterpret_cast<Pair *>(to), Pair{low, high});
            return;
        }
        if (count >= 1) store_global(to, low);
        if (count >= 2) store_global(to + 1, high);
    }

    const bool aligned_;  // every pixel's outputs begin on 16 bytes
    int left_;            // outputs of the group from the panel's first
    const Storage *bias_;
    Storage *result_;
    int64_t place_[ROWS];  // of the lane's pixels, in elements; -1 outside
};

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern
