// SPDX-License-Identifier: Apache-2.0
#include "stationary.cuh"

namespace sparsekern {
namespace cuda {

void launch_stationary_tf32(const StationaryLaunch &launch) {
    stationary_kernel::launch_stationary<Tf32>(launch);
}

}  // namespace cuda
}  // namespace sparsekern
