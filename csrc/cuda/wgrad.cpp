// SPDX-License-Identifier: Apache-2.0
#include "wgrad.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "wgrad_cut.h"

namespace sparsekern {
namespace cuda {
namespace {

constexpr int64_t MOST_SHARED_BYTES = 227 * 1024;  // of sm_90 and sm_100; the launch checks the GPU's own limit

void expect(bool good, const char *what, const std::string &expected, int64_t got, const char *advice) {
    if (good) return;
    throw std::invalid_argument(std::string("wgrad: expected ") + what + " " + expected + ", got " +
                                std::to_string(got) + "; " + advice);
}

void check_edge(const char *name, int edge) {
    expect(edge == 16 || edge == 32 || edge == 64 || edge == 128, name, "of 16, 32, 64 or 128", edge,
           "use another backend for this block");
}

void check_plan(const Problem &a, const WgradPlan &plan) {
    check_edge("block edge bo", a.bo);
    check_edge("block edge bi", a.bi);
    expect(plan.rows >= 1, "plan.rows", "of at least 1", plan.rows, "a window has a block row");
    expect(plan.cols >= 1, "plan.cols", "of at least 1", plan.cols, "a window has a block column");
    expect(plan.warps >= 1 && plan.warps <= 16, "plan.warps", "of 1 to 16", plan.warps, "use more splits instead");
    expect(plan.stages >= 2 && plan.stages <= 4, "plan.stages", "of 2 to 4", plan.stages, "2 overlap copy and product");
    expect(plan.splits >= 1, "plan.splits", "of at least 1", plan.splits, "1 is no split");
    const int sides[] = {plan.tile_images, plan.tile_h, plan.tile_w};
    for (const int side : sides) expect(side >= 1, "sides of the pixel tile", "of at least 1", side, "use 1");
    const int64_t pixels = int64_t{plan.tile_images} * plan.tile_h * plan.tile_w;
    expect(pixels % 16 == 0, "a pixel tile", "of a multiple of 16 pixels", pixels, "take more images or a wider tile");
    expect(int64_t{plan.rows} * a.bo <= 128 * plan.warps, "plan.rows * bo",
           "of at most 128 * plan.warps = " + std::to_string(128 * plan.warps), int64_t{plan.rows} * a.bo,
           "use fewer rows or more warps");
    // What the kernel counts in 32 bits.
    expect(plan.tile_images * int64_t{a.h} * a.w < INT32_MAX && plan.tile_images * int64_t{a.p} * a.q < INT32_MAX,
           "pixels of plan.tile_images images", "below 2^31", plan.tile_images, "use fewer images");
}

// Whole chunks of 16 bytes, an odd number of them: the 8 pixels that one ldmatrix reads then lie in different banks.
int64_t odd_pitch(int64_t bytes) {
    return bytes / 16 % 2 == 0 ? bytes + 16 : bytes;
}

struct Reserve {
    int64_t used = 0;
    int64_t operator()(int64_t bytes) {
        const int64_t start = used;
        used += ceil_div(bytes, 16) * 16;
        return start;
    }
};

}  // namespace

WgradCut cut_wgrad(const Problem &a, const WgradPlan &plan) {
    check_plan(a, plan);
    const int64_t element = element_bytes(a.dtype), threads = 32 * plan.warps;
    const int64_t dy_bytes = plan.rows * a.bo * element, x_bytes = plan.cols * int64_t{a.bi} * element;
    const int64_t height = int64_t{plan.tile_h - 1} * a.stride_h + int64_t{a.r - 1} * a.dilation_h + 1;
    const int64_t width = int64_t{plan.tile_w - 1} * a.stride_w + int64_t{a.s - 1} * a.dilation_w + 1;
    const int64_t pixels = int64_t{plan.tile_images} * plan.tile_h * plan.tile_w;
    // Beyond any GPU; said before the products below can overflow.
    const double rows = double(plan.tile_images) * double(height) * double(width);
    const double least = plan.stages * (double(pixels) * double(dy_bytes) + rows * double(x_bytes));
    expect(least <= MOST_SHARED_BYTES, "shared memory", "of at most " + std::to_string(MOST_SHARED_BYTES) + " bytes",
           least < 1e18 ? static_cast<int64_t>(least) : INT64_MAX, "use a smaller window or tile, or fewer stages");
    const int64_t x_rows = plan.tile_images * height * width;
    const int64_t dy_pitch = odd_pitch(dy_bytes), x_pitch = odd_pitch(x_bytes);
    const int64_t stage = pixels * dy_pitch + x_rows * x_pitch;
    const int64_t pieces = plan.warps * int64_t{wgrad_pieces_per_warp(wgrad_piece(a.bo), wgrad_piece(a.bi))};

    Reserve reserve;
    reserve(plan.stages * stage);
    const int64_t dy_places = reserve(pixels * 8), x_places = reserve(x_rows * 8);
    const int64_t x_row_table = reserve(pixels * 4), list = reserve(pieces * 16), counts = reserve(plan.rows * 4);
    const int64_t channels = reserve(32), window = reserve(32);
    expect(reserve.used <= MOST_SHARED_BYTES, "shared memory",
           "of at most " + std::to_string(MOST_SHARED_BYTES) + " bytes", reserve.used,
           "use a smaller window or tile, or fewer stages");

    WgradCut cut;
    cut.dy = {plan.tile_h, plan.tile_w, int(pixels), int(dy_pitch), 0, int(dy_places), int(channels)};
    cut.x = {int(height),   int(width),        int(x_rows), int(x_pitch), int(COPY_LANES * pixels % threads),
             int(x_places), int(channels) + 16};
    cut.stage_bytes = int(stage);
    cut.x_rows = int(x_row_table);
    cut.pieces = int(list);
    cut.counts = int(counts);
    cut.window = int(window);
    cut.shared_bytes = int(reserve.used);
    cut.bias_columns = plan.rows * a.bo / 4;
    cut.bias_parts = int(std::min(threads / cut.bias_columns, pixels));
    cut.row_windows = int(ceil_div(a.rows(), plan.rows));
    cut.col_windows = int(ceil_div(a.cols(), plan.cols));
    cut.tile_images = plan.tile_images;
    cut.tiles_h = int(ceil_div(a.p, plan.tile_h));
    cut.tiles_w = int(ceil_div(a.q, plan.tile_w));
    cut.tiles = ceil_div(a.n, plan.tile_images) * cut.tiles_h * cut.tiles_w;
    expect(cut.tiles < INT32_MAX, "tiles of pixels", "below 2^31", cut.tiles, "use larger tiles");
    return cut;
}

int64_t wgrad_shared_bytes(const Problem &problem, const WgradPlan &plan) {
    return cut_wgrad(problem, plan).shared_bytes;
}

int64_t wgrad_workspace_bytes(const Problem &a, const WgradPlan &plan, bool with_bias) {
    check_plan(a, plan);
    if (plan.splits == 1) return 0;
    return 4 * plan.splits * (a.capacity * a.bo * a.bi + (with_bias ? a.o : 0));
}

void wgrad(const Problem &problem, const WgradPlan &plan, const void *dy, int64_t dy_ld, const void *x, int64_t x_ld,
           const int32_t *index, const uint8_t *element_mask, void *workspace, void *dvalues, void *dbias,
           const Stream &stream) {
    const auto on = [](const void *address, int bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; };
    if (!on(workspace, 16) || !on(dvalues, 16) || !on(dbias, 16) || !on(element_mask, 4)) {
        throw std::invalid_argument("wgrad: expected dvalues, dbias and workspace on 16 bytes and element_mask on 4, "
                                    "got another address; pass tensors of their own, not slices");
    }
    if (plan.splits > 1 && workspace == nullptr && wgrad_workspace_bytes(problem, plan, dbias != nullptr) > 0) {
        throw std::invalid_argument("wgrad: expected a workspace of " +
                                    std::to_string(wgrad_workspace_bytes(problem, plan, dbias != nullptr)) +
                                    " bytes for " + std::to_string(plan.splits) + " splits, got null");
    }
    const WgradCall call{problem, plan, dy, dy_ld, x, x_ld, index, element_mask, workspace, dvalues, dbias, stream};
    switch (problem.dtype) {
    case Dtype::bfloat16:
        return wgrad_bf16(call);
    case Dtype::float16:
        return wgrad_fp16(call);
    case Dtype::tf32:
        return wgrad_tf32(call);
    }
}

}  // namespace cuda
}  // namespace sparsekern
