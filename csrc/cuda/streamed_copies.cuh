// SPDX-License-Identifier: Apache-2.0
// From global memory into a stage of the ring: the pixels' channels and the blocks of weights that a ticket names.
#pragma once

#include "box.cuh"
#include "fragments.cuh"
#include "streamed_walk.cuh"

namespace sparsekern {
namespace cuda {
namespace streaming {

// A pixel of the tile, counted within the phase.
struct Pixel {
    int image, y, x;
    bool inside;
};

template <bool Transposed> SK_DEVICE Pixel pixel_of(const Args &a, const Spot &spot, int row) {
    Pixel pixel;
    pixel.x = spot.x0 + row % a.tile_w, row /= a.tile_w;
    pixel.y = spot.y0 + row % a.tile_h, pixel.image = row / a.tile_h;
    pixel.inside = spot.image0 + pixel.image < a.n &&
                   pixel.y * a.y.result_step(Transposed) + spot.phase_y < a.result_h &&
                   pixel.x * a.x.result_step(Transposed) + spot.phase_x < a.result_w;
    return pixel;
}

// Where a row of 128 bytes keeps its 16-byte chunk: the 8 rows of a matrix lie in different banks.
SK_DEVICE int chunk_place(int row, int chunk) {
    return row * ROW_BYTES + (chunk ^ (row & 7)) * 16;
}

// The 32 pixels of a warp, which nobody else reads. A lane copies the same 16 bytes of a stage's row for every fourth
// pixel: 8 lanes fill a row, so that neighbouring channels are asked for together.
template <class E, bool Transposed> class PixelCopy {
public:
    SK_DEVICE PixelCopy(const Args &a, const Spot &spot, int warp) : a_(a) {
        const int64_t first = spot.image0 * a.source_h * a.source_w * a.pixel_units;
        base_ = a.source + first * a.unit_bytes + int64_t{spot.group} * a.channels * E::bytes;
        const Pixel own = pixel_of<Transposed>(a, spot, warp * 32 + lane_id());
        const int y = own.y * a.y.source_step(Transposed), x = own.x * a.x.source_step(Transposed);
        const int place = own.inside ? ((own.image * a.source_h + y) * a.source_w + x) * a.pixel_units : 0;
        const uint32_t taps = own.inside ? taps_inside(a, spot, y, x) : 0;
        const int first_row = lane_id() / STEP_LANES;
        SK_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            place_[i] = shuffle(place, first_row + i * ROW_STRIDE);
            taps_[i] = shuffle(taps, first_row + i * ROW_STRIDE);
        }
        to_ = keep(static_cast<Shared>(chunk_place(warp * 32 + first_row, lane_id() & (STEP_LANES - 1))));
    }

    SK_DEVICE void issue(const Ticket &ticket, Shared stage) const {
        if (a_.unit_bytes == 16) {
            copy_chunks(ticket, stage + to_);
        } else {
            copy_elements(ticket, stage + to_);
        }
    }

private:
    static constexpr int ROW_STRIDE = 32 / STEP_LANES, ROWS = 32 / ROW_STRIDE;

    // Tap bits of the pixel whose taps start at (y, x) of the source.
    SK_DEVICE static uint32_t taps_inside(const Args &a, const Spot &spot, int y, int x) {
        uint32_t bits = LAST;
        for (int r = 0; r < a.y.taps; ++r) {
            const int shift = a.y.shift(Transposed, spot.phase_y, r);
            if (shift != NO_TAP && y + shift >= 0 && y + shift < a.source_h) bits |= 1u << r;
        }
        for (int s = 0; s < a.x.taps; ++s) {
            const int shift = a.x.shift(Transposed, spot.phase_x, s);
            if (shift != NO_TAP && x + shift >= 0 && x + shift < a.source_w) bits |= 1u << (a.y.taps + s);
        }
        return bits;
    }

    // Row first_row + 4 i: an odd i swaps the halves of the row (chunk_place).
    SK_DEVICE static Shared row_of(Shared to, int i) {
        return (to ^ static_cast<Shared>((i & 1) * (ROW_STRIDE * 16))) +
               static_cast<Shared>(i * ROW_STRIDE * ROW_BYTES);
    }

    SK_DEVICE void copy_chunks(const Ticket &ticket, Shared to) const {
        const char *source = keep(base_ + int64_t{ticket.where} * 16);
        SK_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const bool inside = (ticket.taps & ~taps_[i]) == 0;
            const int place = inside ? place_[i] : -ticket.where;
            cp_async_16(row_of(to, i), source + int64_t{place} * 16, inside ? 16 : 0);
        }
    }

    SK_DEVICE void copy_elements(const Ticket &ticket, Shared to) const {
        const int elements = channels_left<E>(a_, ticket.taps, ticket.part * STEP_LANES + entry_chunk(a_));
        SK_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const bool inside = (ticket.taps & ~taps_[i]) == 0;
            const char *source = base_ + (int64_t{place_[i]} + ticket.where) * E::bytes;
            store_shared(row_of(to, i), BoxWalk<E>::gather(reinterpret_cast<const typename E::Storage *>(source),
                                                           inside ? elements : 0));
            // The elements of 2 pixels at a time: more don't always find registers.
            if (i % 2 == 1) warp_barrier();
        }
    }

