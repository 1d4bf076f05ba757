// SPDX-License-Identifier: Apache-2.0
// Guarded memory of any element size, and random numbers.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <random>

#include "numbers.h"

#if defined(__SANITIZE_ADDRESS__)
#define SK_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SK_ASAN 1
#endif
#endif

namespace sktest {

// Elements of 1, 2 or 4 bytes between guard zones. All start as one bit pattern, which is a NaN in each dtype, so that
// an element nobody wrote shows. Under AddressSanitizer the end is the allocation's end, so that the first stray access
// is reported where it happens. The start is aligned to 16 bytes, plus `skew` elements.
class Array {
public:
    Array(int64_t size, int element_bytes, int64_t skew = 0)
        : bytes_(element_bytes), size_(size), front_(kGuard + skew), total_(front_ + size + kGuard),
          memory_(
              static_cast<unsigned char *>(std::malloc(static_cast<size_t>(std::max<int64_t>(total_ * bytes_, 1))))) {
        for (int64_t i = -front_; i < total_ - front_; ++i) set(i, untouched());
    }
    Array(Array &&other) noexcept
        : bytes_(other.bytes_), size_(other.size_), front_(other.front_), total_(other.total_), memory_(other.memory_) {
        other.memory_ = nullptr;
    }
    Array &operator=(const Array &) = delete;
    ~Array() { std::free(memory_); }

    void *data() { return at(0); }
    const void *data() const { return at(0); }
    template <class T> T *as() { return static_cast<T *>(data()); }
    template <class T> const T *as() const { return static_cast<const T *>(data()); }
    int64_t size() const { return size_; }
    uint32_t untouched() const { return bytes_ == 1 ? 0xa5 : bytes_ == 2 ? 0x7fd5 : 0x7fd5a5a5; }

    uint32_t get(int64_t i) const {
        uint32_t bits = 0;
        std::memcpy(&bits, at(i), static_cast<size_t>(bytes_));
        return bits;
    }
    void set(int64_t i, uint32_t bits) { std::memcpy(at(i), &bits, static_cast<size_t>(bytes_)); }

    bool guards_intact() const {
        for (int64_t i = -front_; i < total_ - front_; ++i) {
            if ((i < 0 || i >= size_) && get(i) != untouched()) return false;
        }
        return true;
    }
    // Index of the first element whose bits differ, -1 where none does.
    int64_t first_difference(const Array &other) const {
        for (int64_t i = 0; i < size_; ++i) {
            if (get(i) != other.get(i)) return i;
        }
        return -1;
    }

private:
#ifdef SK_ASAN
    static constexpr int64_t kGuard = 0;
#else
    static constexpr int64_t kGuard = 64;
#endif
    unsigned char *at(int64_t i) const { return memory_ + (front_ + i) * bytes_; }

    int bytes_;
    int64_t size_, front_, total_;
    unsigned char *memory_;
};

// Numbers that sum exactly in fp32 in any order, so that results must equal the reference, or numbers with all the
// digits that the dtype holds.
enum class Data { exact, full };

class Random {
public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    bool flip(double probability) { return std::uniform_real_distribution<double>(0, 1)(engine_) < probability; }
    int64_t below(int64_t count) { return std::uniform_int_distribution<int64_t>(0, count - 1)(engine_); }
    // A stored element within (-1, 1). Exact ones are odd multiples of 1/512 in tf32, so that both halves of the number
    // matter, else multiples of 1/16; other than 0.
    uint32_t element(Dtype dtype, Data data) {
        const double sign = flip(0.5) ? 1 : -1;
        if (data == Data::full) return encode(dtype, std::uniform_real_distribution<double>(-1, 1)(engine_));
        if (dtype == Dtype::tf32) return encode(dtype, sign * static_cast<double>(2 * below(256) + 1) / 512);
        return encode(dtype, sign * static_cast<double>(below(15) + 1) / 16);
    }

private:
    std::mt19937_64 engine_;
};

}  // namespace sktest
