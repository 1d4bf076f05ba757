// SPDX-License-Identifier: Apache-2.0
// What the executables of tests/cuda_mutations.py share: few problems, an end at the first failure.
#pragma once

#include "runner.h"

namespace sktest {

using sparsekern::cuda::ProductPlan;

// A problem and how it is cut.
template <class Plan> struct Cut {
    Case problem;
    Plan plan;
};

// visit(fixture, name, tally, plan) for each problem in two dtypes. An exception that escapes is a failure like any
// other.
template <class Plan, class Visit>
int run_mutants(const std::string &family, const std::vector<Cut<Plan>> &cuts, Visit visit) {
    Tally tally(0, nullptr);
    tally.stop_at_first_failure();
    uint64_t seed = 0;
    try {
        // Paths of 2 and of 4 bytes. Rounding of operands shows only with all digits.
        for (const Dtype dtype : {Dtype::bfloat16, Dtype::tf32}) {
            for (const Cut<Plan> &cut : cuts) {
                Case problem = cut.problem.seed(++seed);
                if (dtype == Dtype::tf32) problem.data = Data::full;
                visit(Fixture(problem, dtype), family, tally, cut.plan);
            }
        }
    } catch (const std::exception &error) {
        tally.report(false, family, std::string("threw ") + error.what());
    }
    return tally.finish();
}

// Forward and dgrad. Nothing is alike down and across, in outputs and inputs, in block rows and columns. The kernels'
// tests say how many warps they take.
inline std::vector<Cut<ProductPlan>> product_cuts() {
    return {
        {conv(4, 40, 9, 14, 48, 3, 3).pad(1, 0, 0, 2).block(16, 32).stride(2, 1).dilation(1, 2).density(0.8),
         {64, 2, 4, 8, 0, 4, 1}},
        {conv(5, 36, 11, 9, 68, 2, 3).pad(0, 1, 1, 0).block(32, 16).groups(2).stride(1, 3).dilation(3, 1),
         {64, 2, 8, 4, 0, 2, 2}},
        {linear(33, 45, 80, 16, 32).unaligned().full_rows(), {64, 64, 1, 1, 0, 4, 2}},
        {conv(2, 32, 3, 4, 264, 1, 1).groups(2), {64, 4, 4, 4, 0, 2, 1}},
        {linear(130, 150, 170).density(0.7), {64, 64, 1, 1, 0, 4, 1}},
        {linear(66, 72, 150, 32, 16).full_rows(), {64, 64, 1, 1, 0, 2, 1}},
        {linear(20, 198, 130, 64, 128).full_rows().gapped(), {64, 64, 1, 1, 0, 2, 1}},
        {linear(20, 130, 200, 128, 64).full_rows(), {64, 64, 1, 1, 0, 3, 2}},
        {conv(1, 32, 12, 5, 80, 3, 1).pad(2, 1, 0, 0).stride(1, 2).groups(4).full_rows(), {64, 1, 32, 2, 0, 3, 1}},
        {conv(2, 80, 5, 7, 32, 1, 3).pad(0, 0, 1, 0).stride(2, 1).groups(4).full_rows(), {64, 1, 2, 32, 0, 3, 1}},
        {conv(3, 56, 3, 5, 32, 2, 5).pad(0, 2, 2, 2).groups(4).full_rows().dilation(2, 1).unaligned(),
         {64, 1, 4, 16, 0, 2, 1}},
    };
}

}  // namespace sktest
