// SPDX-License-Identifier: Apache-2.0
// Forward and dgrad with streamed activations (csrc/cuda/streamed.h) under the emulation.
#include "streamed.h"

#include "runner.h"

// The library's own sources: one translation unit, so that nothing is compiled twice.
#include "streamed.cpp"
#include "streamed_bf16.cu"
#include "streamed_fp16.cu"
#include "streamed_tf32.cu"

namespace sktest {
namespace {

using sparsekern::cuda::ProductPlan;
using sparsekern::cuda::Stream;
using sparsekern::cuda::streamed;
using sparsekern::cuda::streamed_shared_bytes;

// A plan for a test: its number picks every part. Few tests take 8 warps, which the emulation runs at a quarter of the
// speed of 2.
ProductPlan plan_of(const Problem &a, uint32_t number) {
    static const int warps[] = {2, 2, 4, 2, 2, 8}, shapes[][2] = {{4, 8}, {2, 4}, {1, 8}, {8, 4}, {1, 1}, {2, 16}};
    ProductPlan plan{};
    plan.warps = warps[number % 6];
    plan.bm = 32 * plan.warps;
    plan.stages = 2 + number / 6 % 3;
    plan.splits = 1;
    const int *shape = shapes[number / 18 % 6];
    const bool linear = is_linear(a);
    plan.tile_h = linear ? 1 : shape[0], plan.tile_w = linear ? 1 : shape[1];
    plan.tile_images = plan.bm / (plan.tile_h * plan.tile_w);
    return plan;
}

std::string text_of(const ProductPlan &plan) {
    return " tile " + std::to_string(plan.tile_images) + "x" + std::to_string(plan.tile_h) + "x" +
           std::to_string(plan.tile_w) + " warps " + std::to_string(plan.warps) + " stages " +
           std::to_string(plan.stages);
}

void check_step(const Fixture &f, Step step, const ProductPlan &plan, const std::string &test, Tally &tally) {
    check_product(f, step, test + text_of(plan), tally, [&](auto... given) {
        streamed(f.problem, step, plan, given..., Stream{});
        const emulation::Statistics &seen = emulation::statistics();
        tally.report(seen.ldmatrix_conflict == 1, test, "bank conflicts at " + seen.ldmatrix_place);
        // With several taps lanes look up different ones, once in 32 entries.
        if (f.problem.taps() == 1) {
            tally.report(seen.load_conflict == 1, test, "bank conflicts at " + seen.load_place);
        }
    });
}

void test_cases(Tally &tally, const std::vector<Case> &cases) {
    for_each_fixture(tally, "streamed", cases, [&](const Fixture &f, const std::string &test) {
        for (const Step step : {Step::forward, Step::dgrad}) {
            Random random(f.about.seed_ * 6 + static_cast<uint64_t>(f.problem.dtype) * 2 + (step == Step::dgrad));
            check_step(f, step, plan_of(f.problem, static_cast<uint32_t>(random.below(1 << 20))), test, tally);
        }
    });
}

// Every pair of block edges, with a list long enough for rings to wrap and ragged at its end.
std::vector<Case> edge_cases() {
    std::vector<Case> cases;
    for (const int bo : {16, 32, 64, 128}) {
        for (const int bi : {16, 32, 64, 128}) {
            cases.push_back(linear(40, 5 * bi + 24, 2 * bo + 8, bo, bi).density(0.6).full_rows());
        }
    }
    cases.push_back(linear(70, 900, 300).density(0.15));  // three panels, lists of several windows of 32
    cases.push_back(linear(70, 300, 900, 32, 32).density(0.3));
    cases.push_back(conv(1, 40, 5, 4, 40, 9, 7).pad(4, 4, 3, 3).density(0.3));      // windows with taps of every kind
    cases.push_back(conv(1, 40, 7, 6, 40, 6, 6).pad(3).stride(3, 2).density(0.4));  // windows without a valid entry
    cases.push_back(conv(1, 24, 3, 3, 24, 4, 26).pad(2, 2, 13, 13).density(0.3));   // the largest filter
    // Groups of which the second begins between two chunks of 16 bytes, as source and as result.
    cases.push_back(conv(2, 32, 2, 3, 264, 1, 1).groups(2).density(0.3));
    cases.push_back(conv(2, 264, 2, 3, 32, 1, 1).groups(2).density(0.3));
    return numbered(cases, 4000);
}

template <class Call> void expect_refusal(Tally &tally, const std::string &test, const std::string &says, Call call) {
    if (!tally.wants("streamed refuses " + test)) return;
    std::string got = "nothing";
    try {
        call();
    } catch (const std::invalid_argument &error) {
        got = error.what();
    }
    tally.report(got.find(says) != std::string::npos, test, "expected an error with \"" + says + "\", got " + got);
}

const Problem some_problem = linear(64, 32, 32).problem(Dtype::bfloat16);
const ProductPlan some_plan{64, 64, 1, 1, 2, 3, 1};

void test_plans(Tally &tally) {
    const auto refuses = [&](const std::string &test, const std::string &says, auto change) {
        Problem problem = some_problem;
        ProductPlan plan = some_plan;
        change(problem, plan);
        expect_refusal(tally, test, says, [&] { streamed_shared_bytes(problem, Step::forward, plan); });
    };
    refuses("warps", "expected 2, 4 or 8 warps, got 3", [](Problem &, ProductPlan &b) { b.warps = 3; });
    refuses("bm", "expected bm = 32 * warps = 64, got 128", [](Problem &, ProductPlan &b) { b.bm = 128; });
    refuses("tile", "expected a tile of bm = 64 pixels, got 32 x 1 x 1",
            [](Problem &, ProductPlan &b) { b.tile_images = 32; });
    refuses("empty tile", "expected a tile of bm = 64 pixels, got -64 x -1 x 1",
            [](Problem &, ProductPlan &b) { b.tile_images = -64, b.tile_h = -1; });
    refuses("stages", "expected 2 to 4 stages, got 5", [](Problem &, ProductPlan &b) { b.stages = 5; });
    refuses("splits", "expected splits = 1, got 2", [](Problem &, ProductPlan &b) { b.splits = 2; });
    refuses("edges", "expected block edges of 16, 32, 64 or 128, got 8 x 16",
            [](Problem &b, ProductPlan &) { b.bo = 8; });
    refuses("filter", "add up to at most 30, got 15 x 16", [](Problem &b, ProductPlan &) { b.r = 15, b.s = 16; });
    refuses("groups", "expected groups that divide c and o, got 3 for 32 and 32",
            [](Problem &b, ProductPlan &) { b.groups = 3; });
    refuses("strides", "expected strides and dilations of at least 1, got 0",
            [](Problem &b, ProductPlan &) { b.stride_w = 0; });
    expect_refusal(tally, "wgrad", "expected forward or dgrad, got wgrad",
                   [] { streamed_shared_bytes(some_problem, Step::wgrad, some_plan); });

    if (tally.wants("streamed shared bytes")) {
        const int64_t got = streamed_shared_bytes(some_problem, Step::forward, some_plan);
        const int64_t due = 3 * (64 + 128) * 128 + 16;
        tally.report(got == due, "shared bytes", "expected " + std::to_string(due) + ", got " + std::to_string(got));
    }
}

void test_arguments(Tally &tally) {
    alignas(16) static char memory[64];
    const auto refuses = [&](const std::string &test, const std::string &says, Step step, int64_t source_ld,
                             const void *values, const void *bias) {
        expect_refusal(tally, test, says, [&] {
            streamed(some_problem, step, some_plan, memory, source_ld, values, nullptr, bias, memory, Stream{});
        });
    };
    refuses("source_ld", "expected source_ld of at least the 32 channels, got 31", Step::forward, 31, memory, nullptr);
    refuses("values", "expected values at a multiple of 16 bytes, got 2 bytes past one", Step::forward, 32, memory + 2,
            nullptr);
    refuses("bias", "expected no bias in dgrad", Step::dgrad, 32, memory, memory);
    // A tile of 64 images of 2^26 pixels each; 2^32 elements of 32 channels.
    Problem large = some_problem;
    ProductPlan plan = some_plan;
    large.n = 64, large.h = large.w = large.p = large.q = 1 << 13;
    expect_refusal(tally, "span", "expected a tile that spans at most 2147483647 x 16 bytes", [&] {
        streamed(large, Step::forward, plan, memory, 32, memory, reinterpret_cast<const int32_t *>(memory), nullptr,
                 memory, Stream{});
    });
}

}  // namespace
}  // namespace sktest

int main(int argc, char **argv) {
    sktest::Tally tally(argc, argv);
    sktest::test_plans(tally);
    sktest::test_arguments(tally);
    sktest::test_cases(tally, sktest::first_cases());
    sktest::test_cases(tally, sktest::edge_cases());
    sktest::test_cases(tally, sktest::linear_cases());
    sktest::test_cases(tally, sktest::conv_cases());
    return tally.finish();
}
