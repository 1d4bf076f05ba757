// SPDX-License-Identifier: Apache-2.0
// A block's shared memory: poisoned with NaN, checked for bounds and alignment, and watched for races. A race is found
// from the barriers alone, in whatever order the threads happened to run: two accesses to the same bytes by different
// threads, one of them a write, with no barrier between them (nor, within a warp, a warp barrier).
#pragma once

#include <cstring>
#include <memory>
#include <new>

#include "options.h"

namespace sktest {
namespace emulation {

enum class Access : uint8_t { load, store, ldmatrix, copy };

inline const char *name_of(Access access) {
    switch (access) {
    case Access::load:
        return "load_shared";
    case Access::store:
        return "store_shared";
    case Access::ldmatrix:
        return "ldmatrix";
    default:
        return "cp_async_16";
    }
}

class SharedMemory {
public:
    // Addresses start here, so that offsets taken for addresses are out of bounds.
    static constexpr uint32_t base = 1024;
    // In place of a thread: a read of the whole warp (ldmatrix), which not even the lane's own write is ordered with.
    static constexpr int warp_reader = 0x8000;

    void start_launch(const char *kernel, int64_t bytes) {
        kernel_ = kernel;
        // Exactly as long as asked for, so that AddressSanitizer sees the end too.
        data_.reset(static_cast<unsigned char *>(::operator new(static_cast<size_t>(bytes), std::align_val_t(128))));
        bytes_ = static_cast<uint32_t>(bytes);
        const size_t granules = (static_cast<size_t>(bytes) + 15) / 16;
        if (granules > granules_.size()) {
            granules_.resize(granules);
            halves_.resize(granules * 8);
        }
    }
    void start_block(const std::string &block) {
        block_ = block;
        if (bytes_ > 0) std::memset(data_.get(), 0xff, bytes_);
        order_block();
        block_start_ = block_epoch_;
        for (size_t i = 0; i < (bytes_ + 15) / 16; ++i) {
            granules_[i].in_flight = 0;  // of a block that failed
            granules_[i].split = false;
        }
    }
    uint32_t size() const { return bytes_; }

    // All accesses so far are before all that follow: of the block, of one warp.
    void order_block() {
        ++block_epoch_;
        for (uint32_t &epoch : warp_epoch_) ++epoch;
    }
    void order_warp(int warp) { ++warp_epoch_[warp]; }

    // The bytes at `address`, or null (and a problem) where they are out of bounds or not aligned to their size.
    unsigned char *at(uint32_t address, uint32_t size, int thread, Access access, Site site) {
        if (address >= base && address - base < bytes_ && size <= bytes_ - (address - base) && address % size == 0)
            return data_.get() + (address - base);
        const bool aligned = address % size == 0;
        report("address " + site.name() + (aligned ? " bounds" : " alignment"),
               where(site) + ": " + name_of(access) + " of " + std::to_string(size) + " bytes by " + who(thread) +
                   " at address " + std::to_string(address) + " (byte " +
                   std::to_string(static_cast<int64_t>(address) - base) + "): expected " +
                   (aligned ? "within the block's " + std::to_string(bytes_) + " bytes"
                            : "aligned to " + std::to_string(size)));
        return nullptr;
    }

    // Bytes that `at` allowed.
    void read(uint32_t address, uint32_t size, int thread, Access access, Site site) {
        const Stamp now = stamp(thread, access, sites_.number(site));
        each_cell(address, size, [&](Cell &cell, uint32_t offset) {
            if (cell.write.block_epoch < block_start_) {
                ++statistics().unwritten_reads;
            } else if (!ordered(cell.write, thread)) {
                race(offset, cell.write, thread, access, site);
            }
            note_read(cell, now);
        });
        check_in_flight(address, thread, access, site);
    }
    void write(uint32_t address, uint32_t size, int thread, Access access, Site site) {
        check_in_flight(address, thread, access, site);
        const Stamp now = stamp(thread, access, sites_.number(site));
        each_cell(address, size, [&](Cell &cell, uint32_t offset) {
            check_before_write(cell, offset, thread, access, site);
            cell.write = now;
        });
    }
    // A copy of 16 bytes happens at any time between `issue` and `complete`.
    void issue(uint32_t address, int thread, Site site) {
        check_in_flight(address, thread, Access::copy, site);
        each_cell(address, 16,
                  [&](Cell &cell, uint32_t offset) { check_before_write(cell, offset, thread, Access::copy, site); });
        Granule &granule = granules_[(address - base) / 16];
        granule.in_flight = static_cast<uint16_t>(thread + 1);
        granule.site = sites_.number(site);
    }
    void complete(uint32_t address, int thread) {
        Granule &granule = granules_[(address - base) / 16];
        if (granule.in_flight == thread + 1) granule.in_flight = 0;
        const Stamp now = stamp(thread, Access::copy, granule.site);
        each_cell(address, 16, [&](Cell &cell, uint32_t) { cell.write = now; });
    }

    std::string where(Site site) const { return std::string(kernel_) + " " + block_ + " " + site.name(); }

private:
    struct Stamp {
        uint32_t block_epoch = 0, warp_epoch = 0;
        uint16_t thread = 0, place = 0;  // place: 4 site + access, to keep the cells small

        Access access() const { return static_cast<Access>(place % 4); }
        uint16_t site() const { return place / 4; }
    };
    // Of two bytes. Of the reads since the last barrier of the block: the last; whether its warp read otherwise since
    // its last warp barrier; whether other warps read; and a read of that kind. This decides for every later write.
    struct Cell {
        Stamp write, read, other;
        bool many = false, other_warps = false;
    };
    // Of 16 bytes: one cell as long as all accesses are whole, else eight.
    struct Granule {
        Cell whole;
        uint16_t in_flight = 0;  // 1 + the thread whose copy is under way
        uint16_t site = 0;       // of that copy
        bool split = false;
    };
    struct Free {
        void operator()(unsigned char *data) const { ::operator delete(data, std::align_val_t(128)); }
    };

    static int warp_of(int thread) { return (thread >> 5) & 31; }
    static std::string who(int thread) {
        return (thread & warp_reader ? "warp " + std::to_string(warp_of(thread)) : "thread " + std::to_string(thread));
    }
    Stamp stamp(int thread, Access access, uint16_t site) const {
        return Stamp{block_epoch_, warp_epoch_[warp_of(thread)], static_cast<uint16_t>(thread),
                     static_cast<uint16_t>(site * 4 + static_cast<int>(access))};
    }
    bool ordered(const Stamp &past, int thread) const {
        return past.block_epoch < block_epoch_ || past.thread == thread ||
               (warp_of(past.thread) == warp_of(thread) && past.warp_epoch < warp_epoch_[warp_of(thread)]);
    }
    template <class F> void each_cell(uint32_t address, uint32_t size, F &&f) {
        const uint32_t offset = address - base;
        Granule &granule = granules_[offset / 16];
        if (size == 16 && !granule.split) {
            f(granule.whole, offset);
            return;
        }
        Cell *cells = &halves_[offset / 16 * 8];
        if (!granule.split) {
            granule.split = true;
            for (int i = 0; i < 8; ++i) cells[i] = granule.whole;
        }
        for (uint32_t i = 0; i < size / 2; ++i) f(cells[offset % 16 / 2 + i], offset + 2 * i);
    }
    static void note_read(Cell &cell, const Stamp &now) {
        if (cell.read.block_epoch != now.block_epoch) {
            cell.many = cell.other_warps = false;
        } else if (warp_of(cell.read.thread) != warp_of(now.thread)) {
            cell.many = false;
            cell.other_warps = true;
            cell.other = cell.read;
        } else if (cell.read.warp_epoch != now.warp_epoch) {
            cell.many = false;
        } else if (cell.read.thread != now.thread) {
            cell.many = true;
            if (!cell.other_warps) cell.other = cell.read;
        }
        cell.read = now;
    }
    void check_before_write(const Cell &cell, uint32_t offset, int thread, Access access, Site site) {
        if (!ordered(cell.write, thread)) race(offset, cell.write, thread, access, site);
        if (cell.read.block_epoch < block_epoch_) return;
        if (!ordered(cell.read, thread)) {
            race(offset, cell.read, thread, access, site);
        } else if (cell.other_warps || (cell.many && cell.read.warp_epoch == warp_epoch_[warp_of(thread)])) {
            race(offset, cell.other, thread, access, site);
        }
    }
    void check_in_flight(uint32_t address, int thread, Access access, Site site) {
        const Granule &granule = granules_[(address - base) / 16];
        if (granule.in_flight == 0 || !options().races) return;
        report("in flight " + site.name() + " " + std::to_string(granule.site),
               where(site) + ": race on shared memory: byte " + std::to_string(address - base) + ": " +
                   name_of(access) + " by " + who(thread) + " while cp_async_16 by " + who(granule.in_flight - 1) +
                   " (" + sites_.name(granule.site) + ") is under way: no cp_async_wait between them");
    }
    void race(uint32_t offset, const Stamp &past, int thread, Access access, Site site) {
        if (!options().races) return;
        const bool same_warp = warp_of(past.thread) == warp_of(thread);
        report("race " + site.name() + " " + std::to_string(past.place) + name_of(access),
               where(site) + ": race on shared memory: byte " + std::to_string(offset) + ": " + name_of(access) +
                   " by " + who(thread) + " after " + name_of(past.access()) + " by " + who(past.thread) + " (" +
                   sites_.name(past.site()) + ") with no " + (same_warp ? "warp_barrier" : "barrier") +
                   " between them");
    }

    const char *kernel_ = "";
    std::string block_;
    std::unique_ptr<unsigned char, Free> data_;
    uint32_t bytes_ = 0;
    // Never reset, so that what other blocks and launches left behind is always older.
    uint32_t block_epoch_ = 0, block_start_ = 0;
    uint32_t warp_epoch_[32] = {};
    Sites sites_;
    std::vector<Granule> granules_;
    std::vector<Cell> halves_;
};

}  // namespace emulation
}  // namespace sktest
