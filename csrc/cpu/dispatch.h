// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../common.h"

namespace sparsekern {

const KernelTable &kernels_generic();
const KernelTable &kernels_avx2();
const KernelTable &kernels_avx512();

// The best table this processor runs, or the one SPARSEKERN_ISA=generic|avx2|avx512 asks for. Chosen once.
// Throws std::runtime_error for an unknown name or an instruction set that the processor lacks.
const KernelTable &kernels();

}  // namespace sparsekern
