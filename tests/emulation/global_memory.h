// SPDX-License-Identifier: Apache-2.0
// Global memory is the process's own: guard zones and AddressSanitizer watch its bounds. Here: alignment, and that
// within a launch no two threads store to the same bytes and none loads what the launch stores (load_global and
// cp_async_16 promise that).
#pragma once

#include <unordered_map>

#include "shared_memory.h"

namespace sktest {
namespace emulation {

class GlobalMemory {
public:
    void start_launch() {
        pages_.clear();
        last_ = nullptr;
        last_page_ = 0;
    }

    bool aligned(uintptr_t address, size_t size, const char *access, const SharedMemory &memory, int thread,
                 Site site) const {
        if (address != 0 && address % size == 0) return true;
        report("global " + site.name(), memory.where(site) + ": " + access + " of " + std::to_string(size) +
                                            " bytes by thread " + std::to_string(thread) +
                                            ": expected an address that is not null and aligned to " +
                                            std::to_string(size) + ", got one of " + std::to_string(address % size) +
                                            " modulo " + std::to_string(size));
        return false;
    }

    // `writer`: the thread among all of the launch.
    void write(uintptr_t address, size_t size, uint64_t writer, const SharedMemory &memory, int thread, Site site) {
        if (!options().global_stores) return;
        Page &page = *find(address, true);
        for (size_t i = address % page_bytes / 2; i < (address % page_bytes + size) / 2; ++i) {
            if (page.writer[i] != 0 && page.writer[i] != writer + 1) {
                report("global race " + site.name(),
                       memory.where(site) + ": store_global by thread " + std::to_string(thread) + " where thread " +
                           std::to_string((page.writer[i] - 1) % 1024) + " of block number " +
                           std::to_string((page.writer[i] - 1) / 1024) + " has stored in the same launch");
            }
            page.writer[i] = writer + 1;
        }
    }
    void check_read(uintptr_t address, size_t size, const SharedMemory &memory, int thread, Site site) {
        if (!options().global_stores || pages_.empty()) return;
        const Page *page = find(address, false);
        if (page == nullptr) return;
        for (size_t i = address % page_bytes / 2; i < (address % page_bytes + size) / 2; ++i) {
            if (page->writer[i] == 0) continue;
            report("global read " + site.name(), memory.where(site) + ": thread " + std::to_string(thread) +
                                                     " reads global memory that this launch has stored to");
            return;
        }
    }

private:
    static constexpr size_t page_bytes = 4096;
    struct Page {
        uint64_t writer[page_bytes / 2] = {};  // 1 + thread, by two bytes
    };
    // Accesses are aligned to their size and so lie in one page.
    Page *find(uintptr_t address, bool create) {
        const uintptr_t number = address / page_bytes;
        if (last_ != nullptr && last_page_ == number) return last_;
        Page *page = nullptr;
        if (create) {
            page = &pages_[number];
        } else {
            const auto found = pages_.find(number);
            if (found == pages_.end()) return nullptr;
            page = &found->second;
        }
        last_ = page;
        last_page_ = number;
        return page;
    }

    std::unordered_map<uintptr_t, Page> pages_;
    Page *last_ = nullptr;
    uintptr_t last_page_ = 0;
};

}  // namespace emulation
}  // namespace sktest
