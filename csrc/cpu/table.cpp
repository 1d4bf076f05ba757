// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"
#include "isa.h"

#define SK_CONCAT_(a, b) a##b
#define SK_CONCAT(a, b) SK_CONCAT_(a, b)
#define SK_STRING_(a) #a
#define SK_STRING(a) SK_STRING_(a)

namespace sparsekern {

const KernelTable &SK_CONCAT(kernels_, SK_ISA)() {
    static const KernelTable table = {SK_STRING(SK_ISA),    SK_ISA::linear_forward, SK_ISA::linear_dgrad,
                                      SK_ISA::linear_wgrad, SK_ISA::conv2d_forward, SK_ISA::conv2d_dgrad,
                                      SK_ISA::conv2d_wgrad};
    return table;
}

}  // namespace sparsekern
