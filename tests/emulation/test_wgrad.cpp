// SPDX-License-Identifier: Apache-2.0
// wgrad (csrc/cuda/wgrad.h) under the emulation.
#include "wgrad.h"

#include "runner.h"

// The library's own sources: each test is one translation unit.
#include "wgrad.cpp"
#include "wgrad_bf16.cu"
#include "wgrad_fp16.cu"
#include "wgrad_tf32.cu"

namespace sktest {
namespace {

using sparsekern::cuda::Stream;
using sparsekern::cuda::wgrad;
using sparsekern::cuda::wgrad_shared_bytes;
using sparsekern::cuda::wgrad_workspace_bytes;
using sparsekern::cuda::WgradPlan;

std::string text(const WgradPlan &plan) {
    char line[200];
    std::snprintf(line, sizeof line, "window %dx%d tile %dx%dx%d warps %d stages %d splits %d", plan.rows, plan.cols,
                  plan.tile_images, plan.tile_h, plan.tile_w, plan.warps, plan.stages, plan.splits);
    return line;
}

bool fits(const Problem &a, const WgradPlan &plan) {
    try {
        return wgrad_shared_bytes(a, plan) <= emulation::options().shared_limit;
    } catch (const std::invalid_argument &) {
        return false;
    }
}

void check_plan(const Fixture &f, const WgradPlan &plan, const std::string &test, Tally &tally) {
    check_wgrad(f, wgrad_workspace_bytes(f.problem, plan, f.about.bias), test + " " + text(plan), tally,
                [&](auto... given) { wgrad(f.problem, plan, given..., Stream{}); });
}

// Some plan that fits, drawn by lot; a small one where the lot has no luck.
WgradPlan drawn_plan(const Problem &a, Random &random) {
    static const int tokens[][3] = {{16, 1, 1}, {32, 1, 1}, {64, 1, 1}};
    static const int patches[][3] = {{1, 4, 4}, {1, 2, 8}, {2, 2, 4}, {4, 1, 4}, {1, 1, 16}, {1, 16, 1}, {2, 4, 4}};
    const auto lot = [&](int count) { return static_cast<int>(random.below(count)); };
    for (int attempt = 0; attempt < 20; ++attempt) {
        const int *tile = is_linear(a) ? tokens[lot(3)] : patches[lot(7)];
        const WgradPlan plan{1 + lot(4), 1 + lot(4), tile[0],    tile[1],
                             tile[2],    1 + lot(4), 2 + lot(3), random.flip(0.5) ? 1 : 3};
        if (fits(a, plan)) return plan;
    }
    return {1, 1, 16, 1, 1, 1, 2, 1};
}

// Every case in every dtype, each with a plan of its own.
void test_cases(Tally &tally) {
    for (const std::vector<Case> &cases : {first_cases(), linear_cases(), conv_cases()}) {
        for_each_fixture(tally, "wgrad", cases, [&](const Fixture &f, const std::string &test) {
            if (f.about.poison) return;  // a NaN of x also meets the zeros of pixels past the image's edge
            Random random(f.about.seed_ * 3 + static_cast<uint64_t>(f.problem.dtype));
            check_plan(f, drawn_plan(f.problem, random), test, tally);
        });
    }
}

// Every template of the kernel, in one pass and in several; and no bank conflict where tokens are multiplied. (Threads
// that add up dbias of few channels meet some.)
void test_variants(Tally &tally) {
    for (const int bo : {16, 32, 64}) {
        for (const int bi : {16, 32, 128}) {
            Case a = linear(45, 2 * bi + 8, 2 * bo + 8, bo, bi).all().masked();
            a.bias = bi == 128;
            for_each_fixture(tally, "variant", numbered({a}, bo + bi), [&](const Fixture &f, const std::string &test) {
                const WgradPlan plans[] = {
                    {2, 3, 16, 1, 1, 1, 2, 1},  // several passes, the last shorter
                    {1, 1, 16, 1, 1, 1, 3, 3},  // few pieces
                    {3, 3, 16, 1, 1, 3, 2, 1},  // shares of different size
                };
                for (const WgradPlan &plan : plans) {
                    if (!fits(f.problem, plan)) continue;
                    check_plan(f, plan, test, tally);
                    const emulation::Statistics &seen = emulation::statistics();
                    tally.report(seen.ldmatrix_conflict == 1, test,
                                 f.text() + ": ldmatrix conflicts at " + seen.ldmatrix_place);
                    tally.report(a.bias || seen.load_conflict == 1, test,
                                 f.text() + ": loads conflict at " + seen.load_place);
                    tally.report(seen.store_conflict == 1, test, f.text() + ": stores conflict at " + seen.store_place);
                }
            });
        }
    }
}

// Splits without pixels, no pixels at all, nothing stored: zeros all the same.
void test_nothing(Tally &tally) {
    const std::vector<Case> cases = {linear(20, 40, 40).masked(), linear(0, 40, 40).spare(3),
                                     linear(33, 40, 40).none().spare(4), linear(33, 40, 40).none().spare(0),
                                     linear(33, 40, 40).none().spare(0).no_bias()};
    for_each_fixture(tally, "nothing", numbered(cases, 1), [&](const Fixture &f, const std::string &test) {
        check_plan(f, {1, 2, 16, 1, 1, 2, 4, 5}, test, tally);
        check_plan(f, {1, 2, 16, 1, 1, 2, 2, 1}, test, tally);
    });
}

// What the library says of a call that it can't do; empty if it does it.
template <class Call> std::string refusal(Call call) {
    try {
        call();
    } catch (const std::invalid_argument &error) {
        return error.what();
    }
    return "";
}

void test_refusals(Tally &tally) {
    if (!tally.wants("refusals")) return;
    const Problem good = conv(2, 64, 8, 8, 64, 3, 3).pad(1).block(32, 16).problem(Dtype::bfloat16);
    const WgradPlan plan{2, 2, 1, 4, 8, 4, 3, 2};
    const auto refuse = [&](const char *what, auto change) {
        Problem a = good;
        WgradPlan b = plan;
        change(a, b);
        const std::string said = refusal([&] { wgrad_shared_bytes(a, b); });
        const bool clear =
            said.find("expected " + std::string(what)) != std::string::npos && said.find(", got ") != std::string::npos;
        tally.report(clear, "refusals", std::string(what) + ": " + (said.empty() ? "accepted" : said));
    };
    const std::string said = refusal([&] { wgrad_shared_bytes(good, plan); });
    tally.report(said.empty(), "refusals", "a good plan: " + said);
    refuse("plan.rows", [](Problem &, WgradPlan &b) { b.rows = 0; });
    refuse("plan.cols", [](Problem &, WgradPlan &b) { b.cols = 0; });
    refuse("plan.warps", [](Problem &, WgradPlan &b) { b.warps = 17; });
    refuse("plan.stages", [](Problem &, WgradPlan &b) { b.stages = 1; });
    refuse("plan.splits", [](Problem &, WgradPlan &b) { b.splits = 0; });
    refuse("plan.tile_h", [](Problem &, WgradPlan &b) { b.tile_h = 0; });
    refuse("the pixels of a tile", [](Problem &, WgradPlan &b) { b.tile_w = 7; });
    refuse("plan.rows * bo", [](Problem &, WgradPlan &b) { b.rows = 17; });
    refuse("at most 232448 bytes of shared memory", [](Problem &, WgradPlan &b) { b.cols = 200; });
    refuse("at most 232448 bytes of shared memory",
           [](Problem &a, WgradPlan &) { a.dilation_h = a.dilation_w = 2000000000; });
    refuse("block edge bi", [](Problem &a, WgradPlan &) { a.bi = 8; });
    refuse("groups", [](Problem &a, WgradPlan &) { a.groups = 3; });
    refuse("stride_w", [](Problem &a, WgradPlan &) { a.stride_w = 0; });
    refuse("dilation_h", [](Problem &a, WgradPlan &) { a.dilation_h = 0; });
    refuse("fewer than 2^31 tiles", [](Problem &a, WgradPlan &) { a.n = int64_t{1} << 40; });

    const Fixture f(linear(16, 16, 16), Dtype::bfloat16);
    const WgradPlan split{1, 1, 16, 1, 1, 1, 2, 2};
    alignas(16) char memory[4096];
    const auto run = [&](const WgradPlan &with, int64_t ld, void *workspace, void *dvalues) {
        return refusal([&] {
            wgrad(f.problem, with, f.dy.data(), ld, f.x.data(), f.x_ld, f.index.as<int32_t>(), nullptr, workspace,
                  dvalues, nullptr, Stream{});
        });
    };
    tally.report(run(split, 16, memory, memory + 2).find("expected dvalues on 16 bytes") != std::string::npos,
                 "refusals", "an unaligned result");
    tally.report(run(split, 16, nullptr, memory).find("expected a workspace of") != std::string::npos, "refusals",
                 "no workspace");
    tally.report(run(split, 15, memory, memory).find("expected dy_ld") != std::string::npos, "refusals",
                 "pixels that overlap");
}

}  // namespace
}  // namespace sktest

int main(int argc, char **argv) {
    sktest::Tally tally(argc, argv);
    sktest::test_refusals(tally);
    sktest::test_nothing(tally);
    sktest::test_variants(tally);
    sktest::test_cases(tally);
    return tally.finish();
}
