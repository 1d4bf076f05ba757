// SPDX-License-Identifier: Apache-2.0
#include "streamed.cuh"

namespace sparsekern {
namespace cuda {
namespace streaming {

void run_bf16(const Call &call) {
    run<Bf16>(call);
}

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern
