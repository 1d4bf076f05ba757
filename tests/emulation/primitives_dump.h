// SPDX-License-Identifier: Apache-2.0
// Every primitive alone, on fixed inputs, and what it gave as JSON: lists of 32-bit words. Built by nvcc it runs on a
// GPU, with SK_EMULATE on the host; compare_primitives.py compares two such files.
//   words_*: equal bit by bit. float_*: fp32 numbers, any two NaNs equal. near_*: fp32 sums that are not exact and may
//   differ in the order of additions.
#pragma once

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "launch.cuh"

// Within the primitives' namespace, because CUDA declares another ballot in the global one.
namespace sparsekern {
namespace cuda {
namespace dump {

// An array where kernels can reach it.
class Words {
public:
    explicit Words(const std::vector<uint32_t> &values) : size_(values.size()) {
#ifdef SK_EMULATE
        // Rows of 16 bytes are copied from here.
        data_ = static_cast<uint32_t *>(::operator new(size_ * 4, std::align_val_t(128)));
        std::memcpy(data_, values.data(), size_ * 4);
#else
        check_call(cudaMalloc(reinterpret_cast<void **>(&data_), size_ * 4), "dump", "cudaMalloc");
        check_call(cudaMemcpy(data_, values.data(), size_ * 4, cudaMemcpyHostToDevice), "dump", "cudaMemcpy");
#endif
    }
    explicit Words(size_t size) : Words(std::vector<uint32_t>(size, 0xdeadbeefu)) {}
    Words(const Words &) = delete;
    Words &operator=(const Words &) = delete;
    ~Words() {
#ifdef SK_EMULATE
        ::operator delete(data_, std::align_val_t(128));
#else
        cudaFree(data_);
#endif
    }
    uint32_t *data() const { return data_; }
    std::vector<uint32_t> read() const {
        std::vector<uint32_t> values(size_);
#ifdef SK_EMULATE
        std::memcpy(values.data(), data_, size_ * 4);
#else
        check_call(cudaMemcpy(values.data(), data_, size_ * 4, cudaMemcpyDeviceToHost), "dump", "kernel or cudaMemcpy");
#endif
        return values;
    }

private:
    size_t size_;
    uint32_t *data_ = nullptr;
};

struct Args {
    const uint32_t *in;
    uint32_t *out;
    int count;
};

SK_DEVICE uint32_t bits(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
}
SK_DEVICE float number(uint32_t word) {
    float value;
    memcpy(&value, &word, 4);
    return value;
}

// in: 32 rows of 4 words. Lane l names row (5 l + 3) % 32 of rows that lie 48 bytes apart.
template <bool transposed> SK_KERNEL(32, 1) load_matrix(SK_ARGS(Args) args) {
    const int lane = lane_id();
    for (int i = 0; i < 4; ++i) store_shared(shared_memory() + lane * 48 + i * 4, load_global(args.in + lane * 4 + i));
    warp_barrier();
    uint32_t to[4];
    const Shared row = shared_memory() + (lane * 5 + 3) % 32 * 48;
    if (transposed) {
        ldmatrix_x4_trans(to, row);
    } else {
        ldmatrix_x4(to, row);
    }
    for (int i = 0; i < 4; ++i) store_global(args.out + lane * 4 + i, to[i]);
}

// As load_matrix<true>, once not wanted and once wanted; 8 words per lane.
static SK_KERNEL(32, 1) load_matrix_if(SK_ARGS(Args) args) {
    const int lane = lane_id();
    for (int i = 0; i < 4; ++i) store_shared(shared_memory() + lane * 48 + i * 4, load_global(args.in + lane * 4 + i));
    warp_barrier();
    const Shared row = shared_memory() + (lane * 5 + 3) % 32 * 48;
    for (int wanted = 0; wanted < 2; ++wanted) {
        uint32_t to[4] = {1, 2, 3, 4};
        ldmatrix_x4_trans_if(ballot(lane == 0) == static_cast<uint32_t>(wanted), to, row);
        for (int i = 0; i < 4; ++i) store_global(args.out + lane * 8 + wanted * 4 + i, to[i]);
    }
}

// in: per lane 4 words of a, 2 of b, 4 of c; out: per lane 4 of c.
template <class E> SK_KERNEL(32, 1) multiply(SK_ARGS(Args) args) {
    uint32_t in[10];
    for (int i = 0; i < 10; ++i) in[i] = load_global(args.in + lane_id() * 10 + i);
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float c[4] = {number(in[6]), number(in[7]), number(in[8]), number(in[9])};
    mma<E>(c, a, in[4], in[5]);
    for (int i = 0; i < 4; ++i) store_global(args.out + lane_id() * 4 + i, bits(c[i]));
}

// Lane l < 17 copies l bytes onto 16 of 0xee; two groups in flight, the odd lanes in the second.
static SK_KERNEL(32, 1) copy(SK_ARGS(Args) args) {
    const int lane = lane_id();
    const Shared to = shared_memory() + lane * 16;
    store_shared(to, Words4{0xeeeeeeeeu, 0xeeeeeeeeu, 0xeeeeeeeeu, 0xeeeeeeeeu});
    warp_barrier();
    if (lane < 17 && lane % 2 == 0) cp_async_16(to, args.in + lane * 4, lane);
    cp_async_commit();
    if (lane < 17 && lane % 2 == 1) cp_async_16(to, args.in + lane * 4, lane);
    cp_async_commit();
    cp_async_wait<1>();
    warp_barrier();
    const int other = lane ^ 2;
    Words4 first{0, 0, 0, 0};
    if (other % 2 == 0) first = load_shared<Words4>(shared_memory() + other * 16);
    cp_async_wait<0>();
    warp_barrier();
    if (other % 2 == 1) first = load_shared<Words4>(shared_memory() + other * 16);
    store_global(reinterpret_cast<Words4 *>(args.out) + other, first);
}

// Per lane 12 words.
static SK_KERNEL(32, 1) exchange(SK_ARGS(Args) args) {
    const int lane = lane_id();
    uint32_t *out = args.out + lane * 12;
    store_global(out + 0, static_cast<uint32_t>(shuffle(lane * 3 + 1, (lane * 5 + 3) % 32)));
    store_global(out + 1, bits(shuffle(static_cast<float>(lane) * 0.5f, 31 - lane)));
    store_global(out + 2, shuffle(static_cast<uint32_t>(lane) * 7u, 9));
    for (int i = 0; i < 5; ++i) store_global(out + 3 + i, static_cast<uint32_t>(shuffle_xor(lane * 11 + 2, 1 << i)));
    const uint32_t mask = ballot(lane * 7 % 3 == 0);
    store_global(out + 8, mask);
    store_global(out + 9, ballot(lane == 31) | ballot(lane == 0));
    store_global(out + 10, static_cast<uint32_t>(bit_count(mask >> lane)));
    store_global(out + 11, static_cast<uint32_t>(first_bit((mask | 0x80000000u) >> lane)));
}

// Accesses of 2, 4, 8 and 16 bytes: each lane stores 32 bytes, piece by piece, and another loads them as words.
static SK_KERNEL(32, 1) access(SK_ARGS(Args) args) {
    const int lane = lane_id();
    const Shared to = shared_memory() + lane * 32;
    store_shared(to, static_cast<uint16_t>(0x0100 + lane));
    store_shared(to + 2, static_cast<uint16_t>(0x0200 + lane));
    store_shared(to + 4, 0x03000000u + lane);
    store_shared(to + 8, Words2{0x04000000u + lane, 0x05000000u + lane});
    store_shared(to + 16, Words4{0x06000000u + lane, 0x07000000u + lane, 0x08000000u + lane, 0x09000000u + lane});
    warp_barrier();
    const Shared from = shared_memory() + (31 - lane) * 32;
    const Words4 wide = load_shared<Words4>(from);
    const Words2 half = load_shared<Words2>(from + 16);
    uint32_t *out = args.out + lane * 8;
    store_global(reinterpret_cast<Words4 *>(out), wide);
    store_global(reinterpret_cast<Words2 *>(out + 4), half);
    store_global(out + 6, load_shared<uint32_t>(from + 24));
    store_global(reinterpret_cast<uint16_t *>(out + 7), load_shared<uint16_t>(from + 28));
    store_global(reinterpret_cast<uint16_t *>(out + 7) + 1, load_shared<uint16_t>(from + 30));
}

// Blocks of 96 threads: who each is, and a word from another warp's thread.
static SK_KERNEL(96, 1) places(SK_ARGS(Args) args) {
    const int thread = thread_id(), threads = thread_count();
    store_shared(shared_memory() + thread * 4, static_cast<uint32_t>(thread * 2 + 1));
    barrier();
    const uint32_t other = load_shared<uint32_t>(shared_memory() + (thread + 40) % threads * 4);
    const int block = (block_z() * 2 + block_y()) * 3 + block_x();
    uint32_t *out = args.out + (block * threads + thread) * 2;
    store_global(out, static_cast<uint32_t>(warp_id() * 1000000 + lane_id() * 10000 + threads));
    store_global(out + 1, other);
}

// in: fp32 numbers; out: per number the bf16 pair, the fp16 pair (each with its negative), the operand of tf32.
static SK_KERNEL(32, 1) narrow(SK_ARGS(Args) args) {
    for (int i = thread_id(); i < args.count; i += thread_count()) {
        const float value = number(load_global(args.in + i));
        store_global(args.out + i * 3, pack<Bf16>(value, -value));
        store_global(args.out + i * 3 + 1, pack<Fp16>(value, -value));
        store_global(args.out + i * 3 + 2, round_operand<Tf32>(load_global(args.in + i)) & 0xffffe000u);
    }
}
// in: 16-bit numbers; out: as bf16 and as fp16, in fp32.
static SK_KERNEL(32, 1) widen_both(SK_ARGS(Args) args) {
    for (int i = thread_id(); i < args.count; i += thread_count()) {
        store_global(args.out + i * 2, bits(widen<Bf16>(static_cast<uint16_t>(load_global(args.in + i)))));
        store_global(args.out + i * 2 + 1, bits(widen<Fp16>(static_cast<uint16_t>(load_global(args.in + i)))));
    }
}

inline std::vector<uint32_t> run(void (*kernel)(Args), const Grid &grid, int threads, int64_t shared_bytes,
                                 const std::vector<uint32_t> &in, size_t out) {
    const Words input(in.empty() ? std::vector<uint32_t>(1) : in), output(out);
    launch("primitives", kernel, grid, threads, shared_bytes, Stream{0, nullptr},
           Args{input.data(), output.data(), static_cast<int>(in.size())});
    return output.read();
}
inline std::vector<uint32_t> run(void (*kernel)(Args), const std::vector<uint32_t> &in, size_t out) {
    return run(kernel, Grid{1, 1, 1}, 32, 2048, in, out);
}

inline uint32_t hash(uint32_t i) {
    i = (i ^ 61) * 9u;
    i = (i ^ (i >> 4)) * 0x27d4eb2du;
    return i ^ (i >> 15);
}
// Integers from -8 to 8 in the formats' bits, exact in each.
inline uint32_t small_bf16(uint32_t i) {
    const float value = static_cast<float>(static_cast<int>(hash(i) % 17) - 8);
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return word >> 16;
}
inline uint32_t small_fp16(uint32_t i) {
    const int value = static_cast<int>(hash(i) % 17) - 8;
    static const uint32_t magnitudes[9] = {0, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700, 0x4800};
    return magnitudes[value < 0 ? -value : value] | (value < 0 ? 0x8000u : 0u);
}

// Per lane a, b, c of mma: pairs of 16 bits or words from `element`, c small integers.
template <class Element> std::vector<uint32_t> operands(bool pairs, uint32_t seed, Element element) {
    std::vector<uint32_t> in;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        for (uint32_t i = 0; i < 10; ++i) {
            const uint32_t at = (seed * 32 + lane) * 20 + i * 2;
            if (i >= 6) {
                in.push_back(small_bf16(at + 7777) << 16);
            } else {
                in.push_back(pairs ? element(at) | element(at + 1) << 16 : element(at));
            }
        }
    }
    return in;
}

inline std::vector<uint32_t> fp32_edges() {
    std::vector<uint32_t> values = {
        0x00000000, 0x00000001, 0x00000fff, 0x00001000, 0x00001001, 0x00003000, 0x007fffff, 0x00800000,  // subnormal
        0x33000000, 0x33000001, 0x33800000, 0x33c00000, 0x387fc000, 0x387fe000, 0x387ff000, 0x38800000,  // fp16's least
        0x3f800000, 0x3f801000, 0x3f803000, 0x3f800fff, 0x3f801001, 0x3f808000, 0x3f818000, 0x3f807fff, 0x3f808001,
        0x3f802000, 0x3f7ff000, 0x3f7fffff, 0x477fdfff, 0x477fe000, 0x477fefff, 0x477ff000, 0x47800000,  // and largest
        0x7f7f0000, 0x7f7f7fff, 0x7f7f8000, 0x7f7fefff, 0x7f7ff000, 0x7f7fffff, 0x7f800000, 0x7fc00000, 0x7fffffff};
    for (uint32_t i = 0; i < 22; ++i) values.push_back((hash(i + 100) & 0x87ffffffu) | 0x38000000u);
    const size_t positive = values.size();
    for (size_t i = 0; i < positive; i += 3) values.push_back(values[i] | 0x80000000u);
    return values;
}

inline void print_list(std::string &to, const char *name, const std::vector<uint32_t> &words, bool last = false) {
    to += std::string("  \"") + name + "\": [";
    for (size_t i = 0; i < words.size(); ++i) {
        if (i > 0) to += i % 16 == 0 ? ",\n    " : ", ";
        if (i == 0 && words.size() > 16) to += "\n    ";
        to += std::to_string(words[i]);
    }
    to += last ? "]\n" : "],\n";
}

inline std::string json(const std::string &source, const std::string &note) {
    std::string text = "{\n  \"source\": \"" + source + "\",\n  \"note\": \"" + note + "\",\n";
    std::vector<uint32_t> rows;
    for (uint32_t i = 0; i < 128; ++i) rows.push_back((i * 2 + 1) << 16 | i * 2);
    print_list(text, "words_ldmatrix_x4", run(load_matrix<false>, rows, 128));
    print_list(text, "words_ldmatrix_x4_trans", run(load_matrix<true>, rows, 128));
    print_list(text, "words_ldmatrix_x4_trans_if", run(load_matrix_if, rows, 256));

    print_list(text, "float_mma_bf16", run(multiply<Bf16>, operands(true, 1, small_bf16), 128));
    print_list(text, "float_mma_fp16", run(multiply<Fp16>, operands(true, 2, small_fp16), 128));
    const auto small_tf32 = [](uint32_t i) { return small_bf16(i) << 16; };
    print_list(text, "float_mma_tf32", run(multiply<Tf32>, operands(false, 3, small_tf32), 128));
    // Operands that nobody rounded: the low 13 bits are expected to count for nothing.
    const auto unrounded = [](uint32_t i) { return small_bf16(i) << 16 | 0x1fff; };
    print_list(text, "float_mma_tf32_unrounded", run(multiply<Tf32>, operands(false, 4, unrounded), 128));
    const auto fraction_bf16 = [](uint32_t i) { return (hash(i) & 0x80ffu) | 0x3f00u; };
    const auto fraction_fp16 = [](uint32_t i) { return (hash(i) & 0x87ffu) | 0x3800u; };
    const auto fraction_tf32 = [](uint32_t i) { return (hash(i) & 0x80ffe000u) | 0x3f000000u; };
    print_list(text, "near_mma_bf16", run(multiply<Bf16>, operands(true, 5, fraction_bf16), 128));
    print_list(text, "near_mma_fp16", run(multiply<Fp16>, operands(true, 6, fraction_fp16), 128));
    print_list(text, "near_mma_tf32", run(multiply<Tf32>, operands(false, 7, fraction_tf32), 128));
    std::vector<uint32_t> special = operands(true, 8, small_bf16);
    special[0] = 0x7f803f80;       // lane 0: an infinity in row 0 of a
    special[10 * 4] = 0x7fc03f80;  // lane 4: a NaN in row 1
    special[10 * 8 + 6] = 0xff800000u;
    print_list(text, "float_mma_bf16_special", run(multiply<Bf16>, special, 128));

    std::vector<uint32_t> bytes;
    for (uint32_t i = 0; i < 17 * 4; ++i) bytes.push_back(0x04030201u + i * 0x04040404u);
    print_list(text, "words_cp_async_16", run(copy, bytes, 128));
    print_list(text, "words_exchange", run(exchange, {}, 32 * 12));
    print_list(text, "words_access", run(access, {}, 256));
    print_list(text, "words_places", run(places, Grid{3, 2, 1}, 96, 96 * 4, {}, 6 * 96 * 2));

    const std::vector<uint32_t> edges = fp32_edges();
    const std::vector<uint32_t> narrowed = run(narrow, edges, edges.size() * 3);
    std::vector<uint32_t> kinds[3];
    for (size_t i = 0; i < narrowed.size(); ++i) kinds[i % 3].push_back(narrowed[i]);
    print_list(text, "pairs_pack_bf16", kinds[0]);
    print_list(text, "pairs_pack_fp16", kinds[1]);
    print_list(text, "float_round_operand_tf32", kinds[2]);
    std::vector<uint32_t> halves = {0x0000, 0x0001, 0x03ff, 0x0400, 0x3c00, 0x3f80, 0x7bff, 0x7c00, 0x7e00, 0x7f7f,
                                    0x7f80, 0x7fc0, 0x8000, 0x8001, 0xfbff, 0xfc00, 0xff80, 0x007f, 0x0080, 0x1234};
    for (uint32_t i = 0; i < 20; ++i) halves.push_back(hash(i + 500) & 0xffffu);
    print_list(text, "float_widen", run(widen_both, halves, halves.size() * 2), true);
    return text + "}\n";
}

}  // namespace dump
}  // namespace cuda
}  // namespace sparsekern
