// SPDX-License-Identifier: Apache-2.0
// Runs a kernel: the blocks one after another, the threads of a block as fibers that run until they wait for others.
#pragma once

#include <algorithm>
#include <exception>

#include "bank_conflicts.h"
#include "fibers.h"
#include "global_memory.h"
#include "shared_memory.h"

namespace sktest {
namespace emulation {

enum class Collective : uint8_t {
    none,
    barrier,
    warp_barrier,
    ballot,
    shuffle,
    shuffle_xor,
    ldmatrix,
    ldmatrix_trans,
    mma_bf16,
    mma_fp16,
    mma_tf32
};

inline const char *name_of(Collective kind) {
    static const char *const names[] = {"nothing",     "barrier",     "warp_barrier", "ballot",
                                        "shuffle",     "shuffle_xor", "ldmatrix_x4",  "ldmatrix_x4_trans",
                                        "mma of Bf16", "mma of Fp16", "mma of Tf32"};
    return names[static_cast<int>(kind)];
}

// Unwinds the threads of a block that cannot go on.
struct Aborted {};

struct Copy {
    uint32_t to;
    int bytes;
    const unsigned char *source;
    bool performed;
};

// Asynchronous copies of a thread; groups are ends within `copies`.
struct ThreadCopies {
    std::vector<Copy> copies;
    std::vector<size_t> groups;
    size_t first_copy = 0, first_group = 0;
};

class Machine;
using Operands = void *[32];
// What the last lane to arrive does for all.
using Perform = void (*)(Machine &, int warp, Operands &operands, Site site);

class Machine {
public:
    SharedMemory memory;
    GlobalMemory global;
    BankConflicts conflicts;
    int64_t block[3] = {};

    int thread() const { return current_; }
    int threads() const { return threads_; }
    // Of all threads of the launch.
    uint64_t global_thread() const { return block_number_ * 1024 + static_cast<uint64_t>(current_); }

    void launch(const char *name, int64_t x, int64_t y, int64_t z, int threads, int64_t shared_bytes,
                void (*body)(const void *), const void *call) {
        if (threads % 32 != 0 || threads < 32 || threads > 1024) {
            throw std::invalid_argument(std::string(name) + ": expected 32 to 1024 threads, a multiple of 32, got " +
                                        std::to_string(threads));
        }
        if (shared_bytes < 0 || shared_bytes > options().shared_limit) {
            throw std::invalid_argument(std::string(name) + ": expected at most " +
                                        std::to_string(options().shared_limit) + " bytes of shared memory, got " +
                                        std::to_string(shared_bytes) + "; use a smaller tile or fewer stages");
        }
        name_ = name;
        threads_ = threads;
        body_ = body;
        call_ = call;
        random_.state = options().seed;
        ++statistics().launches;
        memory.start_launch(name, shared_bytes);
        global.start_launch();
        for (int t = 0; t < threads; ++t) {
            if (!fibers_[t].created()) fibers_[t].create(static_cast<size_t>(options().stack_bytes), &Machine::enter);
        }
        std::vector<int64_t> order(static_cast<size_t>(x * y * z));
        for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
        if (options().schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
        if (options().schedule == Schedule::random) {
            for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.next() % i]);
        }
        for (const int64_t index : order) {
            block_number_ = static_cast<uint64_t>(index);
            block[0] = index % x;
            block[1] = index / x % y;
            block[2] = index / x / y;
            if (!run_block()) break;
        }
    }

    // All lanes of the warp arrive here with their operands; when the last has, `perform` serves all.
    void collective(Collective kind, Site site, void *operand, Perform perform) {
        const int t = current_, lane = t & 31;
        Warp &warp = warps_[t >> 5];
        ++statistics().arrivals;
        sites_[t] = site;
        kinds_[t] = kind;
        if (warp.returned != 0) fail_returned(t, first(warp.returned) + (t & ~31));
        if (warp.at_barrier != 0) fail_divergent(t, first(warp.at_barrier) + (t & ~31));
        if (warp.arrived != 0) {
            const int other = first(warp.arrived) + (t & ~31);
            if (!same_call(t, other)) fail_divergent(t, other);
        }
        warp.operands[lane] = operand;
        warp.arrived |= 1u << lane;
        if (warp.arrived != 0xffffffffu) {
            wait();
            return;
        }
        conflicts.judge(t >> 5, memory);
        perform(*this, t >> 5, warp.operands, site);
        warp.arrived = 0;
        set_ready_warp(t >> 5, ~(1u << lane));
    }

