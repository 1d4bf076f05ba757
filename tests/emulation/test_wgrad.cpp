// SPDX-License-Identifier: Apache-2.0
#include "runner.h"
#include "wgrad.cpp"
#include "wgrad_bf16.cu"
#include "wgrad_fp16.cu"
#include "wgrad_tf32.cu"
using namespace sktest; using namespace sparsekern::cuda;
int main(int argc, char **argv) {
    Tally tally(argc, argv);
    int k = 0;
    for (const Case &a : first_cases()) for (Dtype d : {Dtype::bfloat16, Dtype::float16, Dtype::tf32}) {
        Fixture f(a, d);
        WgradPlan plan{2, 2, 16, 1, 1, 2, 2, 1};
        if (a.h > 1) plan = {2, 2, 1, 4, 4, 2, 3, 2};
        std::string test = "first " + std::to_string(k++);
        if (!tally.wants(test)) continue;
        check_wgrad(f, wgrad_workspace_bytes(f.problem, plan, a.bias), test, tally, [&](auto... p) { wgrad(f.problem, plan, p..., Stream{}); });
    }
    return tally.finish();
}
