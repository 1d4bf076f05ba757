// SPDX-License-Identifier: Apache-2.0
// What tests set before a launch and look at after it.
#pragma once

#include <cstdint>
#include <cstring>
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
    bool global_stores = true;         // stores of two threads to the same place, loads of what the launch stores
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
    // Loads and stores of a whole warp that were judged. Those between two collectives are where all lanes make the
    // same ones in the same order, and not too many.
    int64_t judged_accesses = 0;
};

inline Options current_options;
inline Statistics current_statistics;
inline Options &options() {
    return current_options;
}
inline Statistics &statistics() {
    return current_statistics;
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

    bool operator==(const Site &other) const {
        return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
    }
    std::string name() const {
        const std::string path = file;
        const size_t slash = path.rfind('/');
        return (slash == std::string::npos ? path : path.substr(slash + 1)) + ":" + std::to_string(line);
    }
};

// Places of calls as small numbers.
class Sites {
public:
    uint16_t number(Site site) {
        const uintptr_t hash = reinterpret_cast<uintptr_t>(site.file) / 8 + static_cast<uintptr_t>(site.line) * 7;
        Entry &entry = recent_[hash % 1024];
        if (entry.site.file != site.file || entry.site.line != site.line) entry = Entry{site, find(site)};
        return entry.number;
    }
    std::string name(uint16_t number) const { return sites_[number].name(); }

private:
    struct Entry {
        Site site{nullptr, 0};
        uint16_t number = 0;
    };
    uint16_t find(Site site) {
        for (size_t i = 0; i < sites_.size(); ++i) {
            if (sites_[i] == site) return static_cast<uint16_t>(i);
        }
        sites_.push_back(site);
        return static_cast<uint16_t>(sites_.size() - 1);
    }
    std::vector<Site> sites_;
    Entry recent_[1024];
};

}  // namespace emulation
}  // namespace sktest
