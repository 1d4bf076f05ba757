// SPDX-License-Identifier: Apache-2.0
#include "wgrad.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "wgrad_cut.h"

namespace sparsekern {
namespace cuda {
namespace {

constexpr int64_t MOST_SHARED_BYTES = 227 * 1024;  // of sm_90 and sm_100; the launch checks the GPU's own limit

void expect(bool good, const std::string &what, int64_t got, const char *advice) {
    if (good) return;
    throw std::invalid_argument("wgrad: expected " + what + ", got " + std::to_string(got) + "; " + advice);
}

void at_least_1(const char *name, int64_t got) {
    expect(got >= 1, std::string(name) + " to be at least 1", got, "give another plan or shape");
}

void check_problem(const Problem &a) {
    for (const auto &[name, edge] : {std::pair{"bo", a.bo}, std::pair{"bi", a.bi}}) {
        expect(edge == 16 || edge == 32 || edge == 64 || edge == 128,
               std::string("block edge ") + name + " to be 16, 32, 64 or 128", edge, "use another backend");
    }
    at_least_1("groups", a.groups);
    expect(a.c % a.groups == 0 && a.o % a.groups == 0, "groups to divide c and o", a.groups, "give a layer's numbers");
    at_least_1("stride_h", a.stride_h), at_least_1("stride_w", a.stride_w);
    at_least_1("dilation_h", a.dilation_h), at_least_1("dilation_w", a.dilation_w);
}

void check_plan(const Problem &a, const WgradPlan &plan) {
    at_least_1("plan.rows", plan.rows), at_least_1("plan.cols", plan.cols), at_least_1("plan.splits", plan.splits);
    at_least_1("plan.tile_images", plan.tile_images);
    at_least_1("plan.tile_h", plan.tile_h), at_least_1("plan.tile_w", plan.tile_w);
    expect(plan.warps >= 1 && plan.warps <= 16, "plan.warps to be 1 to 16", plan.warps, "use more splits instead");
    expect(plan.stages >= 2 && plan.stages <= 4, "plan.stages to be 2 to 4", plan.stages, "2 overlap copy and product");
    const int64_t pixels = int64_t{plan.tile_images} * plan.tile_h * plan.tile_w;
    expect(pixels % 16 == 0, "the pixels of a tile to be a multiple of 16", pixels, "take more images or a wider tile");
    expect(int64_t{plan.rows} * a.bo <= 128 * plan.warps,
           "plan.rows * bo to be at most 128 * plan.warps = " + std::to_string(128 * plan.warps),
           int64_t{plan.rows} * a.bo, "use fewer rows or more warps");
}

// Whole chunks of 16 bytes, an odd number of them: the 8 pixels that one ldmatrix reads then lie in different banks.
int64_t odd_pitch(int64_t bytes) {
    return bytes / 16 % 2 == 0 ? bytes + 16 : bytes;
}

void check_address(const char *name, const void *address, int bytes) {
    const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes));
    expect(off == 0, std::string(name) + " on " + std::to_string(bytes) + " bytes", off,
           "bytes off; give a tensor of its own, not a slice");
}

void check_ld(const char *name, int64_t ld, int channels, Dtype dtype) {
    const int64_t most = INT32_MAX / element_bytes(dtype);
    expect(ld >= channels && ld <= most,
           std::string(name) + " to be " + std::to_string(channels) + " to " + std::to_string(most), ld,
           "give the elements from one pixel to the next");
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
    check_problem(a);
    check_plan(a, plan);
    const int64_t element = element_bytes(a.dtype), threads = 32 * plan.warps;
    const int64_t dy_bytes = plan.rows * a.bo * element, x_bytes = plan.cols * int64_t{a.bi} * element;
    const int64_t height = int64_t{plan.tile_h - 1} * a.stride_h + int64_t{a.r - 1} * a.dilation_h + 1;
    const int64_t width = int64_t{plan.tile_w - 1} * a.stride_w + int64_t{a.s - 1} * a.dilation_w + 1;
    const int64_t pixels = int64_t{plan.tile_images} * plan.tile_h * plan.tile_w;
    const std::string limit = "at most " + std::to_string(MOST_SHARED_BYTES) + " bytes of shared memory";
    const char *const smaller = "use a smaller window or tile, or fewer stages";
    // A first estimate, lest the products below overflow.
    const double rows = double(plan.tile_images) * double(height) * double(width);
    const double least = plan.stages * (double(pixels) * double(dy_bytes) + rows * double(x_bytes));
    expect(least <= MOST_SHARED_BYTES, limit, least < 1e18 ? static_cast<int64_t>(least) : INT64_MAX, smaller);
    const int64_t x_rows = plan.tile_images * height * width;
    const int64_t dy_pitch = odd_pitch(dy_bytes), x_pitch = odd_pitch(x_bytes);
    const int64_t stage = pixels * dy_pitch + x_rows * x_pitch;
    const int64_t pieces = plan.warps * int64_t{wgrad_pieces_per_warp(wgrad_piece(a.bo), wgrad_piece(a.bi))};

    Reserve reserve;
    reserve(plan.stages * stage);
    const int64_t dy_places = reserve(pixels * 8), x_places = reserve(x_rows * 8);
    const int64_t x_row_table = reserve(pixels * 4), list = reserve(pieces * 16), counts = reserve(plan.rows * 4);
    const int64_t channels = reserve(32), window = reserve(32);
    expect(reserve.used <= MOST_SHARED_BYTES, limit, reserve.used, smaller);

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
    // What the kernel counts in 32 bits.
    expect(cut.tiles < INT32_MAX, "fewer than 2^31 tiles of pixels", cut.tiles, "use larger tiles");
    expect(plan.tile_images * std::max(int64_t{a.h} * a.w, int64_t{a.p} * a.q) < INT32_MAX,
           "plan.tile_images to have fewer than 2^31 pixels", plan.tile_images, "use fewer images");
    return cut;
}

int64_t wgrad_shared_bytes(const Problem &problem, const WgradPlan &plan) {
    return cut_wgrad(problem, plan).shared_bytes;
}

int64_t wgrad_workspace_bytes(const Problem &a, const WgradPlan &plan, bool with_bias) {
    if (plan.splits == 1) return 0;
    return 4 * plan.splits * (a.capacity * a.bo * a.bi + (with_bias ? a.o : 0));
}

void wgrad(const Problem &problem, const WgradPlan &plan, const void *dy, int64_t dy_ld, const void *x, int64_t x_ld,
           const int32_t *index, const uint8_t *element_mask, void *workspace, void *dvalues, void *dbias,
           const Stream &stream) {
    check_address("dvalues", dvalues, 16), check_address("dbias", dbias, 16);
    check_address("workspace", workspace, 16), check_address("element_mask", element_mask, 4);
    check_ld("dy_ld", dy_ld, problem.o, problem.dtype), check_ld("x_ld", x_ld, problem.c, problem.dtype);
    const int64_t bytes = wgrad_workspace_bytes(problem, plan, dbias != nullptr);
    if (bytes > 0 && workspace == nullptr) {
        throw std::invalid_argument("wgrad: expected a workspace of " + std::to_string(bytes) + " bytes for " +
                                    std::to_string(plan.splits) + " splits, got null");
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
