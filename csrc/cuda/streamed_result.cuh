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
        if constexpr (E::bytes == 2) {
            store_chunks(sums);
        } else {
            store_pairs(sums);
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

    // A lane holds pairs of outputs. The quad turns four chunks of 16 bytes so that each of its lanes has one whole:
    // neighbouring lanes then fill sectors of 32 bytes.
    SK_DEVICE void store_chunks(const Sums<Outputs> &sums) const {
        SK_UNROLL
        for (int four = 0; four < Outputs / 8; four += 4) {
            const int output = (four + lane_id() % 4) * 8;
            SK_UNROLL
            for (int row = 0; row < ROWS; ++row) {
                uint32_t words[4];
                SK_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float (&c)[4] = sums[row / 2][four + i];
                    words[i] = pack<E>(c[row % 2 * 2], c[row % 2 * 2 + 1]);
                }
                transpose_quad(words, lane_id());
                if (place_[row] >= 0) store_chunk(result_ + place_[row] + output, words, left_ - output);
            }
        }
    }

    SK_DEVICE void store_chunk(Storage *to, const uint32_t (&words)[4], int count) const {
        if (aligned_ && count >= 8) {
            store_global(reinterpret_cast<Words4 *>(to), Words4{words[0], words[1], words[2], words[3]});
            return;
        }
        SK_UNROLL
        for (int i = 0; i < 8; ++i) {
            if (i < count) store_global(to + i, static_cast<Storage>(words[i / 2] >> (i % 2 * 16)));
        }
    }

    // Two outputs of 4 bytes per lane: a quad fills a sector.
    SK_DEVICE void store_pairs(const Sums<Outputs> &sums) const {
        SK_UNROLL
        for (int j = 0; j < Outputs / 8; ++j) {
            const int output = j * 8 + lane_id() % 4 * 2;
            SK_UNROLL
            for (int row = 0; row < ROWS; ++row) {
                const float (&c)[4] = sums[row / 2][j];
                if (place_[row] < 0) continue;
                store_pair(reinterpret_cast<float *>(result_) + place_[row] + output, c[row % 2 * 2],
                           c[row % 2 * 2 + 1], left_ - output);
            }
        }
    }

    SK_DEVICE void store_pair(float *to, float low, float high, int count) const {
        struct alignas(8) Pair {
            float low, high;
        };
        if (aligned_ && count >= 2) {
            store_global(reinterpret_cast<Pair *>(to), Pair{low, high});
        } else if (count >= 1) {
            store_global(to, low);
            if (count >= 2) store_global(to + 1, high);
        }
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
