// SPDX-License-Identifier: Apache-2.0
// Vectors of L floats as GCC and clang write them, with the few operations that have no portable spelling.
// LANES is the natural width of the instruction set; narrower vectors (4, 8) work everywhere it is at least as wide.
#pragma once

#include <cstdint>

#include "isa.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns inside its own header (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define SK_INLINE static inline __attribute__((always_inline))
#define SK_UNROLL _Pragma("GCC unroll 32")

namespace sparsekern {
namespace SK_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

template <int L> struct VecOf {
    typedef float type __attribute__((vector_size(4 * L)));
};
template <int L> using Vec = typename VecOf<L>::type;

template <int L> SK_INLINE Vec<L> load(const float *p) {
    Vec<L> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <int L> SK_INLINE void store(float *p, Vec<L> v) {
    __builtin_memcpy(p, &v, sizeof v);
}
// Not `Vec<L>{} + s`: adding +0.0 changes -0.0, so compilers keep that addition; subtracting +0.0 folds away.
template <int L> SK_INLINE Vec<L> broadcast(float s) {
    return s - Vec<L>{};
}

// The first n lanes (0 <= n <= L); the others are zero, and their memory is not touched.
template <int L> SK_INLINE Vec<L> load_partial(const float *p, int64_t n) {
#if defined(__AVX512VL__)
    if constexpr (L == 16) return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
    if constexpr (L == 8) return _mm256_maskz_loadu_ps((__mmask8)((1u << n) - 1), p);
    if constexpr (L == 4) return _mm_maskz_loadu_ps((__mmask8)((1u << n) - 1), p);
#endif
    Vec<L> v = {};
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
}
template <int L> SK_INLINE void store_partial(float *p, Vec<L> v, int64_t n) {
#if defined(__AVX512VL__)
    if constexpr (L == 16) return _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
    if constexpr (L == 8) return _mm256_mask_storeu_ps(p, (__mmask8)((1u << n) - 1), v);
    if constexpr (L == 4) return _mm_mask_storeu_ps(p, (__mmask8)((1u << n) - 1), v);
#endif
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// p[0..W) over and over: lane i is p[i % W].
template <int L, int W> SK_INLINE Vec<L> repeat(const float *p) {
#if defined(__AVX512F__)
    if constexpr (L == 16 && W == 8) return _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(load<8>(p))));
    if constexpr (L == 16 && W == 4) return _mm512_broadcast_f32x4(load<4>(p));
    if constexpr (L == 16 && W == 2) {
        double pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return _mm512_castpd_ps(_mm512_set1_pd(pair));
    }
#endif
#if defined(__AVX2__)
    if constexpr (L == 8 && W == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(p));
    if constexpr (L == 8 && W == 2) {
        double pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return _mm256_castpd_ps(_mm256_set1_pd(pair));
    }
#endif
    if constexpr (W == 1) return broadcast<L>(*p);
    Vec<L> v = {};
    SK_UNROLL
    for (int i = 0; i < L; ++i) v[i] = p[i % W];
    return v;
}

// Each of the lanes first, first + 1, ... W times: lane i is v[first + i / W].
template <int L, int W> SK_INLINE Vec<L> spread(Vec<L> v, int first) {
    if constexpr (W == 1) return v;
#if defined(__AVX512F__)
    if constexpr (L == 16) {
        constexpr int s = W == 8 ? 3 : W == 4 ? 2 : 1;
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        return _mm512_permutexvar_ps(_mm512_add_epi32(_mm512_srli_epi32(lane, s), _mm512_set1_epi32(first)), v);
    }
#endif
#if defined(__AVX2__)
    if constexpr (L == 8) {
        constexpr int s = W == 4 ? 2 : 1;
        const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
        return _mm256_permutevar8x32_ps(v, _mm256_add_epi32(_mm256_srli_epi32(lane, s), _mm256_set1_epi32(first)));
    }
#endif
    Vec<L> r = {};
    SK_UNROLL
    for (int i = 0; i < L; ++i) r[i] = v[first + i / W];
    return r;
}

// transpose: r[i][j] <-> r[j][i]

#if defined(__AVX512F__)
SK_INLINE void transpose(Vec<16> (&r)[16]) {
    __m512 t[16];
    SK_UNROLL
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    SK_UNROLL
    for (int i = 0; i < 4; ++i) {
        SK_UNROLL
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + 2 + j]);
            r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    SK_UNROLL
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    SK_UNROLL
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#endif

#if defined(__AVX2__)
SK_INLINE void transpose(Vec<8> (&r)[8]) {
    __m256 t[8], u[8];
    SK_UNROLL
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    SK_UNROLL
    for (int i = 0; i < 2; ++i) {
        SK_UNROLL
        for (int j = 0; j < 2; ++j) {
            u[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0x44);
            u[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0xee);
        }
    }
    SK_UNROLL
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}
#endif

#if defined(__x86_64__)
SK_INLINE void transpose(Vec<4> (&r)[4]) {
    _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
}
#else
SK_INLINE void transpose(Vec<4> (&r)[4]) {
    const Vec<4> a = r[0], b = r[1], c = r[2], d = r[3];
    SK_UNROLL
    for (int i = 0; i < 4; ++i) r[i] = Vec<4>{a[i], b[i], c[i], d[i]};
}
#endif

// out[i] = sum of the lanes of r[i]; one tree of L - 1 additions instead of L horizontal sums.
template <int L> SK_INLINE Vec<L> sum_lanes(Vec<L> (&r)[L]) {
    transpose(r);
    SK_UNROLL
    for (int step = L / 2; step > 0; step /= 2) {
        SK_UNROLL
        for (int i = 0; i < step; ++i) r[i] += r[i + step];
    }
    return r[0];
}

template <int L> SK_INLINE float sum(Vec<L> v) {
    float t[L];
    store<L>(t, v);
    SK_UNROLL
    for (int step = L / 2; step > 0; step /= 2) {
        SK_UNROLL
        for (int i = 0; i < step; ++i) t[i] += t[i + step];
    }
    return t[0];
}

// dst[c * ld_dst + r] = src[r * ld_src + c] for rows x cols of src. Rows up to `padded`, a multiple of LANES and at
// least rows, are written as zeros.
SK_INLINE void transpose_in(const float *src, int64_t ld_src, int64_t rows, int64_t cols, int64_t padded, float *dst,
                            int64_t ld_dst) {
    for (int64_t r = 0; r < padded; r += LANES) {
        const int64_t height = rows - r;
        const float *s = src + r * ld_src;
        float *d = dst + r;
        int64_t c = 0;
        if (height >= LANES) {
            for (; c + LANES <= cols; c += LANES) {
                Vec<LANES> t[LANES];
                SK_UNROLL
                for (int i = 0; i < LANES; ++i) t[i] = load<LANES>(s + i * ld_src + c);
                transpose(t);
                SK_UNROLL
                for (int i = 0; i < LANES; ++i) store<LANES>(d + (c + i) * ld_dst, t[i]);
            }
        }
        for (; c < cols; c += LANES) {
            const int64_t width = cols - c < LANES ? cols - c : LANES;
            Vec<LANES> t[LANES];
            for (int i = 0; i < LANES; ++i)
                t[i] = i < height ? load_partial<LANES>(s + i * ld_src + c, width) : Vec<LANES>{};
            transpose(t);
            for (int64_t i = 0; i < width; ++i) store<LANES>(d + (c + i) * ld_dst, t[i]);
        }
    }
}

// Outputs of this size and more bypass the caches. Measured at 2048 x 1024: 5 to 8 % of a linear call.
constexpr int64_t STREAM_FLOATS = int64_t{1} << 20;

// Stores past the caches, for results larger than they are: saves reading each line before it is overwritten.
// Needs 64-byte alignment; ends with stream_fence().
SK_INLINE bool can_stream(const float *p, int64_t ld) {
    return LANES == 16 && reinterpret_cast<uintptr_t>(p) % 64 == 0 && ld % 16 == 0;
}
SK_INLINE void stream(float *p, Vec<LANES> v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, v);
#else
    store<LANES>(p, v);
#endif
}
SK_INLINE void stream_fence() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// dst[r * ld_dst + c] = src[c * ld_src + r] for rows x cols of dst; src is readable up to the next multiple of LANES
// in r. STREAM: whole vectors are stored by stream(); dst and ld_dst must allow it.
template <bool STREAM = false>
SK_INLINE void transpose_out(const float *src, int64_t ld_src, int64_t rows, int64_t cols, float *dst, int64_t ld_dst) {
    for (int64_t r = 0; r < rows; r += LANES) {
        const int64_t height = rows - r < LANES ? rows - r : LANES;
        const float *s = src + r;
        float *d = dst + r * ld_dst;
        int64_t c = 0;
        if (height == LANES) {
            for (; c + LANES <= cols; c += LANES) {
                Vec<LANES> t[LANES];
                SK_UNROLL
                for (int i = 0; i < LANES; ++i) t[i] = load<LANES>(s + (c + i) * ld_src);
                transpose(t);
                SK_UNROLL
                for (int i = 0; i < LANES; ++i)
                    STREAM ? stream(d + i * ld_dst + c, t[i]) : store<LANES>(d + i * ld_dst + c, t[i]);
            }
        }
        for (; c < cols; c += LANES) {
            const int64_t width = cols - c < LANES ? cols - c : LANES;
            Vec<LANES> t[LANES];
            for (int i = 0; i < LANES; ++i) t[i] = i < width ? load<LANES>(s + (c + i) * ld_src) : Vec<LANES>{};
            transpose(t);
            for (int64_t i = 0; i < height; ++i) store_partial<LANES>(d + i * ld_dst + c, t[i], width);
        }
    }
}

}  // namespace SK_ISA
}  // namespace sparsekern
