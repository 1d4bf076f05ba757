// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace sparsekern {
namespace cuda {

// Puts the CUDA kernels into the submodule sparsekern._C.cuda.
void define(pybind11::module_ module);

}  // namespace cuda
}  // namespace sparsekern
