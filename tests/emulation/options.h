// SPDX-License-Identifier: Apache-2.0
// What tests set before a launch and look at after it.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace sktest {
namespace emulation {

// Which of the threads (and blocks) that could go on does. A thread runs until it waits for others.
enum class Schedule { forward, reverse, random };
// When an asynchronous copy is performed: where it is issued, where it is waited for, or somewhere between.
enum class Copies { early, late, random };

struct Options {
    Schedule schedule = Schedule::forward;
    uint64_t seed = 1;
    Copies copies = Copies::late;
    int64_t shared_limit = 227 * 1024;  // bytes a block may have: the most of sm_90 and sm_100; 163 KB on sm_80
    bool races = true;
    bool bank_conflicts = true;
    int64_t stack_bytes = 256 * 1024;  // of threads that are created from now on
};

// Sums since the last reset; degrees are the worst seen.
struct Statistics {
    int64_t launches = 0, blocks = 0;
    int64_t arrivals = 0;         // of threads at collectives and barriers
    int64_t unwritten_reads = 0;  // shared memory read that the block has not written (it holds NaN)
    int ldmatrix_conflict = 1;    // 1: no bank conflict; n: n accesses one after another
    int load_conflict = 1, store_conflict = 1;
    std::string ldmatrix_place, load_place, store_place;  // where the worst were seen
};

inline Options &options() {
    static Options value;
    return value;
}
inline Statistics &statistics() {
    static Statistics value;
    return value;
}
// What went wrong, the first 20 of different kind or place; tests fail where it is not empty.
inline std::vector<std::string> &problems() {
    static std::vector<std::string> value;
    return value;
}
inline std::set<std::string> &reported() {
    static std::set<std::string> value;
    return value;
}

// `key` names kind and place: the second problem with the same key is dropped.
inline void report(const std::string &key, const std::string &text) {
    if (problems().size() < 20 && reported().insert(key).second) problems().push_back(text);
}

// Forgets problems and statistics; options stay.
inline void reset() {
    problems().clear();
    reported().clear();
    statistics() = Statistics();
}

struct Random {
    uint64_t state = 1;
    uint32_t next() {
        state += 0x9e3779b97f4a7c15u;
        uint64_t z = state;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
    }
};

// Where a primitive was called, by default arguments.
struct Site {
    const char *file;
    int line;

    std::string name() const {
        const std::string path = file;
        const size_t slash = path.rfind('/');
        return (slash == std::string::npos ? path : path.substr(slash + 1)) + ":" + std::to_string(line);
    }
};

}  // namespace emulation
}  // namespace sktest