    const Args &a_;
    const char *base_;     // of the tile's first image and the group's first channel
    int place_[ROWS];      // of the lane's pixels, in units from there
    uint32_t taps_[ROWS];  // that lie in the image
    Shared to_;
};

// Weights of a stage: the blocks present, by entry and then by row. A block is its steps in the stage, each in slices
// of Nb features (fragments.cuh).
template <class E, bool Transposed, int Edge> struct WeightTile {
    static constexpr int Nb = Edge < 32 ? Edge : 32;
    static constexpr int SLICES = Edge / Nb;
    using Step = WeightStep<E, Transposed, Nb>;
    static constexpr int step_bytes = SLICES * Step::bytes;  // of one block
};

// Copies pieces of 512 bytes, one a warp and instruction. Lanes are dealt so that whole rows of up to 128 bytes are
// read, and that any 8 neighbouring lanes write to different banks. Places within a slice are linear over bits
// (WeightStep::place), so a lane's and a piece's part are joined by exclusive or.
template <class E, bool Transposed, int Edge> class WeightCopy {
    using Tile = WeightTile<E, Transposed, Edge>;
    using Step = typename Tile::Step;
    static constexpr int PIECE = 512;

public:
    SK_DEVICE WeightCopy(const Args &a, int warp)
        : a_(a), warp_(warp), warps_(thread_count() / 32), pieces_log_(first_bit(Edge / 16) + a.steps_log),
          own_(keep(1u << lane_id())) {
        const int lane = lane_id();
        if (Transposed) {
            // Lanes are (line of 128 bytes, slice, row of the line, chunk).
            const int line = lane / 8, slice = line % Tile::SLICES, chunk = lane % Step::row_chunks;
            const int row = line / Tile::SLICES * LINE_ROWS + lane % 8 / Step::row_chunks;
            source_ = keep(a.values + row * (Edge * E::bytes) + (slice * Step::row_chunks + chunk) * 16);
            to_ = keep(slice * Step::bytes + Step::place(row, chunk));
        } else {
            // Lanes are (step, feature, chunk of the step).
            const int step = lane >> (features_log() + 1), chunk = lane & 1;
            const int feature = (lane >> 1) & ((1 << features_log()) - 1);
            source_ = keep(a.values + feature * a.weight_row_bytes + step * 32 + chunk * 16);
            to_ = keep(step * Tile::step_bytes + Step::place(feature, chunk));
        }
    }

    template <int Rows> SK_DEVICE void issue(const Ticket &ticket, Shared weights) const {
        const int pieces = bit_count(ticket.present) << pieces_log_;
        const int rank = ticket.present & own_ ? bit_count(ticket.present & (own_ - 1)) : -1;
        SK_NO_UNROLL
        for (int i = warp_; i < pieces; i += warps_) {
            const int block = i >> pieces_log_, piece = i & ((1 << pieces_log_) - 1);
            const int holder = Rows == 1 ? block : first_bit(ballot(rank == block));
            const auto slot = static_cast<uint32_t>(shuffle(ticket.block, holder));
            const char *source = source_ + uint64_t{slot} * a_.block_bytes + piece_source(piece, ticket.part);
            const int to = (i - piece) * PIECE + piece_to(piece);
            cp_async_16(weights + static_cast<Shared>(to), source, 16);
        }
    }

private:
    static constexpr int LINE_ROWS = 8 / Step::row_chunks;           // rows of a slice in 128 bytes
    static constexpr int PIECE_ROWS = 4 * LINE_ROWS / Tile::SLICES;  // of a transposed block
    static constexpr int STEP_PIECES = E::depth / PIECE_ROWS;

    // Features of a piece of a block that is not transposed: it holds all steps of the stage.
    SK_DEVICE int features_log() const { return 4 - a_.steps_log; }

    SK_DEVICE int piece_source(int piece, int part) const {
        return Transposed ? piece * PIECE + part * (STEPS * Tile::step_bytes)
                          : (piece << features_log()) * a_.weight_row_bytes + part * ROW_BYTES;
    }
    // Where this lane's 16 bytes of a piece lie in the block.
    SK_DEVICE int piece_to(int piece) const {
        if constexpr (Transposed) {
            return (to_ ^ Step::place(piece % STEP_PIECES * PIECE_ROWS, 0)) + piece / STEP_PIECES * Tile::step_bytes;
        } else {
            return to_ ^ Step::place(piece << features_log(), 0);
        }
    }

    const Args &a_;
    const int warp_, warps_, pieces_log_;
    const uint32_t own_;  // this lane's bit
    const char *source_;  // of this lane's 16 bytes of the first piece: in the first slot, and where they go
    int to_;
};

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern
