// SPDX-License-Identifier: Apache-2.0
// What the tests of all kernels share: a case, its data, comparison with the reference, the tally.
#pragma once

#include <cstdio>
#include <string>

#include "reference.h"

namespace sktest {

using sparsekern::cuda::Step;

// A layer at one input size, which blocks it stores and how its data lies. Made by linear() and conv(), then refined:
//   conv(2, 48, 7, 7, 32, 3, 3).block(16, 32).stride(2, 1).pad(1, 0, 1, 2).unaligned()
struct Case {
    int64_t n;
    int c, h, w, o, r, s;  // c and o of all groups
    int groups_ = 1, bo = 16, bi = 16, stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
    int top = 0, bottom = 0, left = 0, right = 0;
    Stored stored = Stored::some;
    double density_ = 0.5;
    bool empty = true, bias = true, mask = false, poison = false;
    int64_t spare_ = 1, gap = 0, skew = 0;
    Data data = Data::exact;
    uint64_t seed_ = 1;

    Case groups(int count) const {
        return with([&](Case &a) { a.groups_ = count; });
    }
    Case block(int out, int in) const {
        return with([&](Case &a) { a.bo = out, a.bi = in; });
    }
    Case stride(int down, int across) const {
        return with([&](Case &a) { a.stride_h = down, a.stride_w = across; });
    }
    Case dilation(int down, int across) const {
        return with([&](Case &a) { a.dilation_h = down, a.dilation_w = across; });
    }
    Case pad(int all) const { return pad(all, all, all, all); }
    Case pad(int top, int bottom, int left, int right) const {
        return with([&](Case &a) { a.top = top, a.bottom = bottom, a.left = left, a.right = right; });
    }
    Case all() const {
        return with([](Case &a) { a.stored = Stored::all; });
    }
    Case one() const {
        return with([](Case &a) { a.stored = Stored::one; });
    }
    Case none() const {
        return with([](Case &a) { a.stored = Stored::none; });
    }
    Case density(double share) const {
        return with([&](Case &a) { a.density_ = share; });
    }
    Case full_rows() const {
        return with([](Case &a) { a.empty = false; });
    }  // no row or column empty on purpose
    Case spare(int64_t slots) const {
        return with([&](Case &a) { a.spare_ = slots; });
    }
    Case no_bias() const {
        return with([](Case &a) { a.bias = false; });
    }
    Case masked() const {
        return with([](Case &a) { a.mask = true; });
    }
    // Views that 16-byte copies can read, however ragged the channels, and views that they cannot.
    Case gapped() const {
        return with([](Case &a) { a.gap = 8; });
    }
    Case unaligned() const {
        return with([](Case &a) { a.gap = 3, a.skew = 1; });
    }
    // All digits of the dtype instead of numbers that sum exactly.
    Case digits() const {
        return with([](Case &a) { a.data = Data::full; });
    }
    // NaN in the first block of features of one pixel of x and dy; ends in every result that reads them, in no other.
    // For forward and dgrad, and wgrad without filter: with one, wgrad multiplies NaN with the zeros around images.
    Case poisoned() const {
        return with([](Case &a) { a.poison = true; });
    }
    Case seed(uint64_t number) const {
        return with([&](Case &a) { a.seed_ = number; });
    }