    void barrier(Site site) {
        const int t = current_;
        Warp &warp = warps_[t >> 5];
        ++statistics().arrivals;
        sites_[t] = site;
        kinds_[t] = Collective::barrier;
        if (returned_ > 0) fail_returned(t, last_returned_);
        if (warp.arrived != 0) fail_divergent(t, first(warp.arrived) + (t & ~31));
        if (at_barrier_ > 0 && !same_call(t, barrier_first_)) fail_divergent(t, barrier_first_);
        if (at_barrier_ == 0) barrier_first_ = t;
        warp.at_barrier |= 1u << (t & 31);
        if (++at_barrier_ < threads_) {
            wait();
            return;
        }
        memory.order_block();
        at_barrier_ = 0;
        for (int w = 0; w < threads_ / 32; ++w) {
            warps_[w].at_barrier = 0;
            conflicts.judge(w, memory);
            set_ready_warp(w, w == t >> 5 ? ~(1u << (t & 31)) : 0xffffffffu);
        }
    }

    void copy_issue(uint32_t to, const void *source, int bytes, Site site) {
        const int t = current_;
        const uintptr_t from = reinterpret_cast<uintptr_t>(source);
        if (source == nullptr || from % 16 != 0 || bytes < 0 || bytes > 16) {
            report("copy source " + site.name(),
                   memory.where(site) + ": cp_async_16 by thread " + std::to_string(t) +
                       ": expected a source that is not null and aligned to 16 and 0 to 16 bytes, got an address of " +
                       std::to_string(from % 16) + " modulo 16 and " + std::to_string(bytes) + " bytes");
            return;
        }
        if (memory.at(to, 16, t, Access::copy, site) == nullptr) return;
        if (bytes > 0) global.check_read(from, static_cast<size_t>(bytes), memory, t, site);
        memory.issue(to, t, site);
        ThreadCopies &own = copies_[t];
        own.copies.push_back(Copy{to, bytes, static_cast<const unsigned char *>(source), false});
        if (options().copies == Copies::early || (options().copies == Copies::random && random_.next() % 4 == 0))
            perform(own.copies.back());
    }
    void copy_commit() {
        ThreadCopies &own = copies_[current_];
        own.groups.push_back(own.copies.size());
        if (options().copies != Copies::random) return;
        for (size_t i = own.first_copy; i < own.copies.size(); ++i) {
            if (random_.next() % 4 == 0) perform(own.copies[i]);
        }
    }
    void copy_wait(int pending) {
        ThreadCopies &own = copies_[current_];
        const size_t keep = static_cast<size_t>(pending);
        if (own.groups.size() - own.first_group <= keep) return;
        own.first_group = own.groups.size() - keep;
        const size_t end = own.groups[own.first_group - 1];
        for (; own.first_copy < end; ++own.first_copy) complete(own.copies[own.first_copy]);
        if (own.first_copy == own.copies.size() && own.first_group == own.groups.size()) {
            own.copies.clear();
            own.groups.clear();
            own.first_copy = own.first_group = 0;
        }
    }

private:
    struct Warp {
        uint32_t arrived = 0, at_barrier = 0, returned = 0;
        Operands operands = {};
    };

    static int first(uint32_t mask) { return __builtin_ctz(mask); }
    bool same_call(int a, int b) const { return kinds_[a] == kinds_[b] && sites_[a] == sites_[b]; }

    void perform(Copy &copy) {
        if (copy.performed) return;
        copy.performed = true;
        unsigned char bytes[16] = {};
        if (copy.bytes > 0) std::memcpy(bytes, copy.source, static_cast<size_t>(copy.bytes));
        std::memcpy(memory.at(copy.to, 16, current_, Access::copy, Site{"", 0}), bytes, 16);
    }
    void complete(Copy &copy) {
        perform(copy);
        memory.complete(copy.to, current_);
    }

    // -- who runs

