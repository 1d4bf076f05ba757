// SPDX-License-Identifier: Apache-2.0
// dbias from the tiles of dy that wgrad has in shared memory anyway. A thread adds up 16 bytes of channels over every
// bias_parts-th pixel, in fp32 and in the order of pixels; parts are added in order at the end.
#pragma once

#include "wgrad_pieces.cuh"

namespace sparsekern {
namespace cuda {

template <class E> class BiasSums {
public:
    SK_DEVICE explicit BiasSums(const WgradArgs &args, const Window &window) : first_(-1) {
        SK_UNROLL
        for (int i = 0; i < chunk; ++i) sums_[i] = 0;
        const int part = thread_id() / args.cut.bias_chunks, column = thread_id() % args.cut.bias_chunks;
        if (window.bias && part < args.cut.bias_parts && column * chunk < window.rows * args.bo()) {
            first_ = part * args.cut.dy.pitch + column * 16;
        }
    }

    SK_DEVICE void add(const WgradCut &cut, Shared dy) {
        if (first_ < 0) return;
        const int end = cut.dy.rows * cut.dy.pitch;
        for (int at = first_; at < end; at += cut.bias_parts * cut.dy.pitch) {
            const Words4 words = load_shared<Words4>(dy + at);
            add_word(0, words.x), add_word(1, words.y), add_word(2, words.z), add_word(3, words.w);
        }
    }

    // The ring is free now: the tiles of two stages hold the parts in any case.
    SK_DEVICE void store(const WgradArgs &args, const Window &window) const {
        const int width = args.cut.bias_chunks * chunk, part = thread_id() / args.cut.bias_chunks;
        if (first_ >= 0) {
            const int column = thread_id() % args.cut.bias_chunks * chunk;
            SK_UNROLL
            for (int i = 0; i < chunk; ++i) store_shared(shared_memory() + (part * width + column + i) * 4, sums_[i]);
        }
        barrier();
        const Channels out = window.out(args);
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
    static constexpr int chunk = 16 / E::bytes;

    SK_DEVICE void add_word(int i, uint32_t word) {
        if constexpr (E::bytes == 2) {
            sums_[2 * i] += widen<E>(static_cast<uint16_t>(word));
            sums_[2 * i + 1] += widen<E>(static_cast<uint16_t>(word >> 16));
        } else {
            sums_[i] += widen<E>(word);
        }
    }

    float sums_[chunk];
    int first_;  // where the thread's bytes lie in a tile of dy; -1: it has none
};

}  // namespace cuda
}  // namespace sparsekern
