// SPDX-License-Identifier: Apache-2.0
// How one warp of the stationary kernel gets its weights: from the lists of the layout to stages in its own ring.
//
// A warp is feeder and consumer in turn, so everything here is equal over the warp unless it is called "per lane".
// Two lists are read 32 entries at a time, one per lane, and then handed out with ballots and shuffles: the units that
// the warp computes (block row, slice of NB features), and the stored blocks of a unit. The next 32 blocks, be they of
// the same unit or the next, are on their way while the present ones are handed out, so that no load of an index is
// waited for at the beginning of a unit.
#pragma once

#include "fragments.cuh"
#include "stationary_args.h"

namespace sparsekern {
namespace cuda {
namespace stationary_kernel {

// What a stage holds, in one word: where its two steps read the tile, and flags. Lane s remembers the card of the
// ring's stage s. Offsets are multiples of 16 below 2^18.
struct Card {
    static constexpr uint32_t first = 1, second = 2;  // the step is there
    static constexpr uint32_t last = 4;               // of its unit
    static constexpr uint32_t end = 8;                // no more units, and nothing else on the card
    static constexpr uint32_t offset_mask = 0x3fff0;

    SK_DEVICE static uint32_t step(int i, Shared offset) { return i == 0 ? offset | first : offset << 14 | second; }
    SK_DEVICE static Shared offset(int i, uint32_t card) { return (i == 0 ? card : card >> 14) & offset_mask; }
};

// Units of one warp, longest first. `workers` warps take them in snake order: the last of a round is the first of the
// next, so that long and short units even out.
class Units {
public:
    SK_DEVICE Units(const StationaryArgs &args, int worker, int workers)
        : args_(args), worker_(worker), workers_(workers) {
        read();
    }

    // First feature / NB of the next unit and its entries; false after the last.
    SK_DEVICE bool next(int &unit, int &begin, int &end) {
        while (waiting_ == 0) {
            if (round_ * workers_ >= args_.rows * args_.slices) return false;
            read();
        }
        const int lane = first_bit(waiting_);
        waiting_ &= waiting_ - 1;
        unit = shuffle(unit_, lane), begin = shuffle(begin_, lane), end = shuffle(end_, lane);
        return true;
    }

private:
    SK_DEVICE void read() {
        const int round = round_ + lane_id();
        const int rank = round * workers_ + (round & 1 ? workers_ - 1 - worker_ : worker_);
        const int place = rank / args_.slices, slice = rank - place * args_.slices;
        bool valid = false;
        if (place < args_.rows) {
            const int row = args_.order ? load_global(args_.order + place) : place;
            const int32_t *ptr = args_.ptr + (block_z() * args_.rows + row);
            begin_ = load_global(ptr), end_ = load_global(ptr + 1);
            unit_ = row * args_.slices + slice;
            valid = unit_ < args_.units;
        }
        waiting_ = ballot(valid);
        round_ += 32;
    }

