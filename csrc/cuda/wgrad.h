// SPDX-License-Identifier: Apache-2.0
// Gradient of the stored weight blocks (SDD), and of the bias: the accumulators stay in registers while the pixels
// pass.
//
// A thread block (CTA) owns the stored blocks within plan.rows block rows x plan.cols block columns, with all taps, of
// one group, and every plan.splits-th part of the pixel tiles. A tile is plan.tile_images x tile_h x tile_w output
// pixels, in all a multiple of 16: its dy and the box of x that its taps read come to shared memory through a ring of
// plan.stages tiles. A warp holds 2048 accumulators: 8 pieces of 16 x 16, 4 of 16 x 32 or 32 x 16, or 2 of 32 x 32 (a
// wider block is several pieces). Where the window stores more than the plan.warps warps hold, the pixels pass again.
//
// Allowed: rows, cols, splits from 1; warps 1 to 16; stages 2 to 4; rows * bo at most 128 * warps.
#pragma once

#include "problem.h"

namespace sparsekern {
namespace cuda {

// Shared memory of one thread block. Throws std::invalid_argument for a plan that the kernel can't run.
int64_t wgrad_shared_bytes(const Problem &problem, const WgradPlan &plan);

// Bytes of the workspace, 0 where splits is 1.
int64_t wgrad_workspace_bytes(const Problem &problem, const WgradPlan &plan, bool with_bias);

// dvalues [capacity, bo, bi]: every element is written, with zeros in spare slots, in the padding of edge blocks and
// where element_mask ([capacity, ceil(bo * bi / 8)] bits, the lowest first, or null) is 0. dbias [O] or null. dy_ld and
// x_ld: elements from one pixel to the next. dvalues, dbias and workspace lie on 16 bytes, element_mask on 4.
void wgrad(const Problem &problem, const WgradPlan &plan, const void *dy, int64_t dy_ld, const void *x, int64_t x_ld,
           const int32_t *index, const uint8_t *element_mask, void *workspace, void *dvalues, void *dbias,
           const Stream &stream);

}  // namespace cuda
}  // namespace sparsekern
