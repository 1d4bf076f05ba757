// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace sparsekern {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
#endif

const KernelTable &choose() {
    const char *wish = std::getenv("SPARSEKERN_ISA");
    const std::string name = wish ? wish : "auto";
    if (name == "generic") return kernels_generic();
#if defined(__x86_64__)
    if (name == "avx512" && has_avx512()) return kernels_avx512();
    if (name == "avx2" && has_avx2()) return kernels_avx2();
    if (name == "auto") return has_avx512() ? kernels_avx512() : has_avx2() ? kernels_avx2() : kernels_generic();
#else
    if (name == "auto") return kernels_generic();
#endif
    throw std::runtime_error(
        "SPARSEKERN_ISA: expected auto, generic, avx2 or avx512 as far as this processor has them, got " + name);
}

}  // namespace

const KernelTable &kernels() {
    static const KernelTable &table = choose();
    return table;
}

}  // namespace sparsekern
