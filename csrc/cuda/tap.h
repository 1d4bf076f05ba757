// SPDX-License-Identifier: Apache-2.0
// Taps along one spatial axis of a product, as shifts between the image that is written and the image that is read.
// For the host, which sizes shared memory, and for kernels alike.
//
// Forward: result pixel i reads source pixel i * stride + shift, shift = tap * dilation - pad. dgrad: result pixel
// i * stride + phase reads source pixel i + shift, shift = (phase + pad - tap * dilation) / stride, and taps for which
// that is no whole number don't exist in that phase.
#pragma once

#include <climits>

#ifdef __CUDACC__
#define SK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SK_HOST_DEVICE inline
#endif

namespace sparsekern {
namespace cuda {

constexpr int NO_TAP = INT_MIN;

struct Axis {
    int taps, stride, dilation, pad;

    SK_HOST_DEVICE int phases(bool transposed) const { return transposed ? stride : 1; }
    // Pixels between neighbours of a tile: in the source, and in the result.
    SK_HOST_DEVICE int source_step(bool transposed) const { return transposed ? 1 : stride; }
    SK_HOST_DEVICE int result_step(bool transposed) const { return transposed ? stride : 1; }

    SK_HOST_DEVICE int shift(bool transposed, int phase, int tap) const {
        if (!transposed) return tap * dilation - pad;
        const int distance = phase + pad - tap * dilation;
        return distance % stride == 0 ? distance / stride : NO_TAP;
    }
};

// Least and greatest shift of a phase.
struct Reach {
    int low = INT_MAX, high = INT_MIN;

    SK_HOST_DEVICE bool empty() const { return low > high; }
};

SK_HOST_DEVICE Reach reach_of(const Axis &axis, bool transposed, int phase) {
    Reach reach;
    for (int tap = 0; tap < axis.taps; ++tap) {
        const int shift = axis.shift(transposed, phase, tap);
        if (shift == NO_TAP) continue;
        reach.low = shift < reach.low ? shift : reach.low;
        reach.high = shift > reach.high ? shift : reach.high;
    }
    return reach;
}

// Source pixels that a tile of `tile` result pixels reads, halo included.
SK_HOST_DEVICE int box_extent(const Axis &axis, bool transposed, const Reach &reach, int tile) {
    return reach.empty() ? 0 : (tile - 1) * axis.source_step(transposed) + reach.high - reach.low + 1;
}

}  // namespace cuda
}  // namespace sparsekern
