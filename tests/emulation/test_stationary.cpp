// SPDX-License-Identifier: Apache-2.0
// Forward and dgrad with stationary activations (csrc/cuda/stationary.h) under the emulation.
#include "stationary.h"

#include "runner.h"

// The library's own sources: each test is one translation unit.
#include "stationary.cpp"
#include "stationary_bf16.cu"
#include "stationary_fp16.cu"
#include "stationary_tf32.cu"

namespace sktest {
namespace {

using sparsekern::cuda::ProductPlan;
using sparsekern::cuda::stationary;
using sparsekern::cuda::stationary_shared_bytes;
using sparsekern::cuda::Stream;

std::string text(const ProductPlan &plan) {
    char line[200];
    std::snprintf(line, sizeof line, "bm %d tile %dx%dx%d warps %d stages %d splits %d", plan.bm, plan.tile_images,
                  plan.tile_h, plan.tile_w, plan.warps, plan.stages, plan.splits);
    return line;
}

// bm pixels as tokens, or as patches of height x width.
ProductPlan plan_of(int bm, int height, int width, int warps, int stages, int splits) {
    return {bm, bm / (height * width), height, width, warps, stages, splits};
}

bool fits(const Problem &a, Step step, const ProductPlan &plan) {
    try {
        return stationary_shared_bytes(a, step, plan) <= emulation::options().shared_limit;
    } catch (const std::invalid_argument &) {
        return false;
    }
}

// Some plan that fits, drawn by lot; small ones where the lot has no luck.
ProductPlan drawn_plan(const Problem &a, Step step, Random &random) {
    static const int shapes[][2] = {{4, 8}, {2, 4}, {1, 8}, {8, 4}, {1, 1}, {2, 16}, {16, 1}};
    for (int attempt = 0; attempt < 20; ++attempt) {
        const int *shape = is_linear(a) ? shapes[4] : shapes[random.below(7)];
        const int warps[] = {4, 4, 8, 16};
        const ProductPlan plan = plan_of(32 << random.below(3), shape[0], shape[1], warps[random.below(4)],
                                         2 + static_cast<int>(random.below(3)), 1 + static_cast<int>(random.below(2)));
        if (fits(a, step, plan)) return plan;
    }
    return plan_of(32, 1, 1, 4, 2, 1);
}

void check_plan(const Fixture &f, Step step, const ProductPlan &plan, const std::string &test, Tally &tally) {
    check_product(f, step, test + " " + text(plan), tally,
                  [&](auto... given) { stationary(f.problem, step, plan, given..., Stream{}); });
}

// Every case in every dtype, forward and dgrad, each with a plan of its own; where no tile fits, the layer is not for
// this family.
void test_cases(Tally &tally) {
    for (const std::vector<Case> &cases : {first_cases(), linear_cases(), conv_cases()}) {
        for_each_fixture(tally, "stationary", cases, [&](const Fixture &f, const std::string &test) {
            for (const Step step : {Step::forward, Step::dgrad}) {
                Random random(f.about.seed_ * 6 + static_cast<uint64_t>(f.problem.dtype) * 2 + (step == Step::dgrad));
                const ProductPlan plan = drawn_plan(f.problem, step, random);
                if (fits(f.problem, step, plan)) check_plan(f, step, plan, test, tally);
            }
        });
    }
}

// Every template of the kernel on problems that are ragged in all ways; and, of those that promise it, no conflicts of
// banks where operands are read.
void test_variants(Tally &tally) {
    for (const int edge : {16, 32, 64, 128}) {
        const Case cases[] = {linear(37, edge + 9, edge + 23, edge, edge).full_rows().density(0.7),
                              conv(3, edge + 9, 3, 9, edge + 23, 2, 3).pad(0, 1, 2, 0).block(edge, edge).density(0.6)};
        for (const int bm : {32, 64, 128}) {
            for_each_fixture(tally, "variant", numbered({cases[0], cases[1]}, edge + bm),
                             [&](const Fixture &f, const std::string &test) {
                                 for (const Step step : {Step::forward, Step::dgrad}) {
                                     const ProductPlan plan =
                                         is_linear(f.problem) ? plan_of(bm, 1, 1, 4, 3, 1) : plan_of(bm, 2, 8, 4, 2, 1);
                                     if (!fits(f.problem, step, plan)) continue;
                                     check_plan(f, step, plan, test, tally);
                                     const emulation::Statistics &seen = emulation::statistics();
                                     tally.report(seen.ldmatrix_conflict == 1, test,
                                                  f.text() + ": ldmatrix conflicts at " + seen.ldmatrix_place);
                                     tally.report(seen.load_conflict == 1, test,
                                                  f.text() + ": loads conflict at " + seen.load_place);
                                 }
                             });
        }
    }
}

// What stationary_shared_bytes says of a plan that the kernel can't run; empty if it takes it.
std::string refusal(const Problem &problem, Step step, const ProductPlan &plan) {
    try {
        stationary_shared_bytes(problem, step, plan);
    } catch (const std::invalid_argument &error) {
        return error.what();
    }
    return "";
}

void test_refusals(Tally &tally) {
    if (!tally.wants("refusals")) return;
    const Problem good = conv(2, 64, 8, 8, 64, 3, 3).pad(1).block(32, 16).problem(Dtype::bfloat16);
    const ProductPlan plan = plan_of(128, 4, 8, 8, 3, 2);
    const auto refuse = [&](const char *what, Step step, auto change) {
        Problem a = good;
        ProductPlan b = plan;
        change(a, b);
        const std::string said = refusal(a, step, b);
        const bool clear =
            said.find("expected " + std::string(what)) != std::string::npos && said.find(", got ") != std::string::npos;
        tally.report(clear, "refusals", std::string(what) + ": " + (said.empty() ? "accepted" : said));
    };
    const Step forward = Step::forward;
    tally.report(refusal(good, forward, plan).empty(), "refusals", "a good plan: " + refusal(good, forward, plan));
    refuse("a forward or dgrad step", Step::wgrad, [](Problem &, ProductPlan &) {});
    refuse("bm to be one of", forward, [](Problem &, ProductPlan &b) { b.bm = 96; });
    refuse("a tile of bm", forward, [](Problem &, ProductPlan &b) { b.tile_w = 4; });
    refuse("tile_images to be at least 1", forward, [](Problem &, ProductPlan &b) { b.tile_images = 0; });
    refuse("warps", forward, [](Problem &, ProductPlan &b) { b.warps = 16; });  // blocks of 32 features
    refuse("warps", forward, [](Problem &, ProductPlan &b) { b.warps = 5; });
    refuse("stages to be one of", forward, [](Problem &, ProductPlan &b) { b.stages = 5; });
    refuse("splits to be at least 1", forward, [](Problem &, ProductPlan &b) { b.splits = 0; });
    refuse("a tile of at most", forward, [](Problem &a, ProductPlan &) { a.c = 4096; });
    refuse("bi to be one of", forward, [](Problem &a, ProductPlan &) { a.bi = 8; });
    refuse("groups to divide", forward, [](Problem &a, ProductPlan &) { a.groups = 3; });
    refuse("stride_h to be at least 1", forward, [](Problem &a, ProductPlan &) { a.stride_h = 0; });
    ProductPlan wide = plan;
    wide.warps = 16;
    tally.report(refusal(good, Step::dgrad, wide).empty(), "refusals", "16 warps for blocks of 16 features");
}

}  // namespace
}  // namespace sktest

int main(int argc, char **argv) {
    sktest::Tally tally(argc, argv);
    sktest::test_refusals(tally);
    sktest::test_variants(tally);
    sktest::test_cases(tally);
    return tally.finish();
}
