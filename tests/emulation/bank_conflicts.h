// SPDX-License-Identifier: Apache-2.0
// Bank conflicts of shared memory: 32 banks of 4 bytes; a warp's access takes as many turns as there are different
// words on one bank. Accesses of 8 and 16 bytes go by half and quarter warps, ldmatrix by 8 rows.
#pragma once

#include <algorithm>

#include "shared_memory.h"

namespace sktest {
namespace emulation {

class BankConflicts {
public:
    // A load or store of one thread; what a warp did is judged when it meets again.
    void note(int thread, uint32_t address, uint32_t size, bool store, Site site) {
        if (!options().bank_conflicts) return;
        Noted &own = noted_[thread];
        if (own.count < most) own.accesses[own.count] = Accessed{address, size, store, site};
        ++own.count;
    }
    void forget(int thread) { noted_[thread].count = 0; }

    void judge(int warp, const SharedMemory &memory) {
        Noted *const lanes = noted_ + warp * 32;
        const int count = lanes[0].count;
        bool same = count > 0 && count <= most;
        for (int l = 1; l < 32 && same; ++l) same = lanes[l].count == count;
        for (int i = 0; i < count && same; ++i) {
            const Accessed &first = lanes[0].accesses[i];
            for (int l = 1; l < 32 && same; ++l) {
                const Accessed &other = lanes[l].accesses[i];
                same = other.site == first.site && other.size == first.size && other.store == first.store;
            }
        }
        for (int i = 0; i < count && same; ++i) {
            const Accessed &first = lanes[0].accesses[i];
            uint32_t addresses[32];
            for (int l = 0; l < 32; ++l) addresses[l] = lanes[l].accesses[i].address;
            Statistics &all = statistics();
            ++all.judged_accesses;
            keep(degree(addresses, first.size), first.store ? all.store_conflict : all.load_conflict,
                 first.store ? all.store_place : all.load_place, memory, first.site);
        }
        for (int l = 0; l < 32; ++l) lanes[l].count = 0;
    }
    void judge_rows(const uint32_t (&rows)[32], const SharedMemory &memory, Site site) {
        if (!options().bank_conflicts) return;
        keep(degree(rows, 16), statistics().ldmatrix_conflict, statistics().ldmatrix_place, memory, site);
    }

    // Turns that the slowest of the phases takes.
    static int degree(const uint32_t (&addresses)[32], uint32_t size) {
        const uint32_t words = size < 4 ? 1 : size / 4;
        const int lanes = static_cast<int>(32 / words);
        int worst = 1;
        for (int phase = 0; phase < 32; phase += lanes) {
            // Aligned accesses of one size share banks whole or not at all: the first word stands for all.
            uint32_t seen[32];
            int turns[32] = {};
            int kept = 0;
            for (int l = phase; l < phase + lanes; ++l) {
                const uint32_t word = addresses[l] / 4;
                bool known = false;
                for (int i = 0; i < kept && !known; ++i) known = seen[i] == word;
                if (known) continue;
                seen[kept++] = word;
                worst = std::max(worst, ++turns[word % 32]);
            }
        }
        return worst;
    }

private:
    static constexpr int most = 64;
    struct Accessed {
        uint32_t address, size;
        bool store;
        Site site;
    };
    struct Noted {
        int count = 0;
        Accessed accesses[most];
    };

    static void keep(int found, int &worst, std::string &place, const SharedMemory &memory, Site site) {
        if (found <= worst) return;
        worst = found;
        place = memory.where(site);
    }

    Noted noted_[1024];
};

}  // namespace emulation
}  // namespace sktest
