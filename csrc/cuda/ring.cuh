// SPDX-License-Identifier: Apache-2.0
// Rings of asynchronous copies: each stage is one committed group, and all but one stage are under way while that one
// is used.
#pragma once

#include "primitives.cuh"

namespace sparsekern {
namespace cuda {

// Until the oldest stage of a ring of 2 to 4 has arrived, for the calling thread. A chain of tests on a value that is
// equal over the grid, because the instruction takes a constant.
SK_DEVICE void wait_for_oldest(int stages) {
    if (stages > 3) {
        cp_async_wait<2>();
    } else if (stages > 2) {
        cp_async_wait<1>();
    } else {
        cp_async_wait<0>();
    }
}

}  // namespace cuda
}  // namespace sparsekern
