// SPDX-License-Identifier: Apache-2.0
// What the kernel tests share: guarded buffers, random block layouts in the packed format, comparison, the tally.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/dispatch.h"

#if defined(__SANITIZE_ADDRESS__)
#define SK_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SK_ASAN 1
#endif
#endif

namespace sktest {

using namespace sparsekern;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A float array between guard zones of NaN. Under AddressSanitizer its end is the allocation's end, so that the first
// stray access is reported where it happens. `skew` floats in front take away the alignment a view into a tensor lacks.
class Buffer {
public:
    explicit Buffer(int64_t size, float fill = kNaN, int64_t skew = 0) : size_(size), front_(kGuard + skew) {
        total_ = front_ + size + kBack;
        data_ = static_cast<float *>(std::malloc(sizeof(float) * static_cast<size_t>(std::max<int64_t>(total_, 1))));
        std::fill(data_, data_ + total_, kNaN);
        std::fill(begin(), end(), fill);
    }
    Buffer(const Buffer &other) : Buffer(other.size_, 0, other.front_ - kGuard) {
        std::copy(other.begin(), other.end(), begin());
    }
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { std::free(data_); }

    float *begin() { return data_ + front_; }
    float *end() { return begin() + size_; }
    const float *begin() const { return data_ + front_; }
    const float *end() const { return begin() + size_; }
    float &operator[](int64_t i) { return begin()[i]; }
    float operator[](int64_t i) const { return begin()[i]; }
    int64_t size() const { return size_; }

    bool guards_intact() const {
        for (int64_t i = 0; i < total_; ++i) {
            const bool inside = i >= front_ && i < front_ + size_;
            if (!inside && !std::isnan(data_[i])) return false;
        }
        return true;
    }
    bool same_bits(const Buffer &other) const {
        return size_ == other.size_ &&
               std::memcmp(begin(), other.begin(), sizeof(float) * static_cast<size_t>(size_)) == 0;
    }

private:
#ifdef SK_ASAN
    static constexpr int64_t kGuard = 0, kBack = 0;
#else
    static constexpr int64_t kGuard = 64, kBack = 64;
#endif
    int64_t size_, front_, total_;
    float *data_;
};

class Random {
public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    float value() { return std::uniform_real_distribution<float>(-1, 1)(engine_); }
    bool flip(double probability) { return std::uniform_real_distribution<double>(0, 1)(engine_) < probability; }
    void fill(Buffer &buffer) {
        for (float &v : buffer) v = value();
    }

private:
    std::mt19937_64 engine_;
};

// The packed int32 index of a block grid [G, Ob, T, Ib] (format: sparsekern/layout.py, IndexView).
struct Blocks {
    int64_t groups, rows, taps, cols, bo, bi, capacity, nnz;
    std::vector<int32_t> index;
    std::vector<int64_t> slot_of_block;  // [G * Ob * T * Ib], -1 where absent

    // `empty` leaves every third block row and the last block column without blocks.
    Blocks(int64_t groups, int64_t rows, int64_t taps, int64_t cols, int64_t bo, int64_t bi, double density, bool empty,
           int64_t spare, Random &random)
        : groups(groups), rows(rows), taps(taps), cols(cols), bo(bo), bi(bi), nnz(0),
          slot_of_block(static_cast<size_t>(groups * rows * taps * cols), -1) {
        for (int64_t k = 0; k < int64_t(slot_of_block.size()); ++k) {
            const int64_t row = k / (taps * cols), col = k % cols;
            const bool barred = empty && (row % 3 == 1 || col == cols - 1);
            if (random.flip(density) && !barred) slot_of_block[k] = nnz++;
        }
        capacity = nnz + spare;
        pack();
    }

    int64_t slot(int64_t group, int64_t row, int64_t tap, int64_t col) const {
        return slot_of_block[((group * rows + row) * taps + tap) * cols + col];
    }
    Layout layout() const { return {index.data(), groups, rows, taps, cols, capacity, bo, bi}; }

private:
    void pack() {
        const int64_t block_rows = groups * rows, block_cols = groups * cols;
        index.assign(static_cast<size_t>(2 * block_rows + 2 * block_cols + 2 + 4 * capacity), 0);
        int32_t *row_ptr = index.data(), *col = row_ptr + block_rows + 1, *row = col + capacity;
        int32_t *t_ptr = row + capacity, *t_row = t_ptr + block_cols + 1, *t_perm = t_row + capacity;
        int32_t *row_order = t_perm + capacity, *t_order = row_order + block_rows;
        int32_t at = 0;
        for (int64_t i = 0; i < block_rows; ++i) {
            for (int64_t k = 0; k < taps * cols; ++k) {
                if (slot_of_block[i * taps * cols + k] < 0) continue;
                col[at] = int32_t(k);
                row[at++] = int32_t(i);
            }
            row_ptr[i + 1] = at;
        }
        at = 0;
        for (int64_t j = 0; j < block_cols; ++j) {
            for (int64_t k = 0; k < taps * rows; ++k) {
                const int64_t found = slot(j / cols, k % rows, k / rows, j % cols);
                if (found < 0) continue;
                t_row[at] = int32_t(k);
                t_perm[at++] = int32_t(found);
            }
            t_ptr[j + 1] = at;
        }
        order(row_ptr, row_order, block_rows);
        order(t_ptr, t_order, block_cols);
    }
    static void order(const int32_t *ptr, int32_t *out, int64_t count) {
        std::iota(out, out + count, 0);
        std::stable_sort(out, out + count,
                         [&](int32_t a, int32_t b) { return ptr[a + 1] - ptr[a] > ptr[b + 1] - ptr[b]; });
    }
};

// The tally of one run; `only` (from the command line) selects tests whose name contains it.
struct Tally {
    std::string only;
    int64_t passed = 0, failed = 0;
    // Sanitizers cost 5 to 10 times: a third of the cases then, another third for each instruction set.
    uint64_t phase = 0;
#ifdef SK_ASAN
    static constexpr uint64_t kStride = 3;
#else
    static constexpr uint64_t kStride = 1;
#endif

    bool samples(uint64_t seed) const { return (seed * 0x9E3779B97F4A7C15ull >> 40) % kStride == phase % kStride; }

    bool wants(const std::string &test) const { return test.find(only) != std::string::npos; }
    void report(bool good, const std::string &test, const std::string &what) {
        if (good) {
            ++passed;
        } else if (++failed <= 40) {
            std::printf("FAILED %s: %s\n", test.c_str(), what.c_str());
        }
    }
};

// Worst |got - want| over the bound that dense fp32 satisfies itself: 1e-5 of the same sum of absolute products.
struct Comparison {
    double worst = 0;
    std::string where;

    void add(float got, double want, double magnitude, const char *name, int64_t i) {
        const double error = std::abs(double(got) - want), bound = 1e-5 * magnitude + 1e-30;
        const double ratio = std::isnan(got) ? std::numeric_limits<double>::infinity() : error / bound;
        if (!(ratio <= 1) && ratio > worst) {
            worst = ratio;
            where = std::string(name) + "[" + std::to_string(i) + "]: expected " + std::to_string(want) + ", got " +
                    std::to_string(got);
        }
    }
};

}  // namespace sktest
