// SPDX-License-Identifier: Apache-2.0
// Every CPU kernel of one instruction set (SPARSEKERN_ISA) against loops in double.
//   test_cpu [part of a kernel's name]      e.g. test_cpu conv2d_dgrad
// Exit status: 0 passed, 1 failed, 2 wrong usage, 77 the processor lacks the instruction set.
#include <stdexcept>

#include "conv2d_cases.h"
#include "linear_cases.h"

int main(int argc, char **argv) {
    const char *isa = std::getenv("SPARSEKERN_ISA");
    try {
        std::printf("instruction set: %s\n", sparsekern::kernels().name);
    } catch (const std::runtime_error &error) {
        std::printf("%s\n", error.what());
        const std::string name = isa ? isa : "";
        return name == "avx2" || name == "avx512" ? 77 : 2;
    }
    sktest::Tally tally;
    tally.only = argc > 1 ? argv[1] : "";
    const std::string name = sparsekern::kernels().name;
    tally.phase = name == "avx512" ? 2 : name == "avx2" ? 1 : 0;
    sktest::run_linear_cases(tally);
    sktest::run_conv2d_cases(tally);
    std::printf("%lld checks passed, %lld failed\n", static_cast<long long>(tally.passed),
                static_cast<long long>(tally.failed));
    if (tally.passed + tally.failed == 0) {
        std::printf("no kernel's name contains %s; expected linear|conv2d, forward|dgrad|wgrad\n", tally.only.c_str());
        return 2;
    }
    return tally.failed ? 1 : 0;
}
