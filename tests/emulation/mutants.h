// SPDX-License-Identifier: Apache-2.0
// What the executables of tests/cuda_mutations.py share: few problems, one dtype, an end at the first failure.
#pragma once

#include "runner.h"

namespace sktest {

#ifdef SK_MUTANTS_TF32
constexpr Dtype kMutantDtype = Dtype::tf32;
#else
constexpr Dtype kMutantDtype = Dtype::bfloat16;
#endif

using sparsekern::cuda::ProductPlan;

// `bm` pixels as tokens, or as patches of 4 x 4 or 2 x 8.
inline ProductPlan product_plan(const Fixture &f, int bm, int warps, int stages, int splits) {
    const bool tokens = f.problem.h * f.problem.w * f.problem.taps() == 1;
    const bool flat = f.about.seed_ % 2 == 1;
    if (tokens) return {bm, bm, 1, 1, warps, stages, splits};
    return {bm, bm / 16, flat ? 2 : 4, flat ? 8 : 4, warps, stages, splits};
}

// visit(fixture, name) for each case in the one dtype. An escaped exception is a failure like any other.
template <class Visit> int run_mutants(const std::string &family, const std::vector<Case> &cases, Visit visit) {
    Tally tally(0, nullptr);
    tally.stop_at_first_failure();
    try {
        for (const Case &a : cases) visit(Fixture(a, kMutantDtype), family, tally);
    } catch (const std::exception &error) {
        tally.report(false, family, std::string("threw ") + error.what());
    }
    return tally.finish();
}

}  // namespace sktest
