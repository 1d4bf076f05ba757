// SPDX-License-Identifier: Apache-2.0
// Forward and dgrad with stationary activations (csrc/cuda/stationary.h) under the emulation.
#include "stationary.h"

#include "runner.h"

// The library's own sources: one translation unit, so that nothing is compiled twice.
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

bool is_linear(const Problem &a) {
    return a.h == 1 && a.w == 1 && a.r == 1 && a.s == 1;
}

// Tiles of bm pixels over an image; which one goes by number.
void set_tile(ProductPlan &plan, const Problem &a, uint32_t number) {
    static const int shapes[][2] = {{4, 8}, {2, 4}, {1, 8}, {8, 4}, {1, 1}, {2, 16}, {3, 1}};
    const int *shape = shapes[number % 7];
    plan.tile_h = 1, plan.tile_w = 1;
    if (!is_linear(a) && plan.bm % (shape[0] * shape[1]) == 0) plan.tile_h = shape[0], plan.tile_w = shape[1];
    plan.tile_images = plan.bm / (plan.tile_h * plan.tile_w);
}

// A plan for a test: its number picks every part, and bm shrinks until the tile fits.
ProductPlan plan_of(const Problem &a, Step step, uint32_t number) {
    const int bms[] = {32, 64, 128}, warps[] = {4, 8, 4, 16};
    ProductPlan plan{};
    plan.stages = 2 + number % 3;
    plan.warps = warps[number / 3 % 4];
    plan.splits = 1 + number / 5 % 2;
    for (int i = static_cast<int>(number / 7 % 3); i >= 0; --i) {
        plan.bm = bms[i];
        set_tile(plan, a, number / 11);
        const int edge = step == Step::forward ? a.bo : a.bi;
        if (plan.bm == 128 && edge > 16) plan.warps = std::min(plan.warps, 8);
        try {
            if (stationary_shared_bytes(a, step, plan) <= emulation::options().shared_limit) return plan;
        } catch (const std::invalid_argument &) {
        }
    }
    plan.warps = 4, plan.stages = 2;
    set_tile(plan, a, 4);
    return plan;
}

void check_step(const Fixture &f, Step step, const ProductPlan &plan, const std::string &test, Tally &tally) {
    const std::string name = test + " bm " + std::to_string(plan.bm) + " tile " + std::to_string(plan.tile_images) +
                             "x" + std::to_string(plan.tile_h) + "x" + std::to_string(plan.tile_w) + " warps " +
                             std::to_string(plan.warps) + " stages " + std::to_string(plan.stages) + " splits " +
                             std::to_string(plan.splits);
    check_product(f, step, name, tally, [&](auto... given) { stationary(f.problem, step, plan, given..., Stream{}); });
}

void test_cases(Tally &tally, const std::vector<Case> &cases) {
    for_each_fixture(tally, "stationary", cases, [&](const Fixture &f, const std::string &test) {
        for (const Step step : {Step::forward, Step::dgrad}) {
            Random random(f.about.seed_ * 6 + static_cast<uint64_t>(f.problem.dtype) * 2 + (step == Step::dgrad));
            check_step(f, step, plan_of(f.problem, step, static_cast<uint32_t>(random.below(1 << 20))), test, tally);
        }
    });
}

}  // namespace
}  // namespace sktest

int main(int argc, char **argv) {
    sktest::Tally tally(argc, argv);
    sktest::test_cases(tally, sktest::first_cases());
    sktest::test_cases(tally, sktest::linear_cases());
    sktest::test_cases(tally, sktest::conv_cases());
    return tally.finish();
}
