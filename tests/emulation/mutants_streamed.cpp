// SPDX-License-Identifier: Apache-2.0
#include "mutants.h"
#include "streamed.cpp"
#include "streamed.cuh"

namespace sparsekern {
namespace cuda {
namespace streaming {

void run_bf16(const Call &call) {
    run<Bf16>(call);
}
void run_fp16(const Call &) {}
void run_tf32(const Call &call) {
    run<Tf32>(call);
}

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern

int main() {
    using namespace sktest;
    std::vector<Cut<ProductPlan>> cuts = product_cuts();
    cuts.push_back({linear(5, 512, 32).all(), {64, 64, 1, 1, 0, 2, 1}});  // lists of as many entries as lanes
    cuts.push_back({linear(5, 528, 32).all(), {64, 64, 1, 1, 0, 2, 1}});
    return run_mutants(
        "streamed", cuts, [](const Fixture &f, const std::string &test, Tally &tally, const ProductPlan &plan) {
            for (const Step step : {Step::forward, Step::dgrad}) {
                ProductPlan used = plan;
                used.warps = plan.bm / 32, used.splits = 1;
                check_product(f, step, test, tally, [&](auto... given) {
                    sparsekern::cuda::streamed(f.problem, step, used, given..., sparsekern::cuda::Stream{});
                });
            }
        });
}
