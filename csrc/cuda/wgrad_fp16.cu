// SPDX-License-Identifier: Apache-2.0
#include "wgrad.cuh"

namespace sparsekern {
namespace cuda {

void wgrad_fp16(const WgradCall &call) {
    launch_wgrad<Fp16>(call);
}

}  // namespace cuda
}  // namespace sparsekern
