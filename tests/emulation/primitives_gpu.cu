// SPDX-License-Identifier: Apache-2.0
// Prints what the primitives do on this GPU (or, with SK_EMULATE, in the emulation) for compare_primitives.py:
//   nvcc -std=c++17 -arch=sm_80 -Icsrc/cuda -Itests/emulation tests/emulation/primitives_gpu.cu -o primitives_gpu
//   ./primitives_gpu > gpu.json && python tests/emulation/compare_primitives.py gpu.json
#include "primitives_dump.h"

int main() {
    try {
#ifdef SK_EMULATE
        const std::string source = "emulation", note = "from the host emulation; not yet confirmed by a GPU";
#else
        cudaDeviceProp device{};
        sparsekern::cuda::check_call(cudaGetDeviceProperties(&device, 0), "primitives_gpu", "cudaGetDeviceProperties");
        const std::string source = std::string(device.name) + ", compute capability " + std::to_string(device.major) +
                                   "." + std::to_string(device.minor),
                          note = "from a GPU";
#endif
        std::fputs(sparsekern::cuda::dump::json(source, note).c_str(), stdout);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
#ifdef SK_EMULATE
    for (const std::string &problem : sktest::emulation::problems()) std::fprintf(stderr, "%s\n", problem.c_str());
    return sktest::emulation::problems().empty() ? 0 : 1;
#else
    return 0;
#endif
}
