// SPDX-License-Identifier: Apache-2.0
#include "wgrad.cuh"

namespace sparsekern {
namespace cuda {

void wgrad_tf32(const WgradCall &call) {
    launch_wgrad<Tf32>(call);
}

}  // namespace cuda
}  // namespace sparsekern