    // Capacity is set once the blocks are drawn.
    Problem problem(Dtype dtype) const {
        const int p = (h + top + bottom - dilation_h * (r - 1) - 1) / stride_h + 1;
        const int q = (w + left + right - dilation_w * (s - 1) - 1) / stride_w + 1;
        return {dtype, groups_, bo, bi, 0,        n,        c,   h,    w,          o,
                p,     q,       r,  s,  stride_h, stride_w, top, left, dilation_h, dilation_w};
    }
    std::string text() const {
        static const char *const names[] = {"some", "none", "one", "all"};
        char line[400];
        std::snprintf(line, sizeof line,
                      "x=[%ld,%d,%d,%d] O=%d kernel=%dx%d groups=%d block=%dx%d stride=%d,%d dilation=%d,%d "
                      "pad=%d,%d,%d,%d stored=%s:%.2f empty=%d spare=%ld gap=%ld skew=%ld bias=%d mask=%d poison=%d "
                      "data=%s seed=%ld",
                      long(n), c, h, w, o, r, s, groups_, bo, bi, stride_h, stride_w, dilation_h, dilation_w, top,
                      bottom, left, right, names[int(stored)], density_, empty, long(spare_), long(gap), long(skew),
                      bias, mask, poison, data == Data::exact ? "exact" : "digits", long(seed_));
        return line;
    }

private:
    template <class Change> Case with(Change change) const {
        Case changed = *this;
        change(changed);
        return changed;
    }
};

inline Case linear(int64_t m, int in, int out, int bo = 16, int bi = 16) {
    Case a{};
    a.n = m, a.c = in, a.o = out, a.h = a.w = a.r = a.s = 1;
    return a.block(bo, bi);
}
inline Case conv(int64_t n, int c, int h, int w, int o, int r, int s) {
    Case a{};
    a.n = n, a.c = c, a.h = h, a.w = w, a.o = o, a.r = r, a.s = s;
    return a;
}

// Everything a kernel is given for a case in one dtype, and what it must answer. Slots that are spare and gaps between
// pixels hold NaN, the padding of edge blocks zeros.
class Fixture {
public:
    Fixture(const Case &description, Dtype dtype)
        : about(description), problem(about.problem(dtype)), random_(about.seed_ * 0x9e3779b97f4a7c15ull + 1),
          blocks(problem, about.stored, about.density_, about.empty, about.spare_, random_),
          x_ld(row_length(problem.c)), dy_ld(row_length(problem.o)), index(blocks.index()),
          x(extent(pixels_x(), problem.c, x_ld), bytes(), about.skew),
          dy(extent(pixels_y(), problem.o, dy_ld), bytes(), about.skew),
          values(blocks.capacity * problem.bo * problem.bi, bytes()), bias(problem.o, bytes(), about.skew),
          mask(blocks.capacity * mask_stride(), 1) {
        problem.capacity = blocks.capacity;
        fill(x, operands.x, pixels_x(), problem.c, x_ld, problem.in_per_group(), problem.bi);
        fill(dy, operands.dy, pixels_y(), problem.o, dy_ld, problem.out_per_group(), problem.bo);
        for (int64_t i = 0; i < problem.o; ++i) {
            bias.set(i, random_.element(dtype, about.data));
            operands.bias.push_back(decode(dtype, bias.get(i)));
        }
        operands.weight.assign(static_cast<size_t>(int64_t{problem.o} * problem.in_per_group() * problem.taps()), 0.0);
        operands.exists.assign(operands.weight.size(), 0);
        for (int64_t i = 0; i < mask.size(); ++i) mask.set(i, 0);
        for_each_element(problem, blocks, [&](int64_t slot, int64_t i, int64_t at) {
            const int64_t element = slot * problem.bo * problem.bi + i;
            values.set(element, at < 0 ? 0 : random_.element(dtype, about.data));
            // Padding is kept or masked at random: neither may show.
            const int64_t byte = slot * mask_stride() + i / 8;
            if (random_.flip(0.6)) mask.set(byte, mask.get(byte) | 1u << (i % 8));
            if (at < 0) return;
            operands.weight[static_cast<size_t>(at)] = decode(dtype, values.get(element));
            operands.exists[static_cast<size_t>(at)] = 1;
        });
    }

    const Case about;
    Problem problem;

private:
    Random random_;

public:
    const Blocks blocks;
    const int64_t x_ld, dy_ld;
    Array index, x, dy, values, bias, mask;
    Operands operands;

    int bytes() const { return sparsekern::cuda::element_bytes(problem.dtype); }
    int64_t mask_stride() const { return (int64_t{problem.bo} * problem.bi + 7) / 8; }
    int64_t pixels_x() const { return problem.n * problem.h * problem.w; }
    int64_t pixels_y() const { return problem.n * problem.p * problem.q; }
    std::string text() const { return std::string(name_of(problem.dtype)) + " " + about.text(); }

