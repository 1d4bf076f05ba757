// SPDX-License-Identifier: Apache-2.0
// How a plan cuts wgrad: what lies where in shared memory, and the sizes that host and kernel must agree on.
#pragma once

#include "wgrad.h"

namespace sparsekern {
namespace cuda {

// A warp's share of a block is a piece of at most 32 x 32, and its pieces have 64 accumulators per thread.
constexpr int wgrad_piece(int edge) {
    return edge < 32 ? edge : 32;
}
constexpr int wgrad_pieces_per_warp(int piece_o, int piece_i) {
    return 64 * 32 / (piece_o * piece_i);
}

// Threads that copy one pixel together: 8 read whole lines of 128 bytes and meet no bank conflict, and the fewer they
// are, the fewer instructions it costs to find the pixels.
constexpr int COPY_LANES = 8;

// Pixels of dy or of x in shared memory, image-major.
struct TileCut {
    int height, width;  // of its box
    int rows;           // pixels
    int pitch;          // bytes from one pixel to the next
    int turn;           // threads after which those come that copy it
    int places;         // where in shared memory the table of pixels' places in the image starts
    int channels;       // and where it is written which channels they bring
};

struct WgradCut {
    TileCut dy, x;
    int stage_bytes;     // one tile of dy, then one of x
    int x_rows;          // where the table starts that gives each output pixel its row in the tile of x
    int pieces, counts;  // where the work list and the rows' numbers of blocks start
    int window;          // where it is written what the thread block owns
    int shared_bytes;    // of all
    int bias_columns;    // of 4 channels in a tile of dy
    int bias_parts;      // threads that share such a column, each with its own pixels
    int row_windows, col_windows;
    int64_t tiles;  // of pixels
    int tile_images, tiles_h, tiles_w;
};

// Throws std::invalid_argument for a plan that the kernel can't run.
WgradCut cut_wgrad(const Problem &problem, const WgradPlan &plan);

// What wgrad was called with.
struct WgradCall {
    const Problem &problem;
    const WgradPlan &plan;
    const void *dy;
    int64_t dy_ld;
    const void *x;
    int64_t x_ld;
    const int32_t *index;
    const uint8_t *element_mask;
    void *workspace, *dvalues, *dbias;
    const Stream &stream;
};

// Launch the kernels of one dtype, in wgrad_<dtype>.cu.
void wgrad_bf16(const WgradCall &call);
void wgrad_fp16(const WgradCall &call);
void wgrad_tf32(const WgradCall &call);

}  // namespace cuda
}  // namespace sparsekern
