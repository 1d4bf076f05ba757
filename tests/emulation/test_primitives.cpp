// SPDX-License-Identifier: Apache-2.0
// The emulation itself: fragments against the PTX manual's tables, conversions against arithmetic, asynchronous copies,
// and that every fault a kernel can make is seen under every schedule, and its corrected twin is not.
#include <fstream>
#include <sstream>

#include "fragment_tables.h"
#include "primitives_dump.h"
#include "support.h"

namespace sktest {
namespace {

using namespace sparsekern::cuda;
using emulation::options;
using emulation::problems;
using emulation::statistics;

bool any_contains(const std::string &part) {
    for (const std::string &problem : problems()) {
        if (problem.find(part) != std::string::npos) return true;
    }
    return false;
}
std::string all_problems() {
    std::string text;
    for (const std::string &problem : problems()) text += "\n    " + problem;
    return text;
}

// Runs visit(name) under all nine settings, problems forgotten before each.
template <class Visit> void each_setting(Visit visit) {
    static const char *const schedules[] = {"forward", "reverse", "random"}, *const when[] = {"early", "late",
                                                                                              "random"};
    for (int schedule = 0; schedule < 3; ++schedule) {
        for (int copies = 0; copies < 3; ++copies) {
            options() = emulation::Options();
            options().schedule = static_cast<emulation::Schedule>(schedule);
            options().copies = static_cast<emulation::Copies>(copies);
            options().seed = static_cast<uint64_t>(schedule * 3 + copies + 1);
            emulation::reset();
            visit(std::string(schedules[schedule]) + " schedule, " + when[copies] + " copies");
        }
    }
    options() = emulation::Options();
    emulation::reset();
}

template <class Args>
void start(void (*kernel)(Args), int threads, int64_t shared_bytes, const Args &args, const Grid &grid = {1, 1, 1}) {
    launch("test", kernel, grid, threads, shared_bytes, Stream{0, nullptr}, args);
}

// -- fragments

void test_tables(Tally &tally) {
    const auto check = [&](const char *name, const FragmentTable &table, const std::vector<Figure> &figure) {
        // Every element is held exactly once.
        std::vector<int> times(static_cast<size_t>(table.rows * table.columns), 0);
        for (const Held &h : table.held) ++times[static_cast<size_t>(h.row * table.columns + h.column)];
        bool once = true;
        for (const int n : times) once = once && n == 1;
        tally.report(once, "tables", std::string(name) + ": an element is held twice or never");
        for (const Figure &f : figure) {
            bool found = false;
            for (const Held &h : table.held) {
                found = found || (h.lane == f.lane && h.element == f.reg * table.halves + f.half && h.row == f.row &&
                                  h.column == f.column);
            }
            tally.report(found, "tables",
                         std::string(name) + ": differs from the figure at lane " + std::to_string(f.lane) +
                             ", register " + std::to_string(f.reg));
        }
    };
    check("a of m16n8k16", m16n8k16_a(), figure_m16n8k16_a());
    check("b of m16n8k16", m16n8k16_b(), figure_m16n8k16_b());
    check("c", m16n8_c(), figure_m16n8_c());
    check("a of m16n8k8", m16n8k8_a(), figure_m16n8k8_a());
    check("b of m16n8k8", m16n8k8_b(), figure_m16n8k8_b());
    check("ldmatrix", ldmatrix_x4_table(), {});
    check("ldmatrix trans", ldmatrix_x4_trans_table(), {});
}

struct MatrixArgs {
    int pitch;
    const int *order;  // lane l names row order[l]
    uint32_t (*to)[4];
};
template <bool transposed> SK_KERNEL(32, 1) matrix_kernel(SK_ARGS(MatrixArgs) args) {
    const int lane = lane_id();
    for (int i = 0; i < 8; ++i) {
        store_shared(shared_memory() + static_cast<Shared>(lane * args.pitch + i * 2),
                     static_cast<uint16_t>(lane * 8 + i));
    }
    warp_barrier();
    const Shared row = shared_memory() + static_cast<Shared>(args.order[lane] * args.pitch);
    uint32_t to[4], by_condition[4] = {1, 2, 3, 4};
    if (transposed) {
        ldmatrix_x4_trans(to, row);
        ldmatrix_x4_trans_if(false, by_condition, row);
        for (uint32_t i = 0; i < 4; ++i) {
            if (by_condition[i] != i + 1) emulation::report("by condition", "registers changed");
        }
        ldmatrix_x4_trans_if(true, by_condition, row);
        for (int i = 0; i < 4; ++i) {
            if (by_condition[i] != to[i]) emulation::report("by condition", "other registers");
        }
    } else {
        ldmatrix_x4(to, row);
    }
    for (int i = 0; i < 4; ++i) args.to[lane][i] = to[i];
}

void test_ldmatrix(Tally &tally) {
    int order[32];
    for (int l = 0; l < 32; ++l) order[l] = (l * 5 + 3) % 32;
    for (const bool transposed : {false, true}) {
        const FragmentTable table = transposed ? ldmatrix_x4_trans_table() : ldmatrix_x4_table();
        each_setting([&](const std::string &setting) {
            uint32_t to[32][4];
            start(transposed ? matrix_kernel<true> : matrix_kernel<false>, 32, 32 * 80, MatrixArgs{80, order, to});
            int wrong = 0;
            for (const Held &h : table.held) {
                const uint32_t got = to[h.lane][h.element / 2] >> (h.element % 2 * 16) & 0xffffu;
                wrong += got != static_cast<uint32_t>(order[h.row] * 8 + h.column);
            }
            tally.report(wrong == 0 && problems().empty(), "ldmatrix",
                         setting + (transposed ? ", trans: " : ": ") + std::to_string(wrong) +
                             " of 256 elements wrong" + all_problems());
        });
    }
}

struct MultiplyArgs {
    const uint32_t (*a)[4], (*b)[2];
    float (*c)[4];
};
template <class E> SK_KERNEL(32, 1) multiply_kernel(SK_ARGS(MultiplyArgs) args) {
    const int lane = lane_id();
    mma<E>(args.c[lane], args.a[lane], args.b[lane][0], args.b[lane][1]);
}

using Matrix = std::vector<std::vector<double>>;

// c + a b by mma, laid out and collected by the manual's tables.
template <class E> Matrix multiplied(Dtype dtype, const Matrix &a, const Matrix &b, const Matrix &c) {
    const bool pairs = E::bytes == 2;
    uint32_t in_a[32][4] = {}, in_b[32][2] = {};
    float in_c[32][4];
    const auto put = [&](auto &to, const FragmentTable &table, const Matrix &from) {
        for (const Held &h : table.held) {
            to[h.lane][h.element / table.halves] |=
                encode(dtype, from[static_cast<size_t>(h.row)][static_cast<size_t>(h.column)])
                << (h.element % table.halves * 16);
        }
    };
    put(in_a, pairs ? m16n8k16_a() : m16n8k8_a(), a);
    put(in_b, pairs ? m16n8k16_b() : m16n8k8_b(), b);
    const FragmentTable table = m16n8_c();
    for (const Held &h : table.held)
        in_c[h.lane][h.element] = static_cast<float>(c[static_cast<size_t>(h.row)][static_cast<size_t>(h.column)]);
    start(multiply_kernel<E>, 32, 0, MultiplyArgs{in_a, in_b, in_c});
    Matrix result(16, std::vector<double>(8));
    for (const Held &h : table.held)
        result[static_cast<size_t>(h.row)][static_cast<size_t>(h.column)] =
            static_cast<double>(in_c[h.lane][h.element]);
    return result;
}

template <class E> void test_mma(Tally &tally, Dtype dtype) {
    const std::string test = std::string("mma ") + name_of(dtype);
    constexpr size_t depth = E::depth;
    const Matrix zero(16, std::vector<double>(8, 0.0));
    Matrix coded(depth, std::vector<double>(8));
    for (size_t k = 0; k < depth; ++k)
        for (size_t n = 0; n < 8; ++n) coded[k][n] = static_cast<double>(k * 8 + n + 1);
    // A single one in a copies a row of b, which tells the place of every element of a and b.
    int wrong = 0;
    for (size_t row = 0; row < 16; ++row) {
        for (size_t k = 0; k < depth; ++k) {
            Matrix a(16, std::vector<double>(depth, 0.0));
            a[row][k] = 1;
            const Matrix got = multiplied<E>(dtype, a, coded, zero);
            for (size_t i = 0; i < 16; ++i)
                for (size_t n = 0; n < 8; ++n) wrong += got[i][n] != (i == row ? coded[k][n] : 0.0);
        }
    }
    tally.report(wrong == 0, test, std::to_string(wrong) + " elements of single products wrong");

    emulation::Random random{7};
    each_setting([&](const std::string &setting) {
        Matrix a(16, std::vector<double>(depth)), b(depth, std::vector<double>(8)), c = zero;
        const auto fill = [&](Matrix &m) {
            for (auto &row : m)
                for (double &value : row) value = static_cast<double>(random.next() % 255) / 16 - 8;
        };
        fill(a), fill(b), fill(c);
        const Matrix got = multiplied<E>(dtype, a, b, c);
        int differ = 0;
        for (size_t i = 0; i < 16; ++i) {
            for (size_t n = 0; n < 8; ++n) {
                double sum = c[i][n];
                for (size_t k = 0; k < depth; ++k) sum += a[i][k] * b[k][n];
                differ += got[i][n] != sum;
            }
        }
        tally.report(differ == 0 && problems().empty(), test,
                     setting + ": " + std::to_string(differ) + " exact sums wrong" + all_problems());
    });

    // The sum is rounded once: 2^-24 added sixteen times to 1 is lost term by term, not in the sum.
    const double tiny = std::ldexp(1.0, -12);
    const Matrix small_a(16, std::vector<double>(depth, tiny)), small_b(depth, std::vector<double>(8, tiny)),
        ones(16, std::vector<double>(8, 1.0));
    const double once = static_cast<double>(static_cast<float>(1 + static_cast<double>(depth) * tiny * tiny));
    tally.report(multiplied<E>(dtype, small_a, small_b, ones)[3][4] == once, test, "sums are not rounded once");

    // NaN and infinities spread as in arithmetic: over a row of c from a, over a column from b.
    Matrix a(16, std::vector<double>(depth, 1.0)), b(depth, std::vector<double>(8, 1.0));
    a[2][1] = std::numeric_limits<double>::quiet_NaN();
    b[3][5] = std::numeric_limits<double>::infinity();
    const Matrix got = multiplied<E>(dtype, a, b, zero);
    int misplaced = 0;
    for (size_t i = 0; i < 16; ++i) {
        for (size_t n = 0; n < 8; ++n) {
            const double value = got[i][n];
            misplaced += i == 2   ? !std::isnan(value)
                         : n == 5 ? !std::isinf(value)
                                  : value != static_cast<double>(depth);
        }
    }
    tally.report(misplaced == 0, test, std::to_string(misplaced) + " places of NaN or infinity wrong");
}

void test_tf32_truncation(Tally &tally) {
    // 1 + 2^-11 is half-way between two numbers of tf32: mma drops the rest, round_operand goes up.
    uint32_t a[32][4], b[32][2];
    float c[32][4] = {};
    const uint32_t one = 0x3f800000u, tie = 0x3f801000u;
    for (int l = 0; l < 32; ++l) {
        for (uint32_t &word : a[l]) word = tie;
        for (uint32_t &word : b[l]) word = one;
    }
    start(multiply_kernel<Tf32>, 32, 0, MultiplyArgs{a, b, c});
    tally.report(c[5][2] == 8.0f, "tf32", "mma did not drop the bits below tf32");
    for (int l = 0; l < 32; ++l) {
        for (uint32_t &word : a[l]) word = round_operand<Tf32>(word);
        for (float &value : c[l]) value = 0;
    }
    start(multiply_kernel<Tf32>, 32, 0, MultiplyArgs{a, b, c});
    tally.report(c[5][2] == 8.0f + 8 * std::ldexp(1.0f, -10), "tf32", "round_operand did not round a tie up");
}

// -- conversions

float random_float(emulation::Random &random) {
    // All exponents alike; half of the mantissas near a tie of bf16, fp16 or tf32.
    uint32_t word = random.next();
    static const uint32_t below[] = {16, 13, 13, 14};
    if (random.next() % 2 == 0) {
        const uint32_t lost = below[random.next() % 4], half = 1u << (lost - 1);
        word = (word & ~((1u << lost) - 1)) + half + random.next() % 3 - 1;
    }
    return emulation::float_of(word);
}

void test_conversions(Tally &tally) {
    const auto same = [](double a, double b) {
        return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
    };
    int wrong = 0;
    for (uint32_t half = 0; half < 0x10000; ++half) {
        const uint16_t element = static_cast<uint16_t>(half);
        const float bf = widen<Bf16>(element), fp = widen<Fp16>(element);
        wrong += !same(static_cast<double>(bf), decode(Dtype::bfloat16, half));
        wrong += !same(static_cast<double>(fp), decode(Dtype::float16, half));
        // Every number that is no NaN comes back, in both places of a pair.
        if (!std::isnan(bf))
            wrong += pack<Bf16>(bf, 1.0f) != (half | 0x3f800000u) || pack<Bf16>(0.0f, bf) != half << 16;
        if (!std::isnan(fp))
            wrong += pack<Fp16>(fp, 1.0f) != (half | 0x3c000000u) || pack<Fp16>(0.0f, fp) != half << 16;
        // Half-way to the next number, and just beside it.
        const auto ties = [&](auto packed, double here, double next, double before) {
            if (!std::isfinite(here) || std::isnan(next)) return;
            const double step = std::isinf(next) ? here - before : next - here;
            const float middle = static_cast<float>(here + step / 2);
            wrong += packed(middle) != (half % 2 == 0 ? half : half + 1);
            wrong += packed(std::nextafter(middle, static_cast<float>(here))) != half;
            wrong += packed(std::nextafter(middle, static_cast<float>(here + step))) != half + 1;
        };
        if ((half & 0x7fff) != 0x7fff) {
            const auto neighbours = [&](auto packed, Dtype dtype) {
                ties(packed, decode(dtype, half), decode(dtype, half + 1), decode(dtype, half - 1));
            };
            neighbours([](float v) { return pack<Bf16>(v, 0.0f); }, Dtype::bfloat16);
            neighbours([](float v) { return pack<Fp16>(v, 0.0f); }, Dtype::float16);
        }
    }
    tally.report(wrong == 0, "conversions", std::to_string(wrong) + " of the 16-bit numbers, or ties between them");

    emulation::Random random{3};
    wrong = 0;
    for (int i = 0; i < 400000; ++i) {
        const float value = random_float(random);
        const uint32_t word = emulation::bits_of(value);
        if (std::isnan(value)) {
            wrong += pack<Bf16>(value, value) != 0x7fff7fffu || pack<Fp16>(value, value) != 0x7fff7fffu;
            wrong += !std::isnan(emulation::float_of(round_operand<Tf32>(word)));
            continue;
        }
        const double wide = static_cast<double>(value);
        wrong += pack<Bf16>(value, -value) >> 16 != encode(Dtype::bfloat16, -wide);
        wrong += (pack<Fp16>(value, -value) & 0xffffu) != encode(Dtype::float16, wide);
        const double nearest = std::isinf(value) ? wide : operand(Dtype::tf32, wide);
        const float expected = std::abs(nearest) > static_cast<double>(std::numeric_limits<float>::max())
                                   ? std::copysign(std::numeric_limits<float>::infinity(), value)
                                   : static_cast<float>(nearest);
        wrong += round_operand<Tf32>(word) != emulation::bits_of(expected);
        wrong += widen<Tf32>(word) != value;
        wrong += round_operand<Bf16>(word) != word || round_operand<Fp16>(word) != word;
    }
    tally.report(wrong == 0, "conversions", std::to_string(wrong) + " of random numbers");
}

// -- exchange, places and launches

struct ExchangeArgs {
    int *wrong;
};
SK_KERNEL(64, 1) exchange_kernel(SK_ARGS(ExchangeArgs) args) {
    const int lane = lane_id();
    int wrong = 0;
    for (int round = 0; round < 5; ++round) {
        const int from = (lane * 7 + round) % 32;
        wrong += shuffle(lane * 3 + round, from) != from * 3 + round;
        wrong += shuffle(static_cast<uint32_t>(lane) << 27, from) != static_cast<uint32_t>(from) << 27;
        wrong += shuffle(static_cast<float>(lane) / 3, from + 32) != static_cast<float>(from) / 3;
        wrong += shuffle(int64_t{lane} << 40, from) != int64_t{from} << 40;
        wrong += shuffle_xor(static_cast<double>(lane) / 3, 1 << round) != static_cast<double>(lane ^ (1 << round)) / 3;
        wrong += shuffle_xor(lane, 31) != 31 - lane;
        barrier();
        const uint32_t mask = ballot((lane + round) % 5 == 0);
        for (int l = 0; l < 32; ++l) wrong += (mask >> l & 1) != ((l + round) % 5 == 0 ? 1u : 0u);
        wrong += first_bit(mask) != (5 - round) % 5 || bit_count(mask) != (round == 0 || round >= 4 ? 7
                                                                           : round < 4              ? 6
                                                                                                    : 0);
    }
    args.wrong[thread_id()] = wrong;
}

struct PlaceArgs {
    int *visits, *order, *next;
};
SK_KERNEL(64, 1) place_kernel(SK_ARGS(PlaceArgs) args) {
    const int block = (block_z() * 3 + block_y()) * 4 + block_x();
    ++args.visits[block * thread_count() + warp_id() * 32 + lane_id()];
    if (thread_id() == 0) args.order[(*args.next)++] = block;
}
struct NoArgs {};
SK_KERNEL(64, 1) no_kernel(SK_ARGS(NoArgs)) {}

void test_launch(Tally &tally) {
    each_setting([&](const std::string &setting) {
        int wrong[64];
        start(exchange_kernel, 64, 0, ExchangeArgs{wrong});
        int sum = 0;
        for (const int n : wrong) sum += n;
        tally.report(sum == 0 && problems().empty(), "exchange",
                     setting + ": " + std::to_string(sum) + " wrong" + all_problems());

        std::vector<int> visits(24 * 64, 0), order(24, -1);
        int next = 0;
        start(place_kernel, 64, 0, PlaceArgs{visits.data(), order.data(), &next}, {4, 3, 2});
        bool once = next == 24;
        for (const int n : visits) once = once && n == 1;
        tally.report(once, "places", setting + ": a thread ran twice or never");
        const bool rising = std::is_sorted(order.begin(), order.end()),
                   falling = std::is_sorted(order.rbegin(), order.rend());
        const emulation::Schedule schedule = options().schedule;
        tally.report(schedule == emulation::Schedule::forward   ? rising
                     : schedule == emulation::Schedule::reverse ? falling
                                                                : !rising && !falling,
                     "places", setting + ": blocks in another order");
    });

    std::vector<int> orders[3];
    for (const uint64_t seed : {1, 2, 2}) {
        std::vector<int> &order = orders[orders[0].empty() ? 0 : orders[1].empty() ? 1 : 2];
        std::vector<int> visits(24 * 64);
        order.resize(24);
        int next = 0;
        options().schedule = emulation::Schedule::random;
        options().seed = seed;
        start(place_kernel, 64, 0, PlaceArgs{visits.data(), order.data(), &next}, {4, 3, 2});
    }
    tally.report(orders[0] != orders[1] && orders[1] == orders[2], "places", "a random order is not its seed's");
    options() = emulation::Options();

    const auto refused = [&](int threads, int64_t shared_bytes, const Grid &grid, const std::string &part) {
        try {
            start(no_kernel, threads, shared_bytes, NoArgs{}, grid);
            tally.report(false, "launch", "was not refused: " + part);
        } catch (const std::invalid_argument &error) {
            tally.report(std::string(error.what()).find(part) != std::string::npos, "launch", error.what());
        }
    };
    refused(33, 0, {1, 1, 1}, "expected 32 to 1024 threads, a multiple of 32, got 33");
    refused(0, 0, {1, 1, 1}, "got 0");
    refused(1056, 0, {1, 1, 1}, "got 1056");
    refused(32, 227 * 1024 + 1, {1, 1, 1}, "expected at most 232448 bytes of shared memory, got 232449");
    refused(32, 0, {1, 65536, 1}, "expected a grid within");
    options().shared_limit = 163 * 1024;
    refused(32, 163 * 1024 + 16, {1, 1, 1}, "expected at most 166912");
    options() = emulation::Options();
    emulation::reset();
    start(no_kernel, 32, 227 * 1024, NoArgs{}, {5, 1, 1});
    start(no_kernel, 1024, 0, NoArgs{}, {0, 1, 1});
    tally.report(statistics().blocks == 5 && problems().empty(), "launch", "expected 5 blocks" + all_problems());
}

// -- asynchronous copies

struct CopyArgs {
    uint32_t *source;
    uint32_t *seen;  // per round the first word
    int rounds;
};
// The source changes after the copy is issued.
SK_KERNEL(32, 1) changing_kernel(SK_ARGS(CopyArgs) args) {
    const Shared to = shared_memory() + static_cast<Shared>(lane_id() * 16);
    for (int round = 0; round < args.rounds; ++round) {
        args.source[lane_id() * 4] = 1;
        cp_async_16(to, args.source + lane_id() * 4, 16);
        cp_async_commit();
        args.source[lane_id() * 4] = 2;
        cp_async_wait<0>();
        args.seen[round * 32 + lane_id()] = load_shared<uint32_t>(to);
    }
}
// Groups of one copy each; which are there after waiting for all but `pending`?
template <int pending> SK_KERNEL(32, 1) groups_kernel(SK_ARGS(CopyArgs) args) {
    const Shared to = shared_memory() + static_cast<Shared>(lane_id() * 64);
    for (int group = 0; group < 4; ++group) store_shared(to + static_cast<Shared>(group) * 16, 0u);
    for (int group = 0; group < 4; ++group) {
        if (group != 2) cp_async_16(to + static_cast<Shared>(group) * 16, args.source, 16);  // group 2 is empty
        cp_async_commit();
    }
    cp_async_wait<pending>();
    for (int group = 0; group < 4; ++group) {
        args.seen[lane_id() * 4 + group] = load_shared<uint32_t>(to + static_cast<Shared>(group) * 16);
    }
    cp_async_wait<0>();
}
SK_KERNEL(32, 1) fill_kernel(SK_ARGS(CopyArgs) args) {
    const int lane = lane_id();
    const Shared to = shared_memory() + static_cast<Shared>(lane * 16);
    // Where nothing is read the address need not be mapped.
    const void *nowhere = reinterpret_cast<const void *>(uintptr_t{16});
    if (lane < 17) cp_async_16(to, lane == 0 ? nowhere : args.source, lane);
    cp_async_commit();
    cp_async_wait<0>();
    if (lane < 17) {
        for (int i = 0; i < 4; ++i) args.seen[lane * 4 + i] = load_shared<uint32_t>(to + static_cast<Shared>(i) * 4);
    }
}

void test_copies(Tally &tally) {
    alignas(16) uint32_t source[128];
    std::vector<uint32_t> seen(32 * 32);
    each_setting([&](const std::string &setting) {
        start(changing_kernel, 32, 512, CopyArgs{source, seen.data(), 32});
        int early = 0, late = 0;
        for (const uint32_t word : seen) early += word == 1, late += word == 2;
        const emulation::Copies copies = options().copies;
        const bool right = copies == emulation::Copies::early  ? early == 1024
                           : copies == emulation::Copies::late ? late == 1024
                                                               : early > 100 && late > 100 && early + late == 1024;
        tally.report(right && problems().empty(), "copies",
                     setting + ": " + std::to_string(early) + " early, " + std::to_string(late) + " late" +
                         all_problems());

        for (uint32_t i = 0; i < 4; ++i) source[i] = 0x04030201u + i * 0x04040404u;
        start(fill_kernel, 32, 512, CopyArgs{source, seen.data(), 1});
        int wrong = 0;
        for (uint32_t count = 0; count < 17; ++count)
            for (uint32_t i = 0; i < 16; ++i)
                wrong += (seen[count * 4 + i / 4] >> (i % 4 * 8) & 0xff) != (i < count ? i + 1 : 0);
        tally.report(wrong == 0 && problems().empty(), "copies",
                     setting + ": " + std::to_string(wrong) + " bytes wrong of partial copies" + all_problems());
    });

    options().races = false;  // the reads of unfinished groups are the point
    options().copies = emulation::Copies::late;
    source[0] = 9;
    const auto groups = [&](void (*kernel)(CopyArgs), const std::vector<uint32_t> &expected, const char *what) {
        start(kernel, 32, 2048, CopyArgs{source, seen.data(), 1});
        const std::vector<uint32_t> got(seen.begin() + 4 * 21, seen.begin() + 4 * 22);
        tally.report(got == expected && problems().empty(), "copies", what + all_problems());
    };
    groups(groups_kernel<0>, {9, 9, 0, 9}, "wait for all groups");
    groups(groups_kernel<1>, {9, 9, 0, 0}, "wait for all but one group");
    groups(groups_kernel<2>, {9, 9, 0, 0}, "wait for all but two groups, one of them empty");
    groups(groups_kernel<3>, {9, 0, 0, 0}, "wait for all but three groups");
    groups(groups_kernel<9>, {0, 0, 0, 0}, "wait for all but more groups than there are");
    options() = emulation::Options();
    emulation::reset();
}

// -- faults that must be seen

struct FaultArgs {
    bool fault;  // leave out what makes it right
    uint32_t *global;
};

// Reads what another warp wrote.
SK_KERNEL(64, 1) write_read(SK_ARGS(FaultArgs) args) {
    store_shared(shared_memory() + static_cast<Shared>(thread_id() * 4), 1u);
    if (args.fault) {
        warp_barrier();
    } else {
        barrier();
    }
    load_shared<uint32_t>(shared_memory() + static_cast<Shared>((thread_id() + 32) % 64 * 4));
}
SK_KERNEL(64, 1) read_write(SK_ARGS(FaultArgs) args) {
    load_shared<uint32_t>(shared_memory() + static_cast<Shared>((thread_id() + 32) % 64 * 4));
    if (!args.fault) barrier();
    store_shared(shared_memory() + static_cast<Shared>(thread_id() * 4), 1u);
}
SK_KERNEL(64, 1) write_write(SK_ARGS(FaultArgs) args) {
    if (thread_id() == 3) store_shared(shared_memory(), 1u);
    if (!args.fault) barrier();
    if (thread_id() == 40) store_shared(shared_memory(), 1u);
}
// Many readers of several warps, then one of them writes.
SK_KERNEL(96, 1) readers_write(SK_ARGS(FaultArgs) args) {
    load_shared<uint32_t>(shared_memory());
    warp_barrier();
    if (!args.fault) barrier();
    if (thread_id() == 40) store_shared(shared_memory(), 1u);
}
// The last to read is the one that writes; another read before it.
SK_KERNEL(32, 1) earlier_reader(SK_ARGS(FaultArgs) args) {
    if (lane_id() == 6) load_shared<uint32_t>(shared_memory());
    ballot(true);
    if (lane_id() == 5) load_shared<uint32_t>(shared_memory());
    if (!args.fault) warp_barrier();
    if (lane_id() == 5) store_shared(shared_memory(), 1u);
}
SK_KERNEL(32, 1) wide_and_narrow(SK_ARGS(FaultArgs) args) {
    if (lane_id() == 0) store_shared(shared_memory(), Words4{1, 2, 3, 4});
    if (!args.fault) warp_barrier();
    if (lane_id() == 1) load_shared<uint32_t>(shared_memory() + 12);
}
// Within a warp: shuffles and votes do not order memory.
SK_KERNEL(32, 1) neighbour(SK_ARGS(FaultArgs) args) {
    store_shared(shared_memory() + static_cast<Shared>(lane_id() * 4), 1u);
    ballot(true);
    shuffle(1, 0);
    if (!args.fault) warp_barrier();
    load_shared<uint32_t>(shared_memory() + static_cast<Shared>((lane_id() ^ 1) * 4));
}
SK_KERNEL(32, 1) matrix_too_soon(SK_ARGS(FaultArgs) args) {
    store_shared(shared_memory() + static_cast<Shared>(lane_id() * 16), Words4{1, 2, 3, 4});
    if (!args.fault) warp_barrier();
    uint32_t to[4];
    ldmatrix_x4(to, shared_memory() + static_cast<Shared>(lane_id() * 16));
}
SK_KERNEL(32, 1) overwritten_matrix(SK_ARGS(FaultArgs) args) {
    const Shared row = shared_memory() + static_cast<Shared>(lane_id() * 16);
    store_shared(row, Words4{1, 2, 3, 4});
    warp_barrier();
    uint32_t to[4];
    ldmatrix_x4(to, row);
    if (!args.fault) warp_barrier();
    store_shared(row, Words4{1, 2, 3, 4});
}
// Halves of a word by two threads are no race; the whole word by a third is.
SK_KERNEL(32, 1) halves(SK_ARGS(FaultArgs) args) {
    if (lane_id() < 2) store_shared(shared_memory() + static_cast<Shared>(lane_id() * 2), static_cast<uint16_t>(1));
    if (!args.fault) warp_barrier();
    if (lane_id() == 2) load_shared<uint32_t>(shared_memory());
}

SK_KERNEL(64, 1) no_wait(SK_ARGS(FaultArgs) args) {
    cp_async_16(shared_memory() + static_cast<Shared>(thread_id() * 16), args.global, 16);
    cp_async_commit();
    if (!args.fault) cp_async_wait<0>();
    barrier();
    load_shared<Words4>(shared_memory() + static_cast<Shared>((thread_id() + 32) % 64 * 16));
    cp_async_wait<0>();
}
SK_KERNEL(64, 1) own_read_before_wait(SK_ARGS(FaultArgs) args) {
    const Shared to = shared_memory() + static_cast<Shared>(thread_id() * 16);
    cp_async_16(to, args.global, 16);
    cp_async_commit();
    if (args.fault) load_shared<uint32_t>(to + 8);
    cp_async_wait<0>();
    load_shared<uint32_t>(to + 8);
}
SK_KERNEL(64, 1) wait_for_too_few(SK_ARGS(FaultArgs) args) {
    const Shared to = shared_memory() + static_cast<Shared>(thread_id() * 32);
    cp_async_16(to, args.global, 16);
    cp_async_commit();
    cp_async_16(to + 16, args.global, 16);
    cp_async_commit();
    cp_async_wait<1>();
    load_shared<Words4>(to);
    if (args.fault) load_shared<Words4>(to + 16);
    cp_async_wait<0>();
}
SK_KERNEL(64, 1) no_commit(SK_ARGS(FaultArgs) args) {
    const Shared to = shared_memory() + static_cast<Shared>(thread_id() * 16);
    cp_async_16(to, args.global, 16);
    if (!args.fault) cp_async_commit();
    cp_async_wait<0>();
    load_shared<Words4>(to);
    cp_async_commit();
    cp_async_wait<0>();
}
SK_KERNEL(64, 1) wait_without_barrier(SK_ARGS(FaultArgs) args) {
    cp_async_16(shared_memory() + static_cast<Shared>(thread_id() * 16), args.global, 16);
    cp_async_commit();
    if (args.fault) barrier();  // before the wait, where it orders nothing
    cp_async_wait<0>();
    if (!args.fault) barrier();
    load_shared<Words4>(shared_memory() + static_cast<Shared>((thread_id() + 1) % 64 * 16));
}
SK_KERNEL(32, 1) never_waited(SK_ARGS(FaultArgs) args) {
    cp_async_16(shared_memory() + static_cast<Shared>(thread_id() * 16), args.global, 16);
    cp_async_commit();
    if (!args.fault) cp_async_wait<0>();
}
// Two copies to one place under way at once.
SK_KERNEL(32, 1) twice_at_once(SK_ARGS(FaultArgs) args) {
    const Shared to = shared_memory() + static_cast<Shared>(thread_id() * 16);
    cp_async_16(to, args.global, 16);
    cp_async_commit();
    if (!args.fault) cp_async_wait<0>();
    cp_async_16(to, args.global, 16);
    cp_async_commit();
    cp_async_wait<0>();
}
// A warp's ring of two slots: the slot that was just read is filled again.
SK_KERNEL(32, 1) ring(SK_ARGS(FaultArgs) args) {
    const auto row = [](int slot, int lane) { return shared_memory() + static_cast<Shared>(slot * 512 + lane * 16); };
    cp_async_16(row(0, lane_id()), args.global, 16);
    cp_async_commit();
    for (int i = 0; i < 6; ++i) {
        cp_async_16(row((i + 1) % 2, lane_id()), args.global, 16);
        cp_async_commit();
        cp_async_wait<1>();
        warp_barrier();
        uint32_t to[4];
        ldmatrix_x4(to, row(i % 2, 31 - lane_id()));
        if (!args.fault) warp_barrier();
    }
    cp_async_wait<0>();
}
// Ring of the block: one barrier per step is enough where the slot filled is not the one being read.
SK_KERNEL(64, 1) block_ring(SK_ARGS(FaultArgs) args) {
    const int stages = args.fault ? 2 : 3;
    const auto row = [](int slot, int thread) {
        return shared_memory() + static_cast<Shared>(slot * 1024 + thread * 16);
    };
    for (int i = 0; i < stages - 1; ++i) {
        cp_async_16(row(i, thread_id()), args.global, 16);
        cp_async_commit();
    }
    for (int i = 0; i < 6; ++i) {
        cp_async_wait<0>();
        barrier();
        if (args.fault) {
            load_shared<Words4>(row(i % stages, 63 - thread_id()));
            cp_async_16(row((i + stages) % stages, thread_id()), args.global, 16);
        } else {
            cp_async_16(row((i + stages - 1) % stages, thread_id()), args.global, 16);
            load_shared<Words4>(row(i % stages, 63 - thread_id()));
        }
        cp_async_commit();
    }
    cp_async_wait<0>();
}

SK_KERNEL(32, 1) two_collectives(SK_ARGS(FaultArgs) args) {
    float c[4] = {};
    const uint32_t a[4] = {};
    if (args.fault && lane_id() == 3) {
        ballot(true);
    } else {
        mma<Bf16>(c, a, 0, 0);
    }
}
SK_KERNEL(32, 1) two_places(SK_ARGS(FaultArgs) args) {
    if (args.fault && lane_id() >= 16) {
        ballot(true);
    } else {
        ballot(true);
    }
}
SK_KERNEL(64, 1) two_barriers(SK_ARGS(FaultArgs) args) {
    if (args.fault && warp_id() == 1) {
        barrier();
    } else {
        barrier();
    }
}
SK_KERNEL(64, 1) barrier_and_vote(SK_ARGS(FaultArgs) args) {
    if (args.fault && lane_id() == 5) {
        ballot(true);
    } else if (args.fault) {
        barrier();
    }
}
SK_KERNEL(64, 1) vote_after_barrier(SK_ARGS(FaultArgs) args) {
    if (args.fault && lane_id() == 31) {
        ballot(true);
    } else if (args.fault) {
        barrier();
    }
}
SK_KERNEL(64, 1) returned_warp(SK_ARGS(FaultArgs) args) {
    if (args.fault && warp_id() == 1) return;
    barrier();
}
SK_KERNEL(64, 1) returned_lane(SK_ARGS(FaultArgs) args) {
    if (args.fault && thread_id() == 37) return;
    warp_barrier();
}
SK_KERNEL(64, 1) loops_of_two_lengths(SK_ARGS(FaultArgs) args) {
    const int rounds = args.fault && warp_id() == 1 ? 3 : 4;
    for (int i = 0; i < rounds; ++i) barrier();
}

SK_KERNEL(32, 1) load_past_end(SK_ARGS(FaultArgs) args) {
    load_shared<uint32_t>(shared_memory() + (args.fault ? 4096u : 4092u));
}
SK_KERNEL(32, 1) load_across_end(SK_ARGS(FaultArgs) args) {
    load_shared<Words4>(shared_memory() + (args.fault ? 4096u : 4080u));
}
SK_KERNEL(32, 1) load_before_start(SK_ARGS(FaultArgs) args) {
    load_shared<uint32_t>(args.fault ? 0u : shared_memory());
}
SK_KERNEL(32, 1) store_past_end(SK_ARGS(FaultArgs) args) {
    if (lane_id() == 0) store_shared(shared_memory() + (args.fault ? 0xffffff00u : 4080u), Words4{1, 2, 3, 4});
}
SK_KERNEL(32, 1) copy_past_end(SK_ARGS(FaultArgs) args) {
    if (lane_id() == 0) cp_async_16(shared_memory() + (args.fault ? 4096u : 4080u), args.global, 0);
    cp_async_commit();
    cp_async_wait<0>();
}
SK_KERNEL(32, 1) matrix_past_end(SK_ARGS(FaultArgs) args) {
    uint32_t to[4];
    ldmatrix_x4(to, shared_memory() + (args.fault && lane_id() == 7 ? 4096u : 0u));
    if (args.fault && lane_id() / 4 == 7) *args.global = to[0];
}
SK_KERNEL(32, 1) load_unaligned(SK_ARGS(FaultArgs) args) {
    load_shared<Words2>(shared_memory() + (args.fault ? 4u : 8u));
}
SK_KERNEL(32, 1) store_unaligned(SK_ARGS(FaultArgs) args) {
    if (lane_id() == 0) store_shared(shared_memory() + (args.fault ? 8u : 16u), Words4{1, 2, 3, 4});
}
SK_KERNEL(32, 1) matrix_unaligned(SK_ARGS(FaultArgs) args) {
    uint32_t to[4];
    ldmatrix_x4_trans(to, shared_memory() + (args.fault && lane_id() == 9 ? 8u : 0u));
}
SK_KERNEL(32, 1) copy_unaligned_target(SK_ARGS(FaultArgs) args) {
    if (lane_id() == 0) cp_async_16(shared_memory() + (args.fault ? 8u : 16u), args.global, 16);
    cp_async_commit();
    cp_async_wait<0>();
}
SK_KERNEL(32, 1) copy_unaligned_source(SK_ARGS(FaultArgs) args) {
    if (lane_id() == 0) cp_async_16(shared_memory(), args.global + (args.fault ? 1 : 4), 4);
    cp_async_commit();
    cp_async_wait<0>();
}
SK_KERNEL(32, 1) copy_of_17(SK_ARGS(FaultArgs) args) {
    if (lane_id() == 0) cp_async_16(shared_memory(), args.global, args.fault ? 17 : 16);
    cp_async_commit();
    cp_async_wait<0>();
}
SK_KERNEL(32, 1) copy_of_null(SK_ARGS(FaultArgs) args) {
    if (lane_id() == 0) cp_async_16(shared_memory(), args.fault ? nullptr : args.global, 0);
    cp_async_commit();
    cp_async_wait<0>();
}

SK_KERNEL(64, 1) store_global_twice(SK_ARGS(FaultArgs) args) {
    if (thread_id() % 32 == 5) store_global(args.global + block_x() * 2 + (args.fault ? 0 : warp_id()), 1u);
}
SK_KERNEL(64, 1) blocks_store_same(SK_ARGS(FaultArgs) args) {
    if (thread_id() == 5) store_global(args.global + (args.fault ? 0 : block_x()), 1u);
}
SK_KERNEL(32, 1) load_what_was_stored(SK_ARGS(FaultArgs) args) {
    if (block_x() == 0) store_global(args.global + lane_id(), 1u);
    load_global(args.global + (args.fault && block_x() == 0 ? lane_id() : 32));
}
SK_KERNEL(32, 1) copy_what_was_stored(SK_ARGS(FaultArgs) args) {
    if (lane_id() == 0 && block_x() == 0) {
        store_global(args.global + 2, 1u);
        cp_async_16(shared_memory(), args.global + (args.fault ? 0 : 4), 16);
    }
    cp_async_commit();
    cp_async_wait<0>();
}
SK_KERNEL(32, 1) load_global_unaligned(SK_ARGS(FaultArgs) args) {
    load_global(reinterpret_cast<const Words2 *>(args.global + (args.fault ? 1 : 2)));
}
SK_KERNEL(32, 1) store_global_unaligned(SK_ARGS(FaultArgs) args) {
    if (thread_id() + block_x() == 0)
        store_global(reinterpret_cast<Words4 *>(args.global + (args.fault ? 2 : 4)), Words4{1, 2, 3, 4});
}
SK_KERNEL(32, 1) throws(SK_ARGS(FaultArgs) args) {
    if (args.fault && lane_id() == 4) throw std::runtime_error("something is wrong");
    warp_barrier();
}

struct Fault {
    const char *name;
    void (*kernel)(FaultArgs);
    int threads;
    const char *expected;  // part of the problem
    int shared_bytes = 4096;
};

const std::vector<Fault> &faults() {
    static const std::vector<Fault> all = {
        {"write, read", write_read, 64, "load_shared by thread"},
        {"read, write", read_write, 64, "with no barrier between them"},
        {"write, write", write_write, 64, "store_shared by thread"},
        {"readers, write", readers_write, 96, "with no barrier between them"},
        {"earlier reader", earlier_reader, 32, "store_shared by thread 5 after load_shared by thread 6 "},
        {"wide and narrow", wide_and_narrow, 32, "with no warp_barrier between them"},
        {"neighbour", neighbour, 32, "with no warp_barrier between them"},
        {"matrix too soon", matrix_too_soon, 32, "ldmatrix by warp 0 after store_shared by thread"},
        {"overwritten matrix", overwritten_matrix, 32, "after ldmatrix by warp 0"},
        {"halves", halves, 32, "with no warp_barrier between them"},
        {"no wait", no_wait, 64, "no cp_async_wait between them"},
        {"own read before wait", own_read_before_wait, 64, "no cp_async_wait between them"},
        {"wait for too few", wait_for_too_few, 64, "no cp_async_wait between them"},
        {"no commit", no_commit, 64, "no cp_async_wait between them"},
        {"wait without barrier", wait_without_barrier, 64, "after cp_async_16 by thread"},
        {"never waited", never_waited, 32, "returned with 1 cp_async_16 that it never waited for"},
        {"twice at once", twice_at_once, 32, "is under way"},
        {"ring", ring, 32, "cp_async_16 by thread"},
        {"block ring", block_ring, 64, "cp_async_16 by thread"},
        {"two collectives", two_collectives, 32, "at ballot"},
        {"two places", two_places, 32, "divergent collective"},
        {"two barriers", two_barriers, 64, "divergent collective"},
        {"barrier and vote", barrier_and_vote, 64, "divergent collective"},
        {"vote after barrier", vote_after_barrier, 64, "at ballot"},
        {"returned warp", returned_warp, 64, "has returned"},
        {"returned lane", returned_lane, 64, "thread 37 has returned"},
        {"loops of two lengths", loops_of_two_lengths, 64, "has returned"},
        {"load past the end", load_past_end, 32, "(byte 4096): expected within the block's 4096 bytes"},
        {"load across the end", load_across_end, 32, "expected within the block's 4104 bytes", 4104},
        {"load before the start", load_before_start, 32, "at address 0 (byte -1024)"},
        {"store past the end", store_past_end, 32, "expected within"},
        {"copy past the end", copy_past_end, 32, "cp_async_16 of 16 bytes by thread 0"},
        {"matrix past the end", matrix_past_end, 32, "ldmatrix of 16 bytes by thread 7"},
        {"load unaligned", load_unaligned, 32, "expected aligned to 8"},
        {"store unaligned", store_unaligned, 32, "expected aligned to 16"},
        {"matrix unaligned", matrix_unaligned, 32, "expected aligned to 16"},
        {"copy to unaligned", copy_unaligned_target, 32, "expected aligned to 16"},
        {"copy from unaligned", copy_unaligned_source, 32, "got an address of 4 modulo 16"},
        {"copy of 17", copy_of_17, 32, "and 17 bytes"},
        {"copy of null", copy_of_null, 32, "that is not null"},
        {"global stored twice", store_global_twice, 64, "has stored in the same launch"},
        {"global stored by two blocks", blocks_store_same, 64, "has stored in the same launch"},
        {"global loaded after stored", load_what_was_stored, 32, "that this launch has stored to"},
        {"global copied after stored", copy_what_was_stored, 32, "that this launch has stored to"},
        {"global load unaligned", load_global_unaligned, 32, "load_global of 8 bytes"},
        {"global store unaligned", store_global_unaligned, 32, "store_global of 16 bytes"},
        {"throws", throws, 32, "threw: something is wrong"},
    };
    return all;
}

void test_faults(Tally &tally) {
    alignas(16) uint32_t global[64] = {};
    for (const Fault &fault : faults()) {
        each_setting([&](const std::string &setting) {
            const std::string test = std::string("fault: ") + fault.name;
            start(fault.kernel, fault.threads, fault.shared_bytes, FaultArgs{false, global}, {2, 1, 1});
            tally.report(problems().empty(), test, setting + ": reported where nothing is wrong" + all_problems());
            emulation::reset();
            start(fault.kernel, fault.threads, fault.shared_bytes, FaultArgs{true, global}, {2, 1, 1});
            tally.report(any_contains(fault.expected), test, setting + ": not reported" + all_problems());
            // And the next launch is not the worse for it.
            emulation::reset();
            start(fault.kernel, fault.threads, fault.shared_bytes, FaultArgs{false, global}, {2, 1, 1});
            tally.report(problems().empty(), test, setting + ": reported in the launch after it" + all_problems());
        });
    }
    // Problems are collected up to 20 of different place or kind, and forgotten.
    emulation::reset();
    for (int i = 0; i < 30; ++i) emulation::report("key " + std::to_string(i / 2 * 2 + i % 2), "text");
    tally.report(problems().size() == 20, "problems", "expected the first 20");
    emulation::reset();
    emulation::report("key", "text");
    emulation::report("key", "another text");
    tally.report(problems().size() == 1, "problems", "expected one of the same kind and place");
    emulation::reset();
    tally.report(problems().empty(), "problems", "not forgotten");
}

// -- poison and bank conflicts

struct PoisonArgs {
    uint32_t *to;
};
SK_KERNEL(32, 1) poison_kernel(SK_ARGS(PoisonArgs) args) {
    args.to[lane_id()] = load_shared<uint32_t>(shared_memory() + static_cast<Shared>(lane_id() * 4));
    warp_barrier();
    store_shared(shared_memory() + static_cast<Shared>(lane_id() * 4), 0u);
}

void test_poison(Tally &tally) {
    uint32_t to[32];
    emulation::reset();
    // The second block does not see what the first wrote.
    start(poison_kernel, 32, 128, PoisonArgs{to}, {2, 1, 1});
    const uint16_t half = static_cast<uint16_t>(to[7]);
    tally.report(to[7] == 0xffffffffu && std::isnan(widen<Tf32>(to[7])) && std::isnan(widen<Bf16>(half)) &&
                     std::isnan(widen<Fp16>(half)),
                 "poison", "unwritten shared memory is no NaN");
    tally.report(statistics().unwritten_reads >= 64 && problems().empty(), "poison",
                 std::to_string(statistics().unwritten_reads) + " unwritten reads counted" + all_problems());
    emulation::reset();
}

struct BankArgs {
    int pitch;
};
SK_KERNEL(32, 1) matrix_banks(SK_ARGS(BankArgs) args) {
    uint32_t to[4];
    ldmatrix_x4(to, shared_memory() + static_cast<Shared>(lane_id() * args.pitch));
}
template <class T> SK_KERNEL(32, 1) load_banks(SK_ARGS(BankArgs) args) {
    load_shared<T>(shared_memory() + static_cast<Shared>(lane_id() * args.pitch));
    warp_barrier();
}
template <class T> SK_KERNEL(32, 1) store_banks(SK_ARGS(BankArgs) args) {
    store_shared(shared_memory() + static_cast<Shared>(lane_id() * args.pitch), T());
    warp_barrier();
}

void test_banks(Tally &tally) {
    const auto expect = [&](void (*kernel)(BankArgs), int pitch, int degree, int emulation::Statistics::*found,
                            const char *what) {
        emulation::reset();
        start(kernel, 32, 32 * 1024, BankArgs{pitch});
        tally.report(statistics().*found == degree, "banks",
                     std::string(what) + " at a pitch of " + std::to_string(pitch) + ": expected " +
                         std::to_string(degree) + ", got " + std::to_string(statistics().*found));
    };
    const auto matrix = &emulation::Statistics::ldmatrix_conflict;
    const auto load = &emulation::Statistics::load_conflict;
    const auto store = &emulation::Statistics::store_conflict;
    expect(matrix_banks, 16, 1, matrix, "ldmatrix");
    expect(matrix_banks, 32, 2, matrix, "ldmatrix");
    expect(matrix_banks, 64, 4, matrix, "ldmatrix");
    expect(matrix_banks, 128, 8, matrix, "ldmatrix");
    expect(matrix_banks, 144, 1, matrix, "ldmatrix");
    expect(matrix_banks, 208, 1, matrix, "ldmatrix");
    expect(matrix_banks, 0, 1, matrix, "ldmatrix");
    expect(load_banks<uint32_t>, 4, 1, load, "4 bytes");
    expect(load_banks<uint32_t>, 8, 2, load, "4 bytes");
    expect(load_banks<uint32_t>, 128, 32, load, "4 bytes");
    expect(load_banks<uint32_t>, 132, 1, load, "4 bytes");
    expect(load_banks<uint32_t>, 0, 1, load, "4 bytes");
    expect(load_banks<uint16_t>, 2, 1, load, "2 bytes");
    expect(load_banks<Words2>, 8, 1, load, "8 bytes");
    expect(load_banks<Words2>, 16, 2, load, "8 bytes");
    expect(load_banks<Words4>, 16, 1, load, "16 bytes");
    expect(load_banks<Words4>, 128, 8, load, "16 bytes");
    expect(store_banks<uint32_t>, 8, 2, store, "stores of 4 bytes");
    expect(store_banks<Words4>, 16, 1, store, "stores of 16 bytes");
    expect(store_banks<Words4>, 16, 1, load, "stores of 16 bytes, loads");
    emulation::reset();
    start(load_banks<uint32_t>, 32, 4096, BankArgs{8});
    tally.report(statistics().judged_accesses == 1 &&
                     statistics().load_place.find("test_primitives.cpp") != std::string::npos,
                 "banks", "expected one judged access and its place, got " + statistics().load_place);
    emulation::reset();
}

// -- the recorded results

void test_recorded(Tally &tally) {
    const std::string here = __FILE__, path = here.substr(0, here.rfind('/') + 1) + "primitives.json";
    std::ifstream file(path);
    std::stringstream recorded;
    recorded << file.rdbuf();
    each_setting([&](const std::string &setting) {
        const std::string now = dump::json("emulation", "from the host emulation; not yet confirmed by a GPU");
        tally.report(now == recorded.str() && problems().empty(), "recorded",
                     setting + ": primitives differ from " + path + "; if they should, build primitives_gpu.cu with " +
                         "-DSK_EMULATE and write its output there" + all_problems());
    });
}

}  // namespace
}  // namespace sktest

int main(int argc, char **argv) {
    sktest::Tally tally(argc, argv);
    sktest::test_tables(tally);
    sktest::test_ldmatrix(tally);
    sktest::test_mma<sparsekern::cuda::Bf16>(tally, sktest::Dtype::bfloat16);
    sktest::test_mma<sparsekern::cuda::Fp16>(tally, sktest::Dtype::float16);
    sktest::test_mma<sparsekern::cuda::Tf32>(tally, sktest::Dtype::tf32);
    sktest::test_tf32_truncation(tally);
    sktest::test_conversions(tally);
    sktest::test_launch(tally);
    sktest::test_copies(tally);
    sktest::test_faults(tally);
    sktest::test_poison(tally);
    sktest::test_banks(tally);
    sktest::test_recorded(tally);
    return tally.finish();
}