    // Sums [capacity, bo, bi] that dvalues must hold: zero in spare slots, padding and, if `masked`, where the mask is
    // 0.
    Sums dvalues(bool masked) const {
        const Sums dw = reference_wgrad(problem, operands);
        Sums want(values.size());
        for_each_element(problem, blocks, [&](int64_t slot, int64_t i, int64_t at) {
            const bool kept = !masked || (mask.get(slot * mask_stride() + i / 8) >> (i % 8) & 1);
            if (at < 0 || !kept) return;
            const auto to = static_cast<size_t>(slot * problem.bo * problem.bi + i), from = static_cast<size_t>(at);
            want.value[to] = dw.value[from], want.magnitude[to] = dw.magnitude[from];
        });
        return want;
    }

private:
    int64_t row_length(int64_t channels) const {
        return about.gap == 8 ? (channels + 7) / 8 * 8 + about.gap : channels + about.gap;
    }
    // The last pixel ends with its last channel.
    static int64_t extent(int64_t pixels, int64_t channels, int64_t ld) {
        return pixels ? (pixels - 1) * ld + channels : 0;
    }
    void fill(Array &array, std::vector<double> &dense, int64_t pixels, int channels, int64_t ld, int per_group,
              int edge) {
        for (int64_t i = 0; i < pixels; ++i) {
            for (int64_t k = 0; k < channels; ++k) {
                const bool nan = about.poison && i == pixels / 2 && k < std::min(per_group, edge);
                array.set(i * ld + k,
                          nan ? encode(problem.dtype, std::nan("")) : random_.element(problem.dtype, about.data));
                dense.push_back(decode(problem.dtype, array.get(i * ld + k)));
            }
        }
    }
};

// Empty where every result is right, else the worst one. Exact data: the reference rounded once. All digits: half a
// unit of the stored dtype, plus 16 roundings of fp32 of all that was added up. NaN where and only where NaN is due.
inline std::string compare(const Fixture &fixture, const char *name, const Array &got, const Sums &want) {
    const Dtype dtype = fixture.problem.dtype;
    const Format format = stored_format(dtype);
    double worst = 0;
    std::string where;
    for (int64_t i = 0; i < got.size(); ++i) {
        const double is = decode(dtype, got.get(i)), due = value_at(want.value, i);
        const double magnitude = value_at(want.magnitude, i);
        double ratio;
        if (std::isnan(due) || std::isnan(is)) {
            ratio = std::isnan(due) && std::isnan(is) && got.get(i) != got.untouched()
                        ? 0
                        : std::numeric_limits<double>::infinity();
        } else if (fixture.about.data == Data::exact || magnitude == 0) {
            ratio = is == round_even(format, due) ? 0 : 2 + std::abs(is - due);
        } else {
            const double unit = spacing(format, std::max(std::abs(is), std::abs(due)));
            ratio = std::abs(is - due) / (unit / 2 + std::ldexp(16, -24) * magnitude);
        }
        if (ratio > 1 && ratio > worst) {
            worst = ratio;
            char text[200];
            std::snprintf(text, sizeof text, "%s[%ld]: expected %.9g, got %.9g%s", name, long(i), due, is,
                          got.get(i) == got.untouched() ? " (never written)" : "");
            where = text;
        }
    }
    return where;
}

// The tally of one run of a test executable:
//   test_x [--all] [part of a name]
// --all: every schedule, and under sanitizers (5 to 10 times slower) every case.
class Tally {
public:
    Tally(int argc, char **argv) {
        for (int i = 1; i < argc; ++i) {
            const std::string argument = argv[i];
            if (argument == "--all") {
                everything_ = true;
            } else {
                only_ = argument;
            }
        }
    }
    bool everything() const { return everything_; }
    void quiet() { quiet_ = true; }
    void stop_at_first_failure() { hasty_ = true; }
    int64_t failed() const { return failed_; }
    // Whether the next test is to run. Under sanitizers a fixed quarter of them do.
    bool wants(const std::string &test) {
        if (test.find(only_) == std::string::npos) return false;
        ++seen_;
#ifdef SK_ASAN
        if (!everything_ && only_.empty() && (seen_ * 0x9e3779b97f4a7c15ull >> 40) % 4 != 0) return false;
#endif
        return true;
    }
    void report(bool good, const std::string &test, const std::string &what) {
        if (good) {
            ++passed_;
        } else if (++failed_ <= 40 && !quiet_) {
            std::printf("FAILED %s: %s\n", test.c_str(), what.c_str());
            std::fflush(stdout);
            if (hasty_) std::_Exit(1);
        }
    }
    // Prints the closing line; the exit status: 0 passed, 1 failed, 2 nothing ran.
    int finish() const {
        std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed_), static_cast<long long>(failed_));
        if (passed_ + failed_ == 0) std::printf("no test's name contains %s\n", only_.c_str());
        return failed_ ? 1 : passed_ ? 0 : 2;
    }

private:
    std::string only_;
    bool everything_ = false, quiet_ = false, hasty_ = false;
    int64_t passed_ = 0, failed_ = 0;
    uint64_t seen_ = 0;
};

}  // namespace sktest
