// SPDX-License-Identifier: Apache-2.0
// How gradients are stored: which elements of a block get one, rounding, and the kernel that adds the partial sums of
// wgrad's splits in order.
#pragma once

#include "launch.cuh"

namespace sparsekern {
namespace cuda {

struct alignas(8) Floats2 {
    float x, y;
};
struct alignas(16) Floats4 {
    float x, y, z, w;
};

// The stored blocks and where their gradient goes.
struct GradientArgs {
    const int32_t *row_ptr, *col, *row;
    const uint32_t *element_mask;  // a block's bits are whole words: bo * bi is a multiple of 256
    void *dvalues, *dbias;
    int64_t capacity;
    int groups, rows, cols;  // block rows and block columns of a group
    int out_per_group, in_per_group;
    int log2_bi, log2_block;  // of bi, of bo * bi
};

SK_DEVICE int stored_blocks(const GradientArgs &args) {
    return load_global(args.row_ptr + args.groups * args.rows);
}

SK_DEVICE int smaller(int a, int b) {
    return a < b ? a : b;
}

// The elements of one stored block that learn.
class Learning {
public:
    SK_DEVICE Learning(const GradientArgs &args, int slot) {
        const int row = load_global(args.row + slot) % args.rows, col = load_global(args.col + slot) % args.cols;
        log2_bi_ = args.log2_bi;
        out_ = args.out_per_group - (row << (args.log2_block - log2_bi_));
        in_ = args.in_per_group - (col << log2_bi_);
        mask_ = args.element_mask ? args.element_mask + (int64_t{slot} << (args.log2_block - 5)) : nullptr;
    }

    // Bit i of the result: element + i. Right for the rest of the element's row, up to the next multiple of 32.
    SK_DEVICE uint32_t bits(int element) const {
        const int o = element >> log2_bi_, i = element & ((1 << log2_bi_) - 1);
        const int left = o < out_ ? in_ - i : 0;
        const uint32_t inside = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
        return mask_ ? inside & load_global(mask_ + element / 32) >> element % 32 : inside;
    }

private:
    int log2_bi_, out_, in_;
    const uint32_t *mask_;
};

SK_DEVICE float kept(float value, uint32_t bits, int i) {
    return bits >> i & 1 ? value : 0.0f;
}

template <class E> SK_DEVICE void store_pair(void *to, int64_t element, float low, float high) {
    store_global(static_cast<uint32_t *>(to) + element / 2, pack<E>(low, high));
}
template <> SK_DEVICE void store_pair<Tf32>(void *to, int64_t element, float low, float high) {
    store_global(static_cast<Floats2 *>(to) + element / 2, Floats2{low, high});
}

template <class E> SK_DEVICE void store_four(void *to, int64_t element, const Floats4 &a) {
    store_global(static_cast<Words2 *>(to) + element / 4, Words2{pack<E>(a.x, a.y), pack<E>(a.z, a.w)});
}
template <> SK_DEVICE void store_four<Tf32>(void *to, int64_t element, const Floats4 &a) {
    store_global(static_cast<Floats4 *>(to) + element / 4, a);
}

template <class E> SK_DEVICE void store_one(void *to, int64_t element, float value) {
    store_global(static_cast<uint16_t *>(to) + element, static_cast<uint16_t>(pack<E>(value, 0.0f)));
}
template <> SK_DEVICE void store_one<Tf32>(void *to, int64_t element, float value) {
    store_global(static_cast<float *>(to) + element, value);
}

// -- the second kernel of split wgrad --

constexpr int REDUCE_THREADS = 256;

struct ReduceArgs {
    GradientArgs gradient;
    const float *partial;       // [splits, capacity, bo, bi]; slots past the stored blocks hold nothing
    const float *bias_partial;  // [splits, out], or null
    int splits, out;
};

// 4 elements of dvalues.
template <class E> SK_DEVICE void reduce_values(const ReduceArgs &args, int64_t element) {
    const GradientArgs &to = args.gradient;
    const int slot = static_cast<int>(element >> to.log2_block);
    Floats4 sum{0, 0, 0, 0};
    if (slot < stored_blocks(to)) {
        const int64_t step = to.capacity << to.log2_block;
        for (int split = 0; split < args.splits; ++split) {
            const Floats4 part = load_global(reinterpret_cast<const Floats4 *>(args.partial + split * step + element));
            sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
        }
        const uint32_t bits = Learning(to, slot).bits(static_cast<int>(element & ((1 << to.log2_block) - 1)));
        sum = {kept(sum.x, bits, 0), kept(sum.y, bits, 1), kept(sum.z, bits, 2), kept(sum.w, bits, 3)};
    }
    store_four<E>(to.dvalues, element, sum);
}

template <class E> SK_DEVICE void reduce_bias(const ReduceArgs &args, int o) {
    float sum = 0;
    for (int split = 0; split < args.splits; ++split) {
        sum += load_global(args.bias_partial + int64_t{split} * args.out + o);
    }
    store_one<E>(args.gradient.dbias, o, sum);
}

// Threads for every 4 elements of dvalues, then for the elements of dbias.
template <class E> SK_KERNEL(REDUCE_THREADS, 1) reduce_kernel(SK_ARGS(ReduceArgs) args) {
    const int64_t thread = int64_t{block_x()} * REDUCE_THREADS + thread_id();
    const int64_t fours = args.gradient.capacity << (args.gradient.log2_block - 2);
    if (thread < fours) {
        reduce_values<E>(args, 4 * thread);
    } else if (args.bias_partial && thread - fours < args.out) {
        reduce_bias<E>(args, static_cast<int>(thread - fours));
    }
}

template <class E> void launch_reduce(const ReduceArgs &args, const Stream &stream) {
    const int64_t threads =
        (args.gradient.capacity << (args.gradient.log2_block - 2)) + (args.bias_partial ? args.out : 0);
    launch("wgrad reduction", reduce_kernel<E>, {ceil_div(threads, REDUCE_THREADS), 1, 1}, REDUCE_THREADS, 0, stream,
           args);
}

}  // namespace cuda
}  // namespace sparsekern
