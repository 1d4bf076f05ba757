// SPDX-License-Identifier: Apache-2.0
// What run() in streamed.cuh works out for its kernel, and how a stage of the ring is made up. No CUDA headers.
#pragma once

#include "problem.h"
#include "tap.h"

namespace sparsekern {
namespace cuda {
namespace streaming {

// A stage holds, of each pixel, 128 bytes of channels: 4 steps of one multiply instruction (16 channels of 16 bits, 8
// of 32). That is 4, 2 or 1 list entries or a part of one, whatever the dtype.
constexpr int ROW_BYTES = 128;
constexpr int STEPS = 4;
constexpr int STEP_LANES = 8;  // lanes that copy one pixel's row of a stage, 16 bytes each
constexpr int TAP_BYTES = 8;

// Block rows and outputs of one panel.
constexpr int panel_rows(int edge) {
    return union_rows(edge) ? union_rows(edge) : 1;
}
constexpr int panel_outputs(int edge) {
    return panel_rows(edge) * edge;
}
constexpr int64_t stage_bytes(int bm, int edge) {
    return int64_t{bm + panel_outputs(edge)} * ROW_BYTES;
}

struct Args {
    const char *source, *values;
    const void *bias;  // or null
    void *result;
    const int32_t *list_ptr;  // entries of each panel over all groups
    const int32_t *list;      // code << rows of a panel | the rows that have it; just the code where a panel is one row
    const int32_t *ptr;       // first block of each block row over all groups
    const int32_t *perm;      // dgrad: slot in values of each block; null: its own position

    int64_t n, result_ld;
    int source_h, source_w, result_h, result_w;
    Axis y, x;
    int tile_images, tile_h, tile_w;
    int tiles_y, tiles_x;  // of one phase

    // Of one group.
    int channels, features;     // of the source and of the result
    int columns, rows, panels;  // blocks along the channels, of one tap; block rows; panels of them
    int last_channels;          // of the last column

    // Places in the source are counted in units of 16 bytes, or in elements where pixels don't begin on 16 bytes.
    int unit_bytes, pixel_units, column_units, chunk_units;
    bool aligned_result;

    uint32_t block_bytes;
    int weight_row_bytes;
    int steps_log;  // steps of one entry in a stage: 1, 2 or 4
    int parts;      // stages of one entry
    int stages, stage_bytes;
};

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern
