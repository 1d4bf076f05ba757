// SPDX-License-Identifier: Apache-2.0
// The walk along a panel's list of entries: which blocks and which channels the next stage holds.
//
// Every warp walks for itself, in registers: 32 entries at a time, one a lane, the next 32 on their way. A walk shared
// by the warps would save each of them some 40 instructions per stage, but put shared memory and a barrier between the
// index and the copies that wait for it.
#pragma once

#include "primitives.cuh"
#include "streamed_args.h"

namespace sparsekern {
namespace cuda {
namespace streaming {

// Which of the panel's pixels a block (CTA) makes.
struct Spot {
    int group, panel, phase_y, phase_x;
    int y0, x0;  // first pixel of the tile, counted within the phase
    int64_t image0;
};

// Panels come first, then phases, then tiles: blocks that run at the same time read the same pixels, so that x comes
// from memory once. The weights of all panels are read by every tile and stay in L2. The layout has no order of panels
// by length: they come as they lie, and only the last tile's can leave multiprocessors idle.
template <bool Transposed> SK_DEVICE Spot spot_of(const Args &a, int block) {
    Spot spot;
    spot.group = block_z();
    spot.panel = block % a.panels, block /= a.panels;
    spot.phase_x = block % a.x.phases(Transposed), block /= a.x.phases(Transposed);
    spot.phase_y = block % a.y.phases(Transposed), block /= a.y.phases(Transposed);
    spot.x0 = block % a.tiles_x * a.tile_w, block /= a.tiles_x;
    spot.y0 = block % a.tiles_y * a.tile_h, block /= a.tiles_y;
    spot.image0 = int64_t{block} * a.tile_images;
    return spot;
}

// A tap of the filter as bits, one for its row and one for its column; a pixel has those set that lie in the image, and
// LAST where it exists.
SK_DEVICE uint32_t tap_bits(const Args &a, int r, int s) {
    return 1u << r | 1u << (a.y.taps + s);
}
// The tap's column is the group's last and may be ragged; and a bit that no pixel has.
constexpr uint32_t LAST = 0x80000000u, NOWHERE = 0x40000000u;

// For each tap its shift in units and its bits, 0 where the phase lacks it. All threads; a barrier must follow.
template <bool Transposed> SK_DEVICE void write_taps(const Args &a, const Spot &spot, Shared table) {
    for (int tap = thread_id(); tap < a.y.taps * a.x.taps; tap += thread_count()) {
        const int r = tap / a.x.taps, s = tap - r * a.x.taps;
        const int dy = a.y.shift(Transposed, spot.phase_y, r), dx = a.x.shift(Transposed, spot.phase_x, s);
        const bool valid = dy != NO_TAP && dx != NO_TAP;
        const int shift = valid ? (dy * a.source_w + dx) * a.pixel_units : 0;
        store_shared(table + static_cast<Shared>(tap * TAP_BYTES),
                     Words2{static_cast<uint32_t>(shift), valid ? tap_bits(a, r, s) : 0});
    }
}

// The 16 bytes of a row of a stage that this lane copies, from the first of the entry.
SK_DEVICE int entry_chunk(const Args &a) {
    return lane_id() & (STEP_LANES - 1) & ((2 << a.steps_log) - 1);
}

// Channels of the group from the entry's n-th 16 bytes on; enough for them where its column is not the last.
template <class E> SK_DEVICE int channels_left(const Args &a, uint32_t taps, int chunk) {
    return taps & LAST ? a.last_channels - chunk * (16 / E::bytes) : 16 / E::bytes;
}

// What a stage holds.
struct Ticket {
    uint32_t present;  // bit `entry * rows + row`: that row has a block at that entry; 0: the list is at its end
    int part;          // of the entry, where one entry is several stages
    // Of this lane.
    int block;      // slot of the block of bit `lane`, where there is one
    int where;      // from a pixel's place to the 16 bytes of channels that this lane copies
    uint32_t taps;  // bits that a pixel must have, else it reads zeros
};

template <class E, bool Transposed, int Rows> class Walk {
public:
    SK_DEVICE Walk(const Args &a, const Spot &spot, Shared taps)
        : a_(a), taps_(taps), row_(Rows == 1 ? 0 : keep(lane_id() & (Rows - 1))),
          entry_(Rows == 1 ? lane_id() : keep(lane_id() / Rows)) {
        const int panel = spot.group * a.panels + spot.panel, row = spot.panel * Rows + row_;
        next_ = load_global(a.list_ptr + panel);
        end_ = load_global(a.list_ptr + panel + 1);
        slot_ = row < a.rows ? load_global(a.ptr + spot.group * a.rows + row) : 0;
        source_entry_ = keep((lane_id() & (STEP_LANES - 1)) >> (1 + a.steps_log));
        chunk_ = keep(entry_chunk(a));
        read_ahead();
    }

    SK_DEVICE Ticket take() {
        while (valid_ == 0 && next_ < end_) refill();
        uint32_t from[STEPS + 1] = {valid_};  // entries not taken, from the n-th
        SK_UNROLL
        for (int i = 0; i < STEPS; ++i) from[i + 1] = from[i] & (from[i] - 1);
        Ticket ticket;
        ticket.part = part_;
        take_blocks(ticket, entry_ < STEPS >> a_.steps_log ? pick(from, entry_) : 0);
        take_channels(ticket, pick(from, source_entry_));
        if (++part_ == a_.parts) {
            part_ = 0;
            valid_ = a_.steps_log == 0 ? from[4] : a_.steps_log == 1 ? from[2] : from[1];
        }
        return ticket;
    }

private:
    SK_DEVICE void read_ahead() {
        const int at = next_ + lane_id();
        ahead_ = at < end_ ? load_global(a_.list + at) : 0;
    }

    // The next 32 entries, those of taps that the phase lacks among them: their blocks count.
    SK_DEVICE void refill() {
        const uint32_t entry = static_cast<uint32_t>(ahead_);
        const bool inside = next_ + lane_id() < end_;
        next_ += 32;
        read_ahead();
        if constexpr (Rows > 1) note_rows(inside ? entry : 0);
        const int code = static_cast<int>(Rows == 1 ? entry : entry >> Rows);
        const int tap = code / a_.columns, column = code - tap * a_.columns;
        const Words2 found = load_shared<Words2>(taps_ + static_cast<Shared>(tap * TAP_BYTES));
        where_ = static_cast<int>(found.x) + column * a_.column_units;
        bits_ = found.y | (column == a_.columns - 1 ? LAST : 0);
        valid_ = ballot(inside && found.y != 0);
    }

    // For each row of the panel, which of the lanes' entries have it.
    SK_DEVICE void note_rows(uint32_t entry) {
        slot_ += bit_count(having_);
        SK_UNROLL
        for (int row = 0; row < Rows; ++row) {
            const uint32_t having = ballot(entry >> row & 1);
            if (row == row_) having_ = having;
        }
    }

    SK_DEVICE static uint32_t pick(const uint32_t (&from)[STEPS + 1], int n) {
        uint32_t left = from[0];
        SK_UNROLL
        for (int i = 1; i < STEPS; ++i) left = n >= i ? from[i] : left;
        return left;
    }

    // `left`: entries from the one that this lane finds the block of.
    SK_DEVICE void take_blocks(Ticket &ticket, uint32_t left) const {
        bool present = left != 0;
        if constexpr (Rows == 1) {
            ticket.block = present ? next_ - 32 + first_bit(left) : 0;
        } else {
            const uint32_t entry = left & (0 - left);
            present = (having_ & entry) != 0;
            ticket.block = slot_ + bit_count(having_ & (entry - 1));
        }
        if (Transposed && present) ticket.block = load_global(a_.perm + ticket.block);
        ticket.present = ballot(present);
    }

    // `left`: entries from the one that this lane copies channels of.
    SK_DEVICE void take_channels(Ticket &ticket, uint32_t left) const {
        const int holder = left ? first_bit(left) : 0, chunk = part_ * STEP_LANES + chunk_;
        ticket.where = shuffle(where_, holder) + chunk * a_.chunk_units;
        const uint32_t bits = shuffle(bits_, holder);
        const bool beyond = channels_left<E>(a_, bits, chunk) <= 0;
        ticket.taps = left == 0 || beyond ? NOWHERE : bits;
    }

    const Args &a_;
    const Shared taps_;
    const int row_, entry_;     // of the panel and of the stage, that this lane finds the block of
    int source_entry_, chunk_;  // of the stage, and 16 bytes of it, that this lane copies

    int next_, end_;      // entries not in registers yet
    int ahead_ = 0;       // the entry that refill takes
    uint32_t valid_ = 0;  // entries in registers not taken yet
    int part_ = 0;
    // Of this lane's entry.
    int where_ = 0;
    uint32_t bits_ = 0;
    // Of this lane's row, where a panel has several: the entries in registers that have it, and the block of the first.
    uint32_t having_ = 0;
    int slot_ = 0;
};

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern
