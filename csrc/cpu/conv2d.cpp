// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

namespace sparsekern {
namespace SK_ISA {

void conv2d_forward(const Conv2dArgs &, const float *, const float *, const float *, float *) {}
void conv2d_dgrad(const Conv2dArgs &, const float *, const float *, float *) {}
void conv2d_wgrad(const Conv2dArgs &, const float *, const float *, const uint8_t *, float *, float *) {}

}  // namespace SK_ISA
}  // namespace sparsekern
