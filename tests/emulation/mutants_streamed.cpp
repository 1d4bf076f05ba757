// SPDX-License-Identifier: Apache-2.0
#include "mutants.h"
#include "streamed.cpp"
#include "streamed.cuh"

namespace sparsekern {
namespace cuda {
namespace streaming {

template <class E> void run_if(const Call &call) {
    if constexpr ((E::bytes == 4) == (sktest::kMutantDtype == Dtype::tf32)) run<E>(call);
}
void run_bf16(const Call &call) {
    run_if<Bf16>(call);
}
void run_fp16(const Call &) {}
void run_tf32(const Call &call) {
    run_if<Tf32>(call);
}

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern

int main() {
    using namespace sktest;
    return run_mutants("streamed", product_cuts(),
                       [](const Fixture &f, const std::string &test, Tally &tally, const ProductPlan &plan) {
                           for (const Step step : {Step::forward, Step::dgrad}) {
                               ProductPlan used = plan;
                               used.warps = plan.bm / 32, used.splits = 1;
                               check_product(f, step, test, tally, [&](auto... given) {
                                   sparsekern::cuda::streamed(f.problem, step, used, given...,
                                                              sparsekern::cuda::Stream{});
                               });
                           }
                       });
}
