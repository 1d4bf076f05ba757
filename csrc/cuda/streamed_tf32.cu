// SPDX-License-Identifier: Apache-2.0
#include "streamed.cuh"

namespace sparsekern {
namespace cuda {
namespace streaming {

void run_tf32(const Call &call) {
    run<Tf32>(call);
}

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern
