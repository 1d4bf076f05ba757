// SPDX-License-Identifier: Apache-2.0
#include "mutants.h"
#include "stationary.cpp"
#include "stationary.cuh"

namespace sparsekern {
namespace cuda {

template <class E> void launch_if(const StationaryLaunch &launch) {
    if constexpr ((E::bytes == 4) == (sktest::kMutantDtype == Dtype::tf32)) {
        stationary_kernel::launch_stationary<E>(launch);
    }
}
void launch_stationary_bf16(const StationaryLaunch &launch) {
    launch_if<Bf16>(launch);
}
void launch_stationary_fp16(const StationaryLaunch &) {}
void launch_stationary_tf32(const StationaryLaunch &launch) {
    launch_if<Tf32>(launch);
}

}  // namespace cuda
}  // namespace sparsekern

int main() {
    using namespace sktest;
    return run_mutants("stationary", product_cuts(),
                       [](const Fixture &f, const std::string &test, Tally &tally, const ProductPlan &plan) {
                           for (const Step step : {Step::forward, Step::dgrad}) {
                               ProductPlan used = plan;
                               used.warps = 4;
                               check_product(f, step, test, tally, [&](auto... given) {
                                   sparsekern::cuda::stationary(f.problem, step, used, given...,
                                                                sparsekern::cuda::Stream{});
                               });
                           }
                       });
}
