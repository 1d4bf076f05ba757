// SPDX-License-Identifier: Apache-2.0
// What stationary.cpp works out for the kernel of stationary.cuh. No CUDA headers.
#pragma once

#include "problem.h"
#include "tap.h"

namespace sparsekern {
namespace cuda {

struct StationaryArgs {
    const void *source;
    const void *values;
    const int32_t *order;  // block rows by descending length; null: natural order
    const int32_t *ptr;    // entries of each block row over all groups
    const int32_t *code;   // of each entry: tap * blocks + channel block
    const int32_t *slot;   // of each entry: where its block lies in values; null: at the entry's own position
    const void *bias;      // or null
    void *result;

    int64_t n, source_ld;
    int source_h, source_w, result_h, result_w;
    Axis y, x;
    int tile_images, tile_h, tile_w;
    int tiles_n, tiles_y, tiles_x;  // tiles of one phase

    // Of one group.
    int channels, features;  // of the source and of the result
    int blocks;              // along the channels, of one tap
    int rows;                // block rows
    int slices;              // units of one block row: a unit is what one warp computes at a time
    int units;               // those with any feature; the last row may have empty slices

    int block_bytes, weight_row_bytes, result_row_bytes;
    int block_stages;     // stages that one block fills; 0: a block fills half a stage
    int channel_bytes;    // of one block in a pixel of the tile
    bool aligned_result;  // every unit of every pixel begins on 16 bytes

    int stages, splits;

    // Shared memory: from one pixel of the tile to the next, and where the tile and the tables begin; rings come first.
    int pitch;
    uint32_t tile, pixels, taps;
};

struct StationaryLaunch {
    StationaryArgs args;
    bool transposed;
    int bm, nb;
    int64_t grid_x, grid_y, grid_z;
    int threads;
    int64_t shared_bytes;
    Stream stream;
};

// A step is what one multiply instruction reads of a row: 32 bytes of channels. A stage is two steps.
constexpr int STEP_BYTES = 32;

// Features that a warp computes at a time.
constexpr int stationary_nb(int feature_edge) {
    return feature_edge == 16 ? 16 : 32;
}
constexpr int stationary_stage_bytes(int nb) {
    return 2 * nb * STEP_BYTES;
}
// Where the accumulators take more than half of 128 registers, only 8 warps find room.
constexpr int stationary_threads(int bm, int nb) {
    return bm * nb / 32 <= 64 ? 512 : 256;
}

void launch_stationary_bf16(const StationaryLaunch &launch);
void launch_stationary_fp16(const StationaryLaunch &launch);
void launch_stationary_tf32(const StationaryLaunch &launch);

}  // namespace cuda
}  // namespace sparsekern
