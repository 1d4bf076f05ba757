// SPDX-License-Identifier: Apache-2.0
// Forward and dgrad with stationary activations: a block (CTA) keeps the pixels of its tile, halo and all channels of
// one group, in shared memory, and only weights are streamed. Weights are read once per tile whatever the block edge,
// 2 * bm FLOP per byte, and all taps and all block rows are served by one load of the activations.
#pragma once

#include "problem.h"

namespace sparsekern {
namespace cuda {

// Bytes of shared memory of one block. Throws std::invalid_argument for a plan that the kernel can't run: it takes bm
// of 32, 64 or 128, 4, 8 or 16 warps (16 not at bm 128 with output blocks wider than 16), 2 to 4 stages.
int64_t stationary_shared_bytes(const Problem &problem, Step step, const ProductPlan &plan);

// Forward: source x, result y. dgrad: source dy, result dx. All in the problem's dtype; source_ld elements from one
// pixel of the source to the next, the result dense (channels_last, or row-major). bias [O] or null, forward only.
// index: the packed layout of sparsekern/layout.py; values [capacity, bo, bi], on 16 bytes.
void stationary(const Problem &problem, Step step, const ProductPlan &plan, const void *source, int64_t source_ld,
                const void *values, const int32_t *index, const void *bias, void *result, const Stream &stream);

}  // namespace cuda
}  // namespace sparsekern
