// SPDX-License-Identifier: Apache-2.0
#include "streamed.h"

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "streamed_args.h"

namespace sparsekern {
namespace cuda {
namespace streaming {

[[noreturn]] static void refuse(const std::string &expected, const std::string &got, const std::string &advice) {
    throw std::invalid_argument("streamed: expected " + expected + ", got " + got + "; " + advice);
}

static bool is_edge(int edge) {
    return edge == 16 || edge == 32 || edge == 64 || edge == 128;
}

static void check_positive(const char *what, std::initializer_list<int> sizes) {
    for (const int size : sizes) {
        if (size < 1) refuse(std::string(what) + " of at least 1", std::to_string(size), "check the shapes");
    }
}

static void check_problem(const Problem &a, Step step) {
    if (step == Step::wgrad) refuse("forward or dgrad", "wgrad", "use the wgrad kernel");
    if (!is_edge(a.bo) || !is_edge(a.bi)) {
        refuse("block edges of 16, 32, 64 or 128", std::to_string(a.bo) + " x " + std::to_string(a.bi),
               "use another backend");
    }
    check_positive("sizes", {a.groups, a.c, a.h, a.w, a.o, a.p, a.q, a.r, a.s});
    check_positive("strides and dilations", {a.stride_h, a.stride_w, a.dilation_h, a.dilation_w});
    if (a.n < 0) refuse("0 or more images", std::to_string(a.n), "check the shapes");
    if (a.c % a.groups || a.o % a.groups) {
        refuse("groups that divide c and o",
               std::to_string(a.groups) + " for " + std::to_string(a.c) + " and " + std::to_string(a.o),
               "check the shapes");
    }
    // A pixel's valid taps are kept as bits, one per filter row and one per filter column.
    if (a.r + a.s > 30) {
        refuse("a filter whose height and width add up to at most 30",
               std::to_string(a.r) + " x " + std::to_string(a.s), "use another kernel");
    }
}

static void check_plan(const ProductPlan &plan) {
    const std::string got_tile =
        std::to_string(plan.tile_images) + " x " + std::to_string(plan.tile_h) + " x " + std::to_string(plan.tile_w);
    if (plan.warps != 2 && plan.warps != 4 && plan.warps != 8) {
        refuse("2, 4 or 8 warps", std::to_string(plan.warps), "choose another plan");
    }
    if (plan.bm != 32 * plan.warps) {
        refuse("bm = 32 * warps = " + std::to_string(32 * plan.warps), std::to_string(plan.bm), "choose another plan");
    }
    if (plan.tile_images < 1 || plan.tile_h < 1 || plan.tile_w < 1 ||
        int64_t{plan.tile_images} * plan.tile_h * plan.tile_w != plan.bm) {
        refuse("a tile of bm = " + std::to_string(plan.bm) + " pixels", got_tile, "choose another tile");
    }
    if (plan.stages < 2 || plan.stages > 4) {
        refuse("2 to 4 stages", std::to_string(plan.stages), "choose another plan");
    }
    if (plan.splits != 1) refuse("splits = 1", std::to_string(plan.splits), "choose another plan");
}

}  // namespace streaming

int64_t streamed_shared_bytes(const Problem &problem, Step step, const ProductPlan &plan) {
    streaming::check_problem(problem, step);
    streaming::check_plan(plan);
    const int edge = step == Step::forward ? problem.bo : problem.bi;
    return plan.stages * streaming::stage_bytes(plan.bm, edge) +
           ceil_div(problem.taps() * streaming::TAP_BYTES, 16) * 16;
}

void streamed(const Problem &problem, Step step, const ProductPlan &plan, const void *source, int64_t source_ld,
              const void *values, const int32_t *index, const void *bias, void *result, const Stream &stream) {
    const int64_t shared_bytes = streamed_shared_bytes(problem, step, plan);
    const int channels = step == Step::forward ? problem.c : problem.o;
    if (source_ld < channels) {
        streaming::refuse("source_ld of at least the " + std::to_string(channels) + " channels",
                          std::to_string(source_ld), "pass the elements from one pixel to the next");
    }
    const streaming::Call call{problem, step, plan,   source,       source_ld, values,
                               index,   bias, result, shared_bytes, stream};
    if (step == Step::dgrad && bias) streaming::refuse("no bias in dgrad", "one", "pass null");
    if (reinterpret_cast<uintptr_t>(values) % 16 != 0) {
        streaming::refuse("values at a multiple of 16 bytes",
                          std::to_string(reinterpret_cast<uintptr_t>(values) % 16) + " bytes past one",
                          "copy them to a tensor of their own");
    }
    switch (problem.dtype) {
    case Dtype::bfloat16:
        return streaming::run_bf16(call);
    case Dtype::float16:
        return streaming::run_fp16(call);
    case Dtype::tf32:
        return streaming::run_tf32(call);
    }
}

}  // namespace cuda
}  // namespace sparsekern