    void set_ready_warp(int warp, uint32_t lanes) {
        ready_[warp / 2] |= static_cast<uint64_t>(lanes) << (warp % 2 * 32);
    }
    // The thread that runs next, no longer ready; -1 where none is.
    int take_ready() {
        const int words = (threads_ + 63) / 64;
        int word = 0, bit = 0;
        switch (options().schedule) {
        case Schedule::forward:
            while (word < words && ready_[word] == 0) ++word;
            if (word == words) return -1;
            bit = __builtin_ctzll(ready_[word]);
            break;
        case Schedule::reverse:
            word = words - 1;
            while (word >= 0 && ready_[word] == 0) --word;
            if (word < 0) return -1;
            bit = 63 - __builtin_clzll(ready_[word]);
            break;
        case Schedule::random: {
            const uint32_t draw = random_.next();
            int tried = 0;
            word = static_cast<int>(draw >> 8) % words;
            for (; tried < words && ready_[word] == 0; ++tried) word = word + 1 == words ? 0 : word + 1;
            if (tried == words) return -1;
            const int turn = static_cast<int>(draw & 63);
            const uint64_t turned = turn == 0 ? ready_[word] : ready_[word] >> turn | ready_[word] << (64 - turn);
            bit = (__builtin_ctzll(turned) + turn) & 63;
            break;
        }
        }
        ready_[word] &= ~(uint64_t{1} << bit);
        return word * 64 + bit;
    }
    // Goes on with another thread, or with the host where none is ready; returns when this one is chosen again.
    void leave() {
        const int t = current_, next = take_ready();
        if (next == t) return;
        current_ = next;
        (next < 0 ? host_ : fibers_[next]).run(fibers_[t]);
    }
    void wait() {
        leave();
        if (aborting_) throw Aborted();
    }
    bool run_block() {
        ++statistics().blocks;
        memory.start_block("block (" + std::to_string(block[0]) + ", " + std::to_string(block[1]) + ", " +
                           std::to_string(block[2]) + ")");
        for (int w = 0; w < threads_ / 32; ++w) {
            warps_[w] = Warp();
            set_ready_warp(w, 0xffffffffu);
        }
        for (int t = 0; t < threads_; ++t) {
            kinds_[t] = Collective::none;
            conflicts.forget(t);
            copies_[t] = ThreadCopies();
        }
        at_barrier_ = returned_ = 0;
        aborting_ = false;
        resume();
        // Lanes that are not at one call, and threads that return where others wait, have been found out before.
        if (returned_ < threads_) throw std::logic_error("emulation: threads wait and none is missing");
        return !aborting_;
    }
    void resume() {
        current_ = take_ready();
        fibers_[current_].run(host_);
    }
    void abort_block() {
        aborting_ = true;
        for (int t = 0; t < threads_; ++t) {
            if (t != current_ && (warps_[t >> 5].returned >> (t & 31) & 1) == 0) set_ready_warp(t >> 5, 1u << (t & 31));
        }
    }
    static void enter();
    [[noreturn]] void main_of_fiber(int thread) {
        fibers_[thread].arrived();
        for (;;) {
            run_thread();
            leave();
        }
    }
    void run_thread() {
        if (!aborting_) {
            try {
                body_(call_);
                finish_copies();
            } catch (const Aborted &) {
            } catch (const std::exception &error) {
                report("thrown", memory.where(sites_[current_]) + ": thread " + std::to_string(current_) +
                                     " threw: " + error.what());
                abort_block();
            }
        }
        const int t = current_;
        Warp &warp = warps_[t >> 5];
        ++returned_;
        last_returned_ = t;
        warp.returned |= 1u << (t & 31);
        if (aborting_) return;
        int waiting = -1;
        if (at_barrier_ > 0) waiting = barrier_first_;
        if (warp.arrived != 0) waiting = first(warp.arrived) + (t & ~31);
        if (waiting >= 0) {
            report_returned(waiting, t);
            abort_block();
        }
    }
    void finish_copies() {
        ThreadCopies &own = copies_[current_];
        if (own.first_copy == own.copies.size()) return;
        report("copies at the end " + std::string(name_),
               memory.where(sites_[current_]) + ": thread " + std::to_string(current_) + " returned with " +
                   std::to_string(own.copies.size() - own.first_copy) + " cp_async_16 that it never waited for");
        for (; own.first_copy < own.copies.size(); ++own.first_copy) complete(own.copies[own.first_copy]);
    }

    // -- what goes wrong

    std::string at(int t) const {
        return "thread " + std::to_string(t) + " (lane " + std::to_string(t & 31) + " of warp " +
               std::to_string(t >> 5) + ") at " + name_of(kinds_[t]) +
               (kinds_[t] == Collective::none ? "" : " " + sites_[t].name());
    }
    std::string here() const {
        return std::string(name_) + " block (" + std::to_string(block[0]) + ", " + std::to_string(block[1]) + ", " +
               std::to_string(block[2]) + ")";
    }
    [[noreturn]] void fail_divergent(int t, int other) {
        report("divergent " + sites_[t].name() + " " + sites_[other].name(),
               here() + ": divergent collective: " + at(other) + ", " + at(t));
        abort_block();
        throw Aborted();
    }
    void report_returned(int waiting, int returned) {
        report("returned " + sites_[waiting].name(), here() + ": divergent collective: " + at(waiting) + ", thread " +
                                                         std::to_string(returned) + " has returned");
    }
    [[noreturn]] void fail_returned(int t, int returned) {
        report_returned(t, returned);
        abort_block();
        throw Aborted();
    }
    const char *name_ = "";
    int threads_ = 0, current_ = -1;
    uint64_t block_number_ = 0;
    void (*body_)(const void *) = nullptr;
    const void *call_ = nullptr;
    bool aborting_ = false;
    int at_barrier_ = 0, barrier_first_ = 0, returned_ = 0, last_returned_ = 0;
    Random random_;
    uint64_t ready_[16] = {};
    Warp warps_[32];
    Site sites_[1024] = {};
    Collective kinds_[1024] = {};
    ThreadCopies copies_[1024];
    Fiber fibers_[1024];
    Fiber host_;
};

inline Machine machine;

inline void Machine::enter() {
    machine.main_of_fiber(machine.current_);
}

}  // namespace emulation
}  // namespace sktest