    const StationaryArgs &args_;
    const int worker_, workers_;
    int round_ = 0;
    uint32_t waiting_ = 0;                // lanes whose unit is still to come
    int unit_ = 0, begin_ = 0, end_ = 0;  // per lane
};

template <class E, bool Transposed, int Nb> class Feeder {
    using Step = WeightStep<E, Transposed, Nb>;
    static constexpr int stage_bytes = 2 * Step::bytes;
    static constexpr int copies = stage_bytes / (32 * 16);  // per lane and stage

public:
    SK_DEVICE Feeder(const StationaryArgs &args, int worker, int workers)
        : args_(args), units_(args, worker, workers), lane_(lane_id()) {
        read_ahead();
    }

    // Where the ring and the table of taps lie; the table is complete.
    SK_DEVICE void attach(Shared ring, Shared taps) {
        taps_ = taps;
        place_lane(ring);
    }

    // Starts the copies of the next stage into the ring's stage `stage`: one commit, also when there is nothing left.
    SK_DEVICE void push(int stage) {
        uint32_t card = 0;
        while (left_ == 0 && blocks_ == 0 && !closes_ && unit_ >= 0) next_batch();
        if (unit_ < 0) {
            card = Card::end;
        } else {
            if (left_ != 0 || blocks_ != 0) card = copy_stage(to_ + static_cast<Shared>(stage * stage_bytes));
            if (closes_ && left_ == 0 && blocks_ == 0) {
                card |= Card::last;
                closes_ = false;
            }
        }
        cp_async_commit();
        if (lane_ == stage) card_ = card, card_unit_ = unit_;
    }

    SK_DEVICE uint32_t card(int stage) const { return shuffle(card_, stage); }
    SK_DEVICE int unit(int stage) const { return shuffle(card_unit_, stage); }

private:
    // Which chunks of a stage this lane copies. Forward with wide blocks reads 64 bytes of a row at once, both steps;
    // all else goes step by step.
    SK_DEVICE void place_lane(Shared ring) {
        int row = lane_ / Step::row_chunks, chunk = lane_ % Step::row_chunks, step = 0;
        row_step_ = 32 / Step::row_chunks;
        copy_step_ = 32 * 16;
        int column = chunk;
        if (!Transposed && args_.block_stages != 0) {
            row = (lane_ >> 1 & 3) | (lane_ >> 4 << 2), chunk = lane_ & 1, step = lane_ >> 3 & 1;
            row_step_ = 8;
            copy_step_ = 8 * Step::row_bytes;
            column = step * 2 + chunk;
        }
        to_ = ring + static_cast<Shared>(step * Step::bytes + Step::place(row, chunk));
        lane_values_ = static_cast<const char *>(args_.values) + (row * args_.weight_row_bytes + column * 16);
    }

    // The next 32 entries become the present ones, and those after them are asked for.
    SK_DEVICE void next_batch() {
        unit_ = ahead_unit_;
        if (unit_ < 0) return;
        const int count = ahead_end_ - ahead_;
        position_ = ahead_;
        closes_ = count <= 32;
        const int tap = code_ / args_.blocks, block = code_ - tap * args_.blocks;
        const int shift = load_shared<int>(taps_ + static_cast<Shared>(tap * 4));
        offset_ = shift + block * args_.channel_bytes;
        slot_ = ahead_slot_;
        blocks_ = ballot(lane_ < count && shift >= 0);
        const int slice = unit_ % args_.slices;
        unit_values_ = lane_values_ + slice * (Transposed ? Nb * E::bytes : Nb * args_.weight_row_bytes);
        read_ahead();
    }

    SK_DEVICE void read_ahead() {
        ahead_ += 32;
        if (ahead_ >= ahead_end_ && !units_.next(ahead_unit_, ahead_, ahead_end_)) {
            ahead_unit_ = -1;
            return;
        }
        if (ahead_ + lane_ < ahead_end_) {
            code_ = load_global(args_.code + ahead_ + lane_);
            if (Transposed) ahead_slot_ = load_global(args_.slot + ahead_ + lane_);
        }
    }

    // The lowest waiting block: where it reads the tile, and where this lane reads it.
    SK_DEVICE void take(Shared &offset, const char *&from) {
        const int lane = first_bit(blocks_);
        blocks_ &= blocks_ - 1;
        offset = static_cast<Shared>(shuffle(offset_, lane));
        const int slot = Transposed ? shuffle(slot_, lane) : position_ + lane;
        from = unit_values_ + static_cast<int64_t>(slot) * args_.block_bytes;
    }

    SK_DEVICE uint32_t copy_stage(Shared to) {
        return args_.block_stages == 0 ? copy_two_blocks(to) : copy_part_of_block(to);
    }

    SK_DEVICE uint32_t copy_two_blocks(Shared to) {
        Shared offset;
        const char *from;
        take(offset, from);
        copy<copies / 2>(to, from);
        uint32_t card = Card::step(0, offset);
        if (blocks_ != 0) {
            take(offset, from);
            copy<copies / 2>(to + Step::bytes, from);
            card |= Card::step(1, offset);
        }
        return card;
    }

    SK_DEVICE uint32_t copy_part_of_block(Shared to) {
        if (left_ == 0) {
            take(offset_now_, from_now_);
            left_ = args_.block_stages;
        }
        copy<copies>(to, from_now_);
        const uint32_t card = Card::step(0, offset_now_) | Card::step(1, offset_now_ + STEP_BYTES);
        --left_;
        offset_now_ += 2 * STEP_BYTES;
        from_now_ += Transposed ? 2 * E::depth * args_.weight_row_bytes : 2 * STEP_BYTES;
        return card;
    }

    template <int Copies> SK_DEVICE void copy(Shared to, const char *from) const {
        SK_UNROLL
        for (int i = 0; i < Copies; ++i) {
            cp_async_16(to + static_cast<Shared>(i * copy_step_), from + i * row_step_ * args_.weight_row_bytes, 16);
        }
    }

    const StationaryArgs &args_;
    Units units_;
    const int lane_;
    Shared taps_ = 0;

    // Per lane: where its chunks lie in a stage and in a block.
    Shared to_ = 0;
    const char *lane_values_ = nullptr;
    int row_step_ = 0, copy_step_ = 0;

    // Entries asked for: of `ahead_unit_` (-1: none), from ahead_ on; per lane one code and slot.
    int ahead_unit_ = -1, ahead_ = 0, ahead_end_ = 0;
    int code_ = 0, ahead_slot_ = 0;

    // Entries at hand: lanes whose block is still to come, and per lane its offset and slot.
    int unit_ = 0, position_ = 0;
    uint32_t blocks_ = 0;
    bool closes_ = false;  // the unit ends with these entries, which no card says yet
    const char *unit_values_ = nullptr;
    int offset_ = 0, slot_ = 0;

    // The wide block that is being copied, and its stages still to come.
    int left_ = 0;
    Shared offset_now_ = 0;
    const char *from_now_ = nullptr;

    // Per lane: the card of stage `lane`.
    uint32_t card_ = 0;
    int card_unit_ = 0;
};

}  // namespace stationary_kernel
}  // namespace cuda
}  // namespace sparsekern
