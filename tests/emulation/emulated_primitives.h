// SPDX-License-Identifier: Apache-2.0
// The names of csrc/cuda/primitives.cuh on the host: fibers for threads, checked shared memory, collectives that check
// that all lanes are at the same call. tests/emulation/options.h has what tests can set and ask.
#pragma once

#include <type_traits>

#include "fragments.h"
#include "machine.h"

#define SK_DEVICE inline
#define SK_KERNEL(threads, blocks) void
#define SK_ARGS(type) const type
#define SK_UNROLL
#define SK_NO_UNROLL

// Where the kernel calls from: the last parameters of every primitive that can fail.
#define SKTEST_SITE int site_line = __builtin_LINE(), const char *site_file = __builtin_FILE()
#define SKTEST_HERE                                                                                                    \
    sktest::emulation::Site {                                                                                          \
        site_file, site_line                                                                                           \
    }

namespace sktest {
namespace emulation {

template <class T> constexpr bool is_word() {
    return (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16) &&
           std::is_trivially_copyable<T>::value;
}

template <class T> struct Exchange {
    T value, received;
    int from;
};
template <class T> T exchange(Collective kind, T value, int from, Site site) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                  "a shuffle is of a number of 4 or 8 bytes");
    Exchange<T> own{value, T(), from & 31};
    machine.collective(kind, site, &own, [](Machine &, int, Operands &lanes, Site) {
        for (void *lane : lanes) {
            Exchange<T> &to = *static_cast<Exchange<T> *>(lane);
            to.received = static_cast<Exchange<T> *>(lanes[to.from])->value;
        }
    });
    return own.received;
}
}  // namespace emulation
}  // namespace sktest

namespace sparsekern {
namespace cuda {

namespace emulation = sktest::emulation;

using Shared = uint32_t;

struct alignas(8) Words2 {
    uint32_t x, y;
};
struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};

SK_DEVICE int thread_id() {
    return emulation::machine.thread();
}
SK_DEVICE int lane_id() {
    return emulation::machine.thread() & 31;
}
SK_DEVICE int warp_id() {
    return emulation::machine.thread() >> 5;
}
SK_DEVICE int thread_count() {
    return emulation::machine.threads();
}
SK_DEVICE int block_x() {
    return static_cast<int>(emulation::machine.block[0]);
}
SK_DEVICE int block_y() {
    return static_cast<int>(emulation::machine.block[1]);
}
SK_DEVICE int block_z() {
    return static_cast<int>(emulation::machine.block[2]);
}

template <class T> SK_DEVICE T keep(T value) {
    return value;
}

SK_DEVICE Shared shared_memory() {
    return emulation::SharedMemory::base;
}

// Out of bounds: a NaN pattern is read, nothing is written.
template <class T> SK_DEVICE T load_shared(Shared address, SKTEST_SITE) {
    static_assert(emulation::is_word<T>(), "a load is of 2, 4, 8 or 16 bytes");
    emulation::Machine &on = emulation::machine;
    T value;
    std::memset(static_cast<void *>(&value), 0xff, sizeof(T));
    const unsigned char *from = on.memory.at(address, sizeof(T), on.thread(), emulation::Access::load, SKTEST_HERE);
    if (from == nullptr) return value;
    on.conflicts.note(on.thread(), address, sizeof(T), false, SKTEST_HERE);
    on.memory.read(address, sizeof(T), on.thread(), emulation::Access::load, SKTEST_HERE);
    std::memcpy(static_cast<void *>(&value), from, sizeof(T));
    return value;
}
template <class T> SK_DEVICE void store_shared(Shared address, const T &value, SKTEST_SITE) {
    static_assert(emulation::is_word<T>(), "a store is of 2, 4, 8 or 16 bytes");
    emulation::Machine &on = emulation::machine;
    unsigned char *to = on.memory.at(address, sizeof(T), on.thread(), emulation::Access::store, SKTEST_HERE);
    if (to == nullptr) return;
    on.conflicts.note(on.thread(), address, sizeof(T), true, SKTEST_HERE);
    on.memory.write(address, sizeof(T), on.thread(), emulation::Access::store, SKTEST_HERE);
    std::memcpy(to, &value, sizeof(T));
}

template <class T> SK_DEVICE T load_global(const T *address, SKTEST_SITE) {
    static_assert(emulation::is_word<T>(), "a load is of 2, 4, 8 or 16 bytes");
    emulation::Machine &on = emulation::machine;
    T value;
    std::memset(static_cast<void *>(&value), 0xff, sizeof(T));
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (!on.global.aligned(at, sizeof(T), "load_global", on.memory, on.thread(), SKTEST_HERE)) return value;
    on.global.check_read(at, sizeof(T), on.memory, on.thread(), SKTEST_HERE);
    return *address;
}
template <class T> SK_DEVICE void store_global(T *address, const T &value, SKTEST_SITE) {
    static_assert(emulation::is_word<T>(), "a store is of 2, 4, 8 or 16 bytes");
    emulation::Machine &on = emulation::machine;
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (!on.global.aligned(at, sizeof(T), "store_global", on.memory, on.thread(), SKTEST_HERE)) return;
    on.global.write(at, sizeof(T), on.global_thread(), on.memory, on.thread(), SKTEST_HERE);
    *address = value;
}

SK_DEVICE void cp_async_16(Shared to, const void *source, int bytes, SKTEST_SITE) {
    emulation::machine.copy_issue(to, source, bytes, SKTEST_HERE);
}
SK_DEVICE void cp_async_commit() {
    emulation::machine.copy_commit();
}
template <int Pending> SK_DEVICE void cp_async_wait() {
    static_assert(Pending >= 0, "groups that may be under way");
    emulation::machine.copy_wait(Pending);
}

SK_DEVICE void barrier(SKTEST_SITE) {
    emulation::machine.barrier(SKTEST_HERE);
}
SK_DEVICE void warp_barrier(SKTEST_SITE) {
    emulation::machine.collective(
        emulation::Collective::warp_barrier, SKTEST_HERE, nullptr,
        [](emulation::Machine &on, int warp, emulation::Operands &, emulation::Site) { on.memory.order_warp(warp); });
}
SK_DEVICE uint32_t ballot(bool vote, SKTEST_SITE) {
    uint32_t exchanged = vote;
    emulation::machine.collective(emulation::Collective::ballot, SKTEST_HERE, &exchanged,
                                  [](emulation::Machine &, int, emulation::Operands &lanes, emulation::Site) {
                                      uint32_t mask = 0;
                                      for (int l = 0; l < 32; ++l) mask |= *static_cast<uint32_t *>(lanes[l]) << l;
                                      for (int l = 0; l < 32; ++l) *static_cast<uint32_t *>(lanes[l]) = mask;
                                  });
    return exchanged;
}

template <class T> SK_DEVICE T shuffle(T value, int lane, SKTEST_SITE) {
    return emulation::exchange(emulation::Collective::shuffle, value, lane, SKTEST_HERE);
}
template <class T> SK_DEVICE T shuffle_xor(T value, int mask, SKTEST_SITE) {
    return emulation::exchange(emulation::Collective::shuffle_xor, value, lane_id() ^ mask, SKTEST_HERE);
}
SK_DEVICE int bit_count(uint32_t mask) {
    return __builtin_popcount(mask);
}
SK_DEVICE int first_bit(uint32_t mask) {
    return __builtin_ctz(mask);
}

SK_DEVICE void ldmatrix_x4(uint32_t (&to)[4], Shared row, SKTEST_SITE) {
    emulation::LoadedMatrices own{row, to};
    emulation::machine.collective(emulation::Collective::ldmatrix, SKTEST_HERE, &own, emulation::load_matrices<false>);
}
SK_DEVICE void ldmatrix_x4_trans(uint32_t (&to)[4], Shared row, SKTEST_SITE) {
    emulation::LoadedMatrices own{row, to};
    emulation::machine.collective(emulation::Collective::ldmatrix_trans, SKTEST_HERE, &own,
                                  emulation::load_matrices<true>);
}
SK_DEVICE void ldmatrix_x4_trans_if(bool wanted, uint32_t (&to)[4], Shared row, SKTEST_SITE) {
    if (wanted) ldmatrix_x4_trans(to, row, site_line, site_file);
}

struct Bf16 {
    using Storage = uint16_t;
    static constexpr int bytes = 2, depth = 16;
    static constexpr emulation::Collective multiply = emulation::Collective::mma_bf16;
};
struct Fp16 {
    using Storage = uint16_t;
    static constexpr int bytes = 2, depth = 16;
    static constexpr emulation::Collective multiply = emulation::Collective::mma_fp16;
};
struct Tf32 {
    using Storage = uint32_t;
    static constexpr int bytes = 4, depth = 8;
    static constexpr emulation::Collective multiply = emulation::Collective::mma_tf32;
};

template <class E> SK_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SKTEST_SITE) {
    emulation::Multiplied own{c, a, b0, b1};
    emulation::machine.collective(E::multiply, SKTEST_HERE, &own, emulation::multiply<E::multiply>);
}

template <class E> SK_DEVICE uint32_t round_operand(uint32_t bits) {
    return bits;
}
template <> SK_DEVICE uint32_t round_operand<Tf32>(uint32_t bits) {
    return emulation::tf32_nearest_away(bits);
}

template <class E> SK_DEVICE uint32_t pack(float low, float high);
template <> SK_DEVICE uint32_t pack<Bf16>(float low, float high) {
    return emulation::bf16_nearest_even(low) | static_cast<uint32_t>(emulation::bf16_nearest_even(high)) << 16;
}
template <> SK_DEVICE uint32_t pack<Fp16>(float low, float high) {
    return emulation::fp16_nearest_even(low) | static_cast<uint32_t>(emulation::fp16_nearest_even(high)) << 16;
}

template <class E> SK_DEVICE float widen(typename E::Storage element);
template <> SK_DEVICE float widen<Bf16>(uint16_t element) {
    return emulation::float_of(static_cast<uint32_t>(element) << 16);
}
template <> SK_DEVICE float widen<Fp16>(uint16_t element) {
    return emulation::fp16_widened(element);
}
template <> SK_DEVICE float widen<Tf32>(uint32_t element) {
    return emulation::float_of(element);
}

}  // namespace cuda
}  // namespace sparsekern
