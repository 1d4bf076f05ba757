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

// What a stage of the ring holds, in one word: where its two steps read the tile, and flags. Offsets are multiples of
// 16 below 2^18. A blank card (0) holds nothing.
struct Card {
    static constexpr uint32_t first = 1, second = 2;  // the step is there
    static constexpr uint32_t last = 4;               // of its unit
    static constexpr uint32_t end = 8;                // no more units
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
    static constexpr int copies = 2 * Step::bytes / (32 * 16);  // per lane and stage

public:
    SK_DEVICE Feeder(const StationaryArgs &args, int worker, int workers) : args_(args), units_(args, worker, workers) {
        read_ahead();
    }

    // Where the ring and the table of taps lie; push needs the table.
    SK_DEVICE void attach(Shared ring, Shared taps) {
        taps_ = taps;
        place_lane(ring);
    }

    // Starts the copies of the next stage into place `place` of the ring: one commit, also when nothing is left.
    SK_DEVICE void push(int place) {
        while (blocks_ == 0 && closing_ == 0) next_batch();
        uint32_t card = 0;
        if (blocks_ != 0) card = copy_stage(to_ + static_cast<Shared>(place * 2 * Step::bytes));
        if (blocks_ == 0) {
            card |= closing_;
            closing_ &= Card::end;
        }
        cp_async_commit();
        if (lane_ == place) card_ = card, card_unit_ = unit_;
    }

    // Of the stage at a place; blank where nothing was pushed.
    SK_DEVICE uint32_t card(int place) const { return shuffle(card_, place); }
    SK_DEVICE int unit(int place) const { return shuffle(card_unit_, place); }

private:
    // Which chunks of a stage this lane copies. Forward with wide blocks reads 64 bytes of a row at once, both steps;
    // all else goes step by step.
    SK_DEVICE void place_lane(Shared ring) {
        const int lane = lane_id();
        if (both_steps()) {
            const int row = (lane >> 1 & 3) | (lane >> 4 << 2), step = lane >> 3 & 1, chunk = lane & 1;
            to_ = keep(ring + static_cast<Shared>(step * Step::bytes + Step::place(row, chunk)));
            lane_bytes_ = row * args_.weight_row_bytes + step * STEP_BYTES + chunk * 16;
        } else {
            const int row = lane / Step::row_chunks, chunk = lane % Step::row_chunks;
            to_ = keep(ring + static_cast<Shared>(Step::place(row, chunk)));
            lane_bytes_ = row * args_.weight_row_bytes + chunk * 16;
        }
    }
    SK_DEVICE bool both_steps() const { return !Transposed && args_.block_stages != 0; }

    // The entries asked for become the present ones, and those after them are asked for.
    SK_DEVICE void next_batch() {
        unit_ = ahead_unit_;
        if (unit_ < 0) {
            closing_ = Card::end;
            return;
        }
        const int count = ahead_end_ - ahead_;
        closing_ = count <= 32 ? Card::last : 0;
        const int tap = code_ / args_.blocks, block = code_ - tap * args_.blocks;
        const int shift = load_shared<int>(taps_ + static_cast<Shared>(tap * 4));
        offset_ = shift + block * args_.channel_bytes;
        blocks_ = ballot(lane_id() < count && shift >= 0);
        const int slice = unit_ % args_.slices;
        values_ = static_cast<const char *>(args_.values) +
                  (lane_bytes_ + slice * (Transposed ? Nb * E::bytes : Nb * args_.weight_row_bytes));
        if (Transposed) {
            slot_ = ahead_slot_;
        } else {
            values_ += int64_t{ahead_} * args_.block_bytes;
        }
        read_ahead();
    }

    SK_DEVICE void read_ahead() {
        ahead_ += 32;
        if (ahead_ >= ahead_end_ && !units_.next(ahead_unit_, ahead_, ahead_end_)) {
            ahead_unit_ = -1;
            return;
        }
        const int at = ahead_ + lane_id();
        if (at < ahead_end_) {
            code_ = load_global(args_.code + at);
            if (Transposed) ahead_slot_ = load_global(args_.slot + at);
        }
    }

    SK_DEVICE uint32_t copy_stage(Shared to) {
        if (args_.block_stages != 0) return copy_part(to);
        uint32_t card = Card::step(0, copy_block(to));
        if (blocks_ != 0) card |= Card::step(1, copy_block(to + Step::bytes));
        return card;
    }

    // The lowest waiting block: its offset, and where this lane reads it.
    SK_DEVICE Shared look_up(const char *&from) const {
        const int lane = first_bit(blocks_);
        from = values_ + static_cast<int64_t>(Transposed ? shuffle(slot_, lane) : lane) * args_.block_bytes;
        return static_cast<Shared>(shuffle(offset_, lane));
    }

    // A block of one step.
    SK_DEVICE Shared copy_block(Shared to) {
        const char *from;
        const Shared offset = look_up(from);
        blocks_ &= blocks_ - 1;
        copy<copies / 2>(to, 32 * 16, from, 32 / Step::row_chunks);
        return offset;
    }

    // Two steps of a wider block.
    SK_DEVICE uint32_t copy_part(Shared to) {
        const char *from;
        const Shared offset = look_up(from) + static_cast<Shared>(part_ * 2 * STEP_BYTES);
        if (!Transposed) {
            copy<copies>(to, 8 * Step::row_bytes, from + part_ * 2 * STEP_BYTES, 8);
        } else {
            copy<copies>(to, 32 * 16, from + part_ * 2 * E::depth * args_.weight_row_bytes, 32 / Step::row_chunks);
        }
        if (++part_ == args_.block_stages) {
            part_ = 0;
            blocks_ &= blocks_ - 1;
        }
        return Card::step(0, offset) | Card::step(1, offset + STEP_BYTES);
    }

    // Each copy is `row_step` rows of weights after the one before, and `step` bytes in the ring.
    template <int Copies> SK_DEVICE void copy(Shared to, int step, const char *from, int row_step) const {
        SK_UNROLL
        for (int i = 0; i < Copies; ++i, from += row_step * args_.weight_row_bytes) {
            cp_async_16(to + static_cast<Shared>(i * step), from, 16);
        }
    }

    const StationaryArgs &args_;
    Units units_;
    const int lane_ = keep(lane_id());
    Shared taps_ = 0;

    // Per lane: where its chunks lie in the ring's first stage and in a block.
    Shared to_ = 0;
    int lane_bytes_ = 0;

    // Entries asked for: of `ahead_unit_` (-1: none), from ahead_ on; per lane one code and slot.
    int ahead_unit_ = -1, ahead_ = 0, ahead_end_ = 0;
    int code_ = 0, ahead_slot_ = 0;

    // Entries at hand: lanes whose block is still to come, and the flag for the card that takes the last of them.
    int unit_ = 0;
    uint32_t blocks_ = 0, closing_ = 0;
    int part_ = 0;                  // stages of the lowest block that are already pushed
    const char *values_ = nullptr;  // per lane: its first chunk of slot 0 or, forward, of the first entry's block
    int offset_ = 0, slot_ = 0;     // per lane

    // Per lane: the card of the ring's place `lane`, and whose unit it is.
    uint32_t card_ = 0;
    int card_unit_ = 0;
};

}  // namespace stationary_kernel
}  // namespace cuda
}  // namespace sparsekern
