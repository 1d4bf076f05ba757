// SPDX-License-Identifier: Apache-2.0
// Storage formats of the kernels' dtypes, derived from their definition by arithmetic in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "problem.h"

namespace sktest {

using sparsekern::cuda::Dtype;

inline const char *name_of(Dtype dtype) {
    return dtype == Dtype::bfloat16 ? "bf16" : dtype == Dtype::float16 ? "fp16" : "tf32";
}

// Significant bits and the least exponent of a normal number, as stored.
struct Format {
    int precision, least;
};
inline Format stored_format(Dtype dtype) {
    return dtype == Dtype::bfloat16 ? Format{8, -126} : dtype == Dtype::float16 ? Format{11, -14} : Format{24, -126};
}

// Distance of neighbouring numbers of the format around `value`.
inline double spacing(const Format &format, double value) {
    int exponent = format.least + 1;
    if (value != 0) std::frexp(value, &exponent);
    return std::ldexp(1.0, std::max(exponent - 1, format.least) - format.precision + 1);
}
inline double round_even(const Format &format, double value) {
    if (!std::isfinite(value)) return value;
    const double unit = spacing(format, value);
    return std::nearbyint(value / unit) * unit;
}

// What mma multiplies: tf32 keeps 11 significant bits of fp32, ties away from zero; the others are taken as stored.
inline double operand(Dtype dtype, double stored) {
    if (dtype != Dtype::tf32 || !std::isfinite(stored)) return stored;
    const double unit = spacing({11, -126}, stored);
    return std::round(stored / unit) * unit;
}

inline double decode(Dtype dtype, uint32_t bits) {
    if (dtype == Dtype::float16) {
        const double sign = bits & 0x8000 ? -1 : 1, fraction = bits & 0x3ff;
        const int exponent = static_cast<int>(bits >> 10 & 31);
        if (exponent == 31) {
            return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                                 : sign * std::numeric_limits<double>::infinity();
        }
        return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
    }
    const uint32_t wide = dtype == Dtype::bfloat16 ? bits << 16 : bits;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return static_cast<double>(value);
}

// The stored number nearest to `value`, ties to even.
inline uint32_t encode(Dtype dtype, double value) {
    if (dtype == Dtype::float16) {
        const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
        if (std::isnan(value)) return 0x7e00;
        const double size = std::abs(round_even(stored_format(dtype), value));
        if (size > 65504) return sign | 0x7c00;
        if (size < std::ldexp(1.0, -14)) return sign | static_cast<uint32_t>(std::ldexp(size, 24));
        int exponent;
        const double fraction = std::frexp(size, &exponent);  // size = fraction * 2^exponent, fraction in [0.5, 1)
        return sign | static_cast<uint32_t>(exponent + 14) << 10 | (static_cast<uint32_t>(fraction * 2048) & 0x3ff);
    }
    const float rounded = static_cast<float>(round_even(stored_format(dtype), value));
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return dtype == Dtype::bfloat16 ? bits >> 16 : bits;
}

}  // namespace sktest
