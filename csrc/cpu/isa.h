// SPDX-License-Identifier: Apache-2.0
// Every kernel source is compiled once per instruction set, with -DSK_ISA=avx512 and the flags to match. All it defines
// lives in that namespace or is static: an inline function shared between them could be the copy the linker keeps, and
// would then run AVX-512 code on a processor without it. So no std algorithms or containers in kernel sources.
#pragma once

#include "../common.h"

#ifndef SK_ISA
#error "compile with -DSK_ISA=generic, avx2 or avx512"
#endif

namespace sparsekern {
namespace SK_ISA {

void linear_forward(const LinearArgs &, const float *x, int64_t ldx, const float *values, const float *bias, float *y,
                    int64_t ldy);
void linear_dgrad(const LinearArgs &, const float *dy, int64_t lddy, const float *values, float *dx, int64_t lddx);
void linear_wgrad(const LinearArgs &, const float *dy, int64_t lddy, const float *x, int64_t ldx,
                  const uint8_t *element_mask, float *dvalues, float *dbias);
void conv2d_forward(const Conv2dArgs &, const float *x, const float *values, const float *bias, float *y);
void conv2d_dgrad(const Conv2dArgs &, const float *dy, const float *values, float *dx);
void conv2d_wgrad(const Conv2dArgs &, const float *dy, const float *x, const uint8_t *element_mask, float *dvalues,
                  float *dbias);

}  // namespace SK_ISA
}  // namespace sparsekern
