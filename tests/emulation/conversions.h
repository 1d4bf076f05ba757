// SPDX-License-Identifier: Apache-2.0
// Conversions between number formats, bit by bit, as PTX's cvt does them: NaNs become the canonical NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace sktest {
namespace emulation {

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline bool is_nan(uint32_t bits) {
    return (bits & 0x7fffffffu) > 0x7f800000u;
}

inline uint16_t bf16_nearest_even(float value) {
    const uint32_t bits = bits_of(value);
    if (is_nan(bits)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline uint16_t fp16_nearest_even(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (is_nan(bits)) return 0x7fff;
    const int exponent = static_cast<int>(magnitude >> 23);
    if (exponent >= 127 + 16) return static_cast<uint16_t>(sign | 0x7c00u);
    // Bits below the last that fp16 keeps: 13, and one more for every binade below the normal numbers.
    const int lost = exponent >= 127 - 14 ? 13 : 13 + (127 - 14 - exponent);
    if (lost > 24) return static_cast<uint16_t>(sign);
    uint32_t kept, rest;
    if (lost == 13) {
        kept = (magnitude >> 13) - ((127 - 15) << 10);
        rest = magnitude & 0x1fffu;
    } else {
        const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
        kept = mantissa >> lost;
        rest = mantissa & ((1u << lost) - 1);
    }
    const uint32_t half = 1u << (lost - 1);
    // A carry out of the mantissa is the next exponent, up to infinity.
    if (rest > half || (rest == half && (kept & 1) != 0)) ++kept;
    return static_cast<uint16_t>(sign | kept);
}

inline float fp16_widened(uint16_t element) {
    const uint32_t sign = static_cast<uint32_t>(element & 0x8000u) << 16, exponent = element >> 10 & 31u,
                   mantissa = element & 0x3ffu;
    if (exponent == 31) return float_of(mantissa != 0 ? 0x7fffffffu : sign | 0x7f800000u);
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * (1.0f / 16777216.0f);
        return sign != 0 ? -magnitude : magnitude;
    }
    return float_of(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

// To tf32: 8 bits of exponent and 10 of mantissa, in the upper bits of an fp32 number.
inline uint32_t tf32_nearest_away(uint32_t bits) {
    if (is_nan(bits)) return 0x7fffffffu;
    return (bits + 0x1000u) & 0xffffe000u;
}
inline uint32_t tf32_truncated(uint32_t bits) {
    return bits & 0xffffe000u;
}

}  // namespace emulation
}  // namespace sktest
