// SPDX-License-Identifier: Apache-2.0
#include "stationary.cuh"

namespace sparsekern {
namespace cuda {

void launch_stationary_fp16(const StationaryLaunch &launch) {
    stationary_kernel::launch_stationary<Fp16>(launch);
}

}  // namespace cuda
}  // namespace sparsekern
