// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "isa.h"
#include "simd.h"
#include "threads.h"

namespace sparsekern {
namespace SK_ISA {

void linear_wgrad(const LinearArgs &a, const float *dy, int64_t lddy, const float *x, int64_t ldx,
                  const uint8_t *element_mask, float *dvalues, float *dbias) {
    const Layout &l = a.layout;
    const int64_t size = l.bo * l.bi;
    memset(dvalues, 0, l.capacity * size * sizeof(float));
    if (dbias) memset(dbias, 0, a.out_features * sizeof(float));
    for (int64_t n = 0; n < a.m; ++n) {
        const float *g = dy + n * lddy, *xn = x + n * ldx;
        if (dbias)
            for (int64_t o = 0; o < a.out_features; ++o) dbias[o] += g[o];
        for (int64_t q = 0; q < l.nnz(); ++q)
            for (int64_t i = 0; i < l.bo; ++i)
                for (int64_t j = 0; j < l.bi; ++j) {
                    const int64_t o = l.row[q] * l.bo + i, k = l.col[q] * l.bi + j;
                    const int64_t bit = i * l.bi + j;
                    const uint8_t *mask = element_mask ? element_mask + q * ((size + 7) / 8) : nullptr;
                    if (o < a.out_features && k < a.in_features && (!mask || (mask[bit / 8] >> (bit % 8) & 1)))
                        dvalues[q * size + bit] += g[o] * xn[k];
                }
    }
}

}  // namespace SK_ISA
}  // namespace sparsekern
