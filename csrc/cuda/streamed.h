// SPDX-License-Identifier: Apache-2.0
// Forward and dgrad where a tile's activations don't fit shared memory: they come through a ring together with the
// weights. A block (CTA) makes the outputs of one panel of block rows for one tile of pixels; columns that several rows
// of the panel have are read once for all of them.
//
// Plans: warps 2, 4 or 8; bm = 32 * warps = tile_images * tile_h * tile_w; stages 2 to 4; splits 1.
#pragma once

#include "problem.h"

namespace sparsekern {
namespace cuda {

// Shared memory of one block. Throws std::invalid_argument for a problem or plan that the kernel can't run.
int64_t streamed_shared_bytes(const Problem &problem, Step step, const ProductPlan &plan);

// forward: source = x [N, H, W, C], result = y [N, P, Q, O]. dgrad: source = dy, result = dx. `source_ld` elements from
// one pixel to the next; `result` is dense. `values` [capacity, bo, bi] start at a multiple of 16 bytes. `bias` [O] of
// the same dtype or null, forward only.
void streamed(const Problem &problem, Step step, const ProductPlan &plan, const void *source, int64_t source_ld,
              const void *values, const int32_t *index, const void *bias, void *result, const Stream &stream);

namespace streaming {

struct Call {
    Problem problem;
    Step step;
    ProductPlan plan;
    const void *source;
    int64_t source_ld;
    const void *values;
    const int32_t *index;
    const void *bias;
    void *result;
    int64_t shared_bytes;
    Stream stream;
};

void run_bf16(const Call &call);
void run_fp16(const Call &call);
void run_tf32(const Call &call);

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern
