// SPDX-License-Identifier: Apache-2.0
// The tests' own means: number formats, the packed index, comparison, and that a wrong kernel is caught.
//   test_support [--all] [part of a name]
//   test_support --index SEED     prints a block mask and its packed index, for comparison with sparsekern.layout
#include "runner.h"

namespace sktest {
namespace {

void test_numbers(Tally &tally) {
    if (!tally.wants("numbers")) return;
    const auto same = [&](double got, double want, const char *what) {
        tally.report(got == want, "numbers",
                     std::string(what) + ": expected " + std::to_string(want) + ", got " + std::to_string(got));
    };
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
        // Every number of the format comes back; a number half-way between two goes to the even one.
        for (uint32_t bits = 0; bits < 0x10000; ++bits) {
            const double value = decode(dtype, bits), next = decode(dtype, bits + 1);
            if (!std::isfinite(value) || (bits & 0x7fff) == 0x7fff) continue;
            if (encode(dtype, value) != bits) same(encode(dtype, value), bits, "encode(decode)");
            if (!std::isfinite(next)) continue;
            const uint32_t even = bits & 1 ? bits + 1 : bits;
            if (encode(dtype, (value + next) / 2) != even) same(encode(dtype, (value + next) / 2), even, "tie");
        }
    }
    same(decode(Dtype::bfloat16, 0x3f80), 1, "bf16 one");
    same(decode(Dtype::float16, 0x3c01), 1 + std::ldexp(1, -10), "fp16 one and a unit");
    same(decode(Dtype::float16, 1), std::ldexp(1, -24), "least fp16");
    same(encode(Dtype::float16, 65519), 0x7bff, "largest fp16");
    same(encode(Dtype::float16, 65520), 0x7c00, "fp16 overflow");
    same(operand(Dtype::tf32, 1 + std::ldexp(1, -11)), 1 + std::ldexp(1, -10), "tf32 tie away from zero");
    same(operand(Dtype::tf32, -1 - 3 * std::ldexp(1, -11)), -1 - 2 * std::ldexp(1, -10), "tf32 tie away from zero");
    same(operand(Dtype::tf32, 1 + std::ldexp(1, -12)), 1, "tf32 below a tie");
    for (const Dtype dtype : kDtypes) {
        Array array(1, sparsekern::cuda::element_bytes(dtype));
        tally.report(std::isnan(decode(dtype, array.get(0))), "numbers", "an untouched element is no NaN");
        Random random(1);
        for (int i = 0; i < 100; ++i) {
            const double value = decode(dtype, random.element(dtype, Data::exact));
            const double units = value * (dtype == Dtype::tf32 ? 512 : 16);
            tally.report(units == std::round(units) && value != 0 && std::abs(value) < 1, "numbers",
                         "exact data " + std::to_string(value));
        }
    }
}

// Forward, dgrad and wgrad in another order of loops than the reference's (by stored block, through the packed index),
// and with one fault on demand.
enum class Fault { none, bias, tap, transposed, mask, spare, rounding, nan, schedule, guard };

struct Simple {
    const Fixture &f;
    const Problem &a;
    Fault fault;

    double at(const void *data, int64_t i) const {
        uint32_t bits = 0;
        std::memcpy(&bits, static_cast<const char *>(data) + i * f.bytes(), static_cast<size_t>(f.bytes()));
        return decode(a.dtype, bits);
    }
    double product(double left, double right) const {
        if (fault == Fault::rounding) return left * right;
        return operand(a.dtype, left) * operand(a.dtype, right);
    }
    void put(void *data, int64_t i, double value) const {
        const uint32_t bits = encode(a.dtype, value);
        std::memcpy(static_cast<char *>(data) + i * f.bytes(), &bits, static_cast<size_t>(f.bytes()));
    }
    // visit(pixel of y, output channel, pixel of x, input channel, element of values) for each product.
    template <class Visit> void products(bool transposed, const int32_t *packed, Visit visit) const {
        const sparsekern::cuda::Index index(a, packed);
        const int rows = transposed ? a.cols() : a.rows();
        const int32_t *ptr = transposed ? index.t_ptr : index.row_ptr;
        for (int row = 0; row < a.groups * rows; ++row)
            for (int32_t k = ptr[row]; k < ptr[row + 1]; ++k) {
                const int code = transposed ? index.t_row[k] : index.col[k], group = row / rows;
                const int tap = code / (transposed ? a.rows() : a.cols()),
                          other = code % (transposed ? a.rows() : a.cols());
                const int block_row = transposed ? other : row % rows, block_col = transposed ? row % rows : other;
                const int64_t slot = transposed && fault != Fault::transposed ? index.t_perm[k] : k;
                for (int i = 0; i < a.bo * a.bi; ++i) {
                    const int o = block_row * a.bo + i / a.bi, c = block_col * a.bi + i % a.bi;
                    if (o >= a.out_per_group() || c >= a.in_per_group()) continue;
                    for (int64_t pixel = 0; pixel < f.pixels_y(); ++pixel) {
                        const int h = int(pixel / a.q % a.p) * a.stride_h - a.pad_top + tap / a.s * a.dilation_h;
                        const int w = int(pixel % a.q) * a.stride_w - a.pad_left + tap % a.s * a.dilation_w +
                                      (fault == Fault::tap && tap == a.taps() - 1);
                        if (h < 0 || h >= a.h || w < 0 || w >= a.w) continue;
                        visit(pixel, group * a.out_per_group() + o, (pixel / a.q / a.p * a.h + h) * a.w + w,
                              group * a.in_per_group() + c, slot * a.bo * a.bi + i);
                    }
                }
            }
    }
    void disturb(void *result) const {
        using emulation::Schedule;
        if (fault == Fault::schedule && emulation::options().schedule == Schedule::reverse) put(result, 0, 77);
        if (fault == Fault::guard) put(result, -1, 1);
    }
    void product(Step step, const void *source, int64_t ld, const void *values, const int32_t *packed, const void *bias,
                 void *result) const {
        const bool forward = step == Step::forward;
        const int channels = forward ? a.o : a.c;
        std::vector<double> sums(static_cast<size_t>((forward ? f.pixels_y() : f.pixels_x()) * channels), 0.0);
        for (size_t i = 0; bias && i < sums.size(); ++i)
            sums[i] = at(bias, int64_t(i) % a.o + (fault == Fault::bias && a.o > 1 && i == 0));
        products(!forward, packed, [&](int64_t y, int o, int64_t x, int c, int64_t element) {
            double &sum = sums[static_cast<size_t>(forward ? y * a.o + o : x * a.c + c)];
            sum += product(at(source, forward ? x * ld + c : y * ld + o), at(values, element));
        });
        for (size_t i = 0; i < sums.size(); ++i)
            if (!(fault == Fault::nan && i == sums.size() / 2)) put(result, int64_t(i), sums[i]);
        disturb(result);
    }
    void wgrad(const void *dy, int64_t dy_ld, const void *x, int64_t x_ld, const int32_t *packed, const uint8_t *mask,
               void *dvalues, void *dbias) const {
        std::vector<double> sums(static_cast<size_t>(a.capacity * a.bo * a.bi), 0.0);
        products(false, packed, [&](int64_t y, int o, int64_t in, int c, int64_t element) {
            sums[static_cast<size_t>(element)] += product(at(dy, y * dy_ld + o), at(x, in * x_ld + c));
        });
        const int64_t used = sparsekern::cuda::Index(a, packed).row_ptr[a.groups * a.rows()] * int64_t{a.bo} * a.bi;
        for (int64_t i = 0; i < int64_t(sums.size()); ++i) {
            if (i >= used && fault == Fault::spare) continue;
            const int64_t in_block = i % (a.bo * a.bi);
            const bool kept = !mask || (mask[i / (a.bo * a.bi) * f.mask_stride() + in_block / 8] >> (in_block % 8) & 1);
            put(dvalues, i, kept || fault == Fault::mask ? sums[static_cast<size_t>(i)] : 0);
        }
        for (int o = 0; dbias && o < a.o; ++o) {
            double sum = 0;
            for (int64_t i = 0; i < f.pixels_y(); ++i) sum += at(dy, i * dy_ld + o);
            put(dbias, o, sum);
        }
        disturb(dvalues);
    }
    void run(const std::string &test, Tally &tally) const {
        for (const Step step : {Step::forward, Step::dgrad})
            check_product(f, step, test, tally, [&](auto... given) { product(step, given...); });
        if (f.about.poison) return;
        check_wgrad(f, 0, test, tally,
                    [&](const void *dy, int64_t dy_ld, const void *x, int64_t x_ld, const int32_t *packed,
                        const uint8_t *mask, void *, void *dvalues,
                        void *dbias) { wgrad(dy, dy_ld, x, x_ld, packed, mask, dvalues, dbias); });
    }
};

void test_cases(Tally &tally) {
    uint64_t i = 0;
    for (const std::vector<Case> &cases : {first_cases(), linear_cases(), conv_cases()}) {
        for (const Case &a : cases) {
            const Dtype dtype = kDtypes[i++ % 3];
            if (!tally.wants(std::string("simple ") + name_of(dtype))) continue;
            const Fixture fixture(a, dtype);
            Simple{fixture, fixture.problem, Fault::none}.run("simple", tally);
        }
    }
}

// Each fault must be reported by at least one check.
void test_faults(Tally &tally) {
    const Case base = conv(2, 20, 5, 4, 24, 3, 3).pad(1).full_rows().masked();
    for (int fault = int(Fault::bias); fault <= int(Fault::guard); ++fault) {
        const std::string test = "fault " + std::to_string(fault);
        if (!tally.wants(test)) continue;
#ifdef SK_ASAN
        if (Fault(fault) == Fault::guard) continue;  // stops the process there
#endif
        const Fixture fixture(Fault(fault) == Fault::rounding ? base.digits() : base, Dtype::tf32);
        Tally inner(0, nullptr);
        inner.quiet();
        Simple{fixture, fixture.problem, Fault(fault)}.run(test, inner);
        tally.report(inner.failed() > 0, test, "was not noticed");
    }
    const Fixture fixture(base, Dtype::float16);
    Tally inner(0, nullptr);
    inner.quiet();
    check(fixture, "reported", inner, {}, [](std::vector<Array> &) { emulation::report("key", "a problem"); });
    tally.report(inner.failed() == 3, "reported", "a problem of the emulation was not noticed in each setting");
    emulation::reset();
}

int print_index(uint64_t seed) {
    static const int edges[] = {16, 32, 64, 128};
    Random random(seed);
    const int groups = 1 + int(random.below(3)), bo = edges[random.below(4)], bi = edges[random.below(4)];
    const int out = 1 + int(random.below(12 * bo)), in = 1 + int(random.below(12 * bi));
    Case a = conv(1, groups * in, 3, 3, groups * out, 1 + int(random.below(3)), 1 + int(random.below(3)))
                 .groups(groups)
                 .block(bo, bi)
                 .density(0.02 + 0.1 * double(random.below(9)))
                 .spare(random.below(4));
    if (random.flip(0.3)) a = a.full_rows();
    if (random.flip(0.1)) a = a.one();
    if (random.flip(0.1)) a = a.none();
    const Problem problem = a.problem(Dtype::tf32);
    const Blocks blocks(problem, a.stored, a.density_, a.empty, a.spare_, random);
    std::printf("%d %d %d %d %d %d %d %ld\n", problem.groups, problem.o, problem.in_per_group(), problem.r, problem.s,
                bo, bi, long(blocks.capacity));
    for (const int64_t slot : blocks.slots) std::printf("%d ", slot >= 0);
    std::printf("\n");
    const Array index = blocks.index();
    for (int64_t i = 0; i < index.size(); ++i) std::printf("%d ", index.as<int32_t>()[i]);
    std::printf("\n");
    return 0;
}

}  // namespace
}  // namespace sktest

int main(int argc, char **argv) {
    if (argc == 3 && std::string(argv[1]) == "--index") return sktest::print_index(std::strtoull(argv[2], nullptr, 10));
    sktest::Tally tally(argc, argv);
    sktest::test_numbers(tally);
    sktest::test_cases(tally);
    sktest::test_faults(tally);
    return tally.finish();
}
