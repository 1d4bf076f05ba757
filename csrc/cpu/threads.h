// SPDX-License-Identifier: Apache-2.0
// One parallel region per operator call. With one thread the OpenMP pool is never touched, so a forked child (a data
// loader's worker) can run every kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparsekern {
namespace SK_ISA {

struct Team {
    int rank, size;

    void barrier() const {
#ifdef _OPENMP
        if (size > 1) {
#pragma omp barrier
        }
#endif
    }
};

// Runs body(const Team &) on every thread of a team of at most `threads`. The body must not throw, and must take its
// share from team.size, which OpenMP may make smaller.
template <class Body> static void parallel(int threads, const Body &body) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(Team{omp_get_thread_num(), omp_get_num_threads()});
        return;
    }
#endif
    (void)threads;
    body(Team{0, 1});
}

// Hands out 0, 1, 2, ... to the threads of a team.
struct Counter {
    int64_t next = 0;

    int64_t take() { return __atomic_fetch_add(&next, int64_t{1}, __ATOMIC_RELAXED); }
};

// Uninitialised memory, aligned to cache lines. Taken before the parallel region, where an exception may leave.
template <class T> class Scratch {
public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T *>(::operator new((count > 0 ? count : 1) * sizeof(T), std::align_val_t(64)))) {}
    ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    T *get() const { return data_; }
    T &operator[](int64_t i) const { return data_[i]; }

private:
    T *data_;
};

// Threads worth starting for `work` multiply-adds: a region costs a few microseconds, so each thread gets at least
// as much as takes that long.
static inline int useful_threads(int threads, int64_t work) {
    const int64_t limit = work / 200000 + 1;
    return threads < limit ? threads : static_cast<int>(limit);
}

static inline int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
static inline int64_t round_up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}

}  // namespace SK_ISA
}  // namespace sparsekern
