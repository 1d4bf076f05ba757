// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

namespace sparsekern {
namespace SK_ISA {

void linear_forward(const LinearArgs &, const float *, int64_t, const float *, const float *, float *, int64_t) {}
void linear_dgrad(const LinearArgs &, const float *, int64_t, const float *, float *, int64_t) {}
void linear_wgrad(const LinearArgs &, const float *, int64_t, const float *, int64_t, const uint8_t *, float *,
                  float *) {}

}  // namespace SK_ISA
}  // namespace sparsekern
