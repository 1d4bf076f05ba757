// SPDX-License-Identifier: Apache-2.0
#include "mutants.h"
#include "wgrad.cpp"
#include "wgrad.cuh"

namespace sparsekern {
namespace cuda {

void wgrad_bf16(const WgradCall &call) {
    launch_wgrad<Bf16>(call);
}
void wgrad_fp16(const WgradCall &) {}
void wgrad_tf32(const WgradCall &call) {
    launch_wgrad<Tf32>(call);
}

}  // namespace cuda
}  // namespace sparsekern

namespace sktest {
namespace {

// Nothing alike down and across, in outputs and inputs, in block rows and columns.
const std::vector<Cut<sparsekern::cuda::WgradPlan>> kCuts = {
    {linear(70, 130, 104).masked().full_rows(), {4, 2, 16, 1, 1, 2, 2, 1}},
    {linear(20, 41, 55).poisoned().masked().full_rows(), {2, 2, 16, 1, 1, 2, 2, 2}},
    {linear(20, 21, 301).full_rows().gapped(),
     {19, 1, 16, 1, 1, 5, 2, 1}},  // rows of shared memory longer than 512 bytes
    {linear(20, 301, 21).full_rows().gapped(), {1, 19, 16, 1, 1, 2, 2, 1}},
    {conv(1, 96, 4, 4, 96, 1, 1).groups(2).full_rows(), {2, 2, 1, 4, 4, 1, 2, 1}},  // windows that end with a group
    {linear(40, 96, 88).all(), {6, 1, 16, 1, 1, 1, 3, 1}},
    {linear(24, 128, 64, 16, 32).all(), {4, 4, 16, 1, 1, 1, 2, 1}},  // several passes
    {linear(24, 64, 128, 32, 16).all(), {4, 4, 16, 1, 1, 1, 2, 1}},
    {linear(75, 30, 90, 32, 16).full_rows().unaligned(), {1, 2, 32, 1, 1, 1, 3, 2}},
    {conv(2, 40, 9, 6, 48, 3, 3).pad(1, 0, 0, 2).block(16, 32).stride(2, 1).dilation(1, 2).masked(),
     {2, 1, 1, 2, 8, 2, 4, 2}},
    {conv(3, 24, 11, 7, 90, 2, 3).pad(1, 2, 2, 1).block(64, 16).stride(1, 2).dilation(3, 1), {1, 2, 2, 4, 2, 2, 3, 3}},
    {conv(5, 64, 3, 9, 56, 1, 3).pad(0, 0, 1, 1).block(32, 32).groups(4), {2, 1, 4, 1, 4, 1, 2, 3}},
    {conv(2, 56, 3, 9, 64, 1, 3).pad(0, 0, 1, 1).block(32, 32).groups(4), {2, 1, 1, 1, 16, 1, 2, 1}},
    {conv(3, 128, 5, 4, 24, 3, 2).pad(0, 1, 1, 0).block(16, 64).all().stride(1, 2).no_bias(), {2, 1, 4, 2, 2, 4, 3, 1}},
    {conv(3, 96, 12, 4, 48, 3, 1).pad(1, 1, 0, 0).groups(3).full_rows(), {1, 2, 2, 8, 1, 1, 2, 1}},
};

}  // namespace
}  // namespace sktest

int main() {
    using namespace sktest;
    return run_mutants("wgrad", kCuts, [](const Fixture &f, const std::string &test, Tally &tally, const auto &plan) {
        const int64_t bytes = sparsekern::cuda::wgrad_workspace_bytes(f.problem, plan, f.about.bias);
        check_wgrad(f, bytes, test, tally, [&](auto... given) {
            sparsekern::cuda::wgrad(f.problem, plan, given..., sparsekern::cuda::Stream{});
        });
    });
}
