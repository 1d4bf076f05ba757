// SPDX-License-Identifier: Apache-2.0
// dbias from the tiles of dy that wgrad has in shared memory anyway. A thread adds up 4 channels over every
// bias_parts-th pixel, in fp32 and in the order of pixels; parts are added in order at the end.
#pragma once

#include "wgrad_pieces.cuh"

namespace sparsekern {
namespace cuda {

template <class E> class BiasSums {
public:
    SK_DEVICE explicit BiasSums(const WgradArgs &args, bool wanted) : first_(-1) {
        SK_UNROLL
        for (int i = 0; i < chunk; ++i) sums_[i] = 0;
        const int part = thread_id() / args.cut.bias_columns, column = thread_id() % args.cut.bias_columns;
        if (wanted && part < args.cut.bias_parts && column * chunk < read_channels(args.cut.dy).padded) {
            first_ = part * args.cut.dy.pitch + column * chunk * E::bytes;
        }
    }

    SK_DEVICE void add(const WgradCut &cut, Shared dy) {
        if (first_ < 0) return;
        const int end = cut.dy.rows * cut.dy.pitch;
        for (int at = first_; at < end; at += cut.bias_parts * cut.dy.pitch) {
            if constexpr (E::bytes == 2) {
                const Words2 pairs = load_shared<Words2>(dy + at);
                add_pair(0, pairs.x), add_pair(2, pairs.y);
            } else {
                const Floats4 four = load_shared<Floats4>(dy + at);
                sums_[0] += four.x, sums_[1] += four.y, sums_[2] += four.z, sums_[3] += four.w;
            }
        }
    }

    // The ring is free now: the tiles of two stages hold the parts in any case.
    SK_DEVICE void store(const WgradArgs &args) const {
        const int width = args.cut.bias_columns * chunk, part = thread_id() / args.cut.bias_columns;
        if (first_ >= 0) {
            const int column = thread_id() % args.cut.bias_columns * chunk;
            store_shared(shared_memory() + (part * width + column) * 4,
                         Floats4{sums_[0], sums_[1], sums_[2], sums_[3]});
        }
        barrier();
        const Channels out = read_channels(args.cut.dy);
        for (int o = thread_id(); o < out.count; o += thread_count()) {
            float sum = 0;
            for (int i = 0; i < args.cut.bias_parts; ++i) {
                sum += load_shared<float>(shared_memory() + (i * width + o) * 4);
            }
            if (args.partial) {
                const int outputs = args.gradient.groups * args.gradient.out_per_group;
                store_global(args.bias_partial + int64_t{block_y()} * outputs + out.first + o, sum);
            } else {
                store_one<E>(args.gradient.dbias, out.first + o, sum);
            }
        }
    }

private:
    static constexpr int chunk = 4;

    SK_DEVICE void add_pair(int i, uint32_t pair) {
        sums_[i] += widen<E>(static_cast<typename E::Storage>(pair));
        sums_[i + 1] += widen<E>(static_cast<typename E::Storage>(pair >> 16));
    }

    float sums_[chunk];
    int first_;  // where the thread's first channel lies in a tile of dy; -1: it has none
};

}  // namespace cuda
}  // namespace sparsekern
