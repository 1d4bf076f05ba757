// SPDX-License-Identifier: Apache-2.0
#include "mutants.h"
#include "stationary.cpp"
#include "stationary.cuh"

namespace sparsekern {
namespace cuda {

void launch_stationary_bf16(const StationaryLaunch &launch) {
    stationary_kernel::launch_stationary<Bf16>(launch);
}
void launch_stationary_fp16(const StationaryLaunch &) {}
void launch_stationary_tf32(const StationaryLaunch &launch) {
    stationary_kernel::launch_stationary<Tf32>(launch);
}

}  // namespace cuda
}  // namespace sparsekern

int main() {
    using namespace sktest;
    std::vector<Cut<ProductPlan>> cuts = product_cuts();
    cuts.push_back({linear(5, 16, 2240).density(0.7), {32, 32, 1, 1, 0, 2, 1}});  // more units than lanes of 4 warps
    cuts.push_back({linear(5, 512, 32).all(), {32, 32, 1, 1, 0, 2, 1}});          // lists of as many blocks as lanes
    return run_mutants(
        "stationary", cuts, [](const Fixture &f, const std::string &test, Tally &tally, const ProductPlan &plan) {
            for (const Step step : {Step::forward, Step::dgrad}) {
                if (step == Step::dgrad && f.problem.o == 2240) continue;  // tf32 does not fit
                ProductPlan used = plan;
                used.warps = 4;
                check_product(f, step, test, tally, [&](auto... given) {
                    sparsekern::cuda::stationary(f.problem, step, used, given..., sparsekern::cuda::Stream{});
                });
            }
        });
}
