// SPDX-License-Identifier: Apache-2.0
#include "streamed.cuh"

namespace sparsekern {
namespace cuda {
namespace streaming {

void run_fp16(const Call &call) {
    run<Fp16>(call);
}

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern
