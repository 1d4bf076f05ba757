// SPDX-License-Identifier: Apache-2.0
// Everything that kernels ask of the hardware, and the only file with PTX. Kernels are written against these names
// alone, so that the same source also builds as a host emulation (SK_EMULATE, tests/emulation), where a block's threads
// are fibers. What a name promises is in docs/kernels.md and, for the maps of fragments, in the PTX manual
// (mma.m16n8k16, mma.m16n8k8, ldmatrix).
//
// Collectives (barrier, warp_barrier, ballot, shuffle, ldmatrix, mma) are for all threads of the block or warp: kernels
// branch on values that are equal over the warp around them.
#pragma once

#include <cstdint>

#ifdef SK_EMULATE
#include "emulated_primitives.h"
#else

#define SK_DEVICE __device__ __forceinline__
// Kernels take one struct of arguments by value: `template <class T> SK_KERNEL(256, 1) name(SK_ARGS(Args) args)`.
#define SK_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SK_ARGS(type) const __grid_constant__ type
#define SK_UNROLL _Pragma("unroll")
#define SK_NO_UNROLL _Pragma("unroll 1")

namespace sparsekern {
namespace cuda {

// Byte address within the block's shared memory.
using Shared = uint32_t;

struct alignas(8) Words2 {
    uint32_t x, y;
};
struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};

// -- who is asking --

SK_DEVICE int thread_id() {
    return static_cast<int>(threadIdx.x);
}
SK_DEVICE int lane_id() {
    return static_cast<int>(threadIdx.x & 31);
}
// The shuffle tells the compiler that the value is equal over the warp.
SK_DEVICE int warp_id() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x >> 5), 0);
}
SK_DEVICE int thread_count() {
    return static_cast<int>(blockDim.x);
}
SK_DEVICE int block_x() {
    return static_cast<int>(blockIdx.x);
}
SK_DEVICE int block_y() {
    return static_cast<int>(blockIdx.y);
}
SK_DEVICE int block_z() {
    return static_cast<int>(blockIdx.z);
}

// The same value in a register of its own: the compiler does not compute it again at each use, as it likes to do inside
// loops. T of 4 or 8 bytes.
template <class T> SK_DEVICE T keep(T value) {
    if constexpr (sizeof(T) == 8) {
        asm volatile("" : "+l"(value));
    } else {
        asm volatile("" : "+r"(value));
    }
    return value;
}

// -- shared memory --

// Start of the block's dynamic shared memory, aligned to 128 bytes. Kernels use no other.
SK_DEVICE Shared shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return static_cast<Shared>(__cvta_generic_to_shared(bytes));
}

// T of 2, 4, 8 or 16 bytes, `address` aligned to its size.
template <class T> SK_DEVICE T load_shared(Shared address) {
    return *static_cast<const T *>(__cvta_shared_to_generic(address));
}
template <class T> SK_DEVICE void store_shared(Shared address, const T &value) {
    *static_cast<T *>(__cvta_shared_to_generic(address)) = value;
}

// -- global memory --

// Data that no thread writes during the kernel; T of 2, 4, 8 or 16 bytes.
template <class T> SK_DEVICE T load_global(const T *address) {
    return *address;
}
SK_DEVICE int32_t load_global(const int32_t *address) {
    return __ldg(address);
}
template <class T> SK_DEVICE void store_global(T *address, const T &value) {
    *address = value;
}

// -- asynchronous copies: visible to this thread after cp_async_wait, to others after a barrier that follows it --

// 16 bytes, of which the first `bytes` (0..16) are read from `source` and the rest are zeros; both ends aligned to 16.
// `source` must be a valid address even where bytes is 0.
SK_DEVICE void cp_async_16(Shared to, const void *source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(bytes) : "memory");
}
SK_DEVICE void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most `Pending` of this thread's committed groups are under way.
template <int Pending> SK_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// -- barriers and exchange --

SK_DEVICE void barrier() {
    __syncthreads();
}
SK_DEVICE void warp_barrier() {
    __syncwarp();
}
SK_DEVICE uint32_t ballot(bool vote) {
    return __ballot_sync(0xffffffffu, vote);
}
template <class T> SK_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <class T> SK_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
SK_DEVICE int bit_count(uint32_t mask) {
    return __popc(mask);
}
// Lowest set bit; mask is not 0.
SK_DEVICE int first_bit(uint32_t mask) {
    return __ffs(static_cast<int>(mask)) - 1;
}

// -- fragments --

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8, 16 bytes, aligned.
SK_DEVICE void ldmatrix_x4(uint32_t (&to)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}
SK_DEVICE void ldmatrix_x4_trans(uint32_t (&to)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// The same where `wanted`, which is equal over the warp; else `to` stays. No branch, across which the compiler would
// move no instructions.
SK_DEVICE void ldmatrix_x4_trans_if(bool wanted, uint32_t (&to)[4], Shared row) {
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %5, 0;\n"
                 "@wanted ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3])
                 : "r"(row), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

// Element types: how they lie in memory, and the depth of one multiply instruction.
struct Bf16 {
    using Storage = uint16_t;
    static constexpr int bytes = 2, depth = 16;
};
struct Fp16 {
    using Storage = uint16_t;
    static constexpr int bytes = 2, depth = 16;
};
struct Tf32 {
    using Storage = uint32_t;  // the bits of an fp32 number
    static constexpr int bytes = 4, depth = 8;
};

// c [16, 8] += a [16, depth] b [depth, 8]; a by rows, b by columns, c in fp32. Tf32 operands come from round_operand.
template <class E> SK_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> SK_DEVICE void mma<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> SK_DEVICE void mma<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> SK_DEVICE void mma<Tf32>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An operand register as mma wants it: fp32 to the nearest tf32, ties away from zero; 16-bit pairs as they are.
template <class E> SK_DEVICE uint32_t round_operand(uint32_t bits) {
    return bits;
}
template <> SK_DEVICE uint32_t round_operand<Tf32>(uint32_t bits) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
}

// -- conversions --

// Two results as stored neighbours, rounded to nearest even; `low` comes first in memory.
template <class E> SK_DEVICE uint32_t pack(float low, float high);
template <> SK_DEVICE uint32_t pack<Bf16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <> SK_DEVICE uint32_t pack<Fp16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// One stored element as fp32.
template <class E> SK_DEVICE float widen(typename E::Storage element);
template <> SK_DEVICE float widen<Bf16>(uint16_t element) {
    return __uint_as_float(static_cast<uint32_t>(element) << 16);
}
template <> SK_DEVICE float widen<Fp16>(uint16_t element) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(element));
    return wide;
}
template <> SK_DEVICE float widen<Tf32>(uint32_t element) {
    return __uint_as_float(element);
}

}  // namespace cuda
}  // namespace sparsekern
#endif
