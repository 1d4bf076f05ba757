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
    SK_DEVICE PixelCopy(const Args &a, const Spot &spot, int warp) : unit_bytes_(a.unit_bytes) {
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
        to_ = static_cast<Shared>(chunk_place(warp * 32 + first_row, lane_id() & (STEP_LANES - 1)));
    }

    SK_DEVICE void issue(const Ticket &ticket, Shared stage) const {
        if (unit_bytes_ == 16) {
            copy_chunks(ticket, stage + to_);
        } else {
            copy_elements(ticket, stage + to_);
        }
    }

private:
    static constexpr int ROW_STRIDE = 32 / STEP_LANES, ROWS = 32 / ROW_STRIDE;

    // Tap bits of the pixel whose taps start at (y, x) of the source.
    SK_DEVICE static uint32_t taps_inside(const Args &a, const Spot &spot, int y, int x) {
        uint32_t bits = 0;
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
        const char *source = base_ + int64_t{ticket.where} * 16;
        SK_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const bool inside = (ticket.taps & ~taps_[i]) == 0;
            const int place = inside ? place_[i] : -ticket.where;
            cp_async_16(row_of(to, i), source + int64_t{place} * 16, inside ? 16 : 0);
        }
    }

    SK_DEVICE void copy_elements(const Ticket &ticket, Shared to) const {
        SK_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const bool inside = (ticket.taps & ~taps_[i]) == 0;
            const char *source = base_ + (int64_t{place_[i]} + ticket.where) * E::bytes;
            store_shared(row_of(to, i), BoxWalk<E>::gather(reinterpret_cast<const typename E::Storage *>(source),
                                                           inside ? ticket.elements : 0));
        }
    }

    const int unit_bytes_;
    const char *base_;     // of the tile's first image and the group's first channel
    int place_[ROWS];      // of the lane's pixels, in units from there
    uint32_t taps_[ROWS];  // that lie in the image
    Shared to_;
};

// Weights of a stage: the blocks present, by entry and then by row. A block is STEPS_OF_STAGE x SLICES tiles, each one
// step of Nb features (fragments.cuh).
template <class E, bool Transposed, int Edge> struct WeightTile {
    static constexpr int Nb = Edge < 32 ? Edge : 32;
    static constexpr int SLICES = Edge / Nb;
    using Step = WeightStep<E, Transposed, Nb>;
    static constexpr int step_bytes = SLICES * Step::bytes;  // of one block

    SK_DEVICE static int pieces_log(int steps_log) { return first_bit(Edge / 16) + steps_log; }
};

// Pieces of 512 bytes, one a warp and instruction. From the source whole rows of up to 128 bytes are read, and any 8
// neighbouring lanes write to different banks.
struct Piece {
    int source, to;  // of a lane's 16 bytes, in the block and in its place in the stage
};

template <class E, int Edge> SK_DEVICE Piece forward_piece(const Args &a, int piece, int part, int lane) {
    using Tile = WeightTile<E, false, Edge>;
    // Lanes are (step, feature, chunk of the step).
    const int features_log = 4 - a.steps_log, step = lane >> (features_log + 1), chunk = lane & 1;
    const int feature = (piece << features_log) + ((lane >> 1) & ((1 << features_log) - 1));
    const int slice = feature / Tile::Nb;
    return {feature * a.weight_row_bytes + part * ROW_BYTES + step * 32 + chunk * 16,
            step * Tile::step_bytes + slice * Tile::Step::bytes + Tile::Step::place(feature % Tile::Nb, chunk)};
}

template <class E, int Edge> SK_DEVICE Piece transposed_piece(int piece, int part, int lane) {
    using Tile = WeightTile<E, true, Edge>;
    constexpr int chunks = Tile::Step::row_chunks, line_rows = 8 / chunks;
    // Lanes are (rows of a line of 128 bytes, slice, row of the line, chunk).
    const int i = piece * 32 + lane, line = i / 8;
    const int row = line / Tile::SLICES * line_rows + i % 8 / chunks, slice = line % Tile::SLICES, chunk = i % chunks;
    const int step = row / E::depth;
    return {part * (STEPS * Tile::step_bytes) + row * (Edge * E::bytes) + (slice * chunks + chunk) * 16,
            step * Tile::step_bytes + slice * Tile::Step::bytes + Tile::Step::place(row % E::depth, chunk)};
}

template <class E, bool Transposed, int Edge, int Rows>
SK_DEVICE void copy_weights(const Args &a, const Ticket &ticket, Shared stage, int warp, int warps) {
    const int pieces_log = WeightTile<E, Transposed, Edge>::pieces_log(a.steps_log);
    const int pieces = bit_count(ticket.present) << pieces_log, lane = lane_id();
    const int rank = bit_count(ticket.present & ((1u << lane) - 1));
    const bool present = ticket.present >> lane & 1;
    SK_NO_UNROLL
    for (int i = warp; i < pieces; i += warps) {
        const int nth = i >> pieces_log, piece = i & ((1 << pieces_log) - 1);
        const int holder = Rows == 1 ? nth : first_bit(ballot(present && rank == nth));
        const char *block = a.values + shuffle(ticket.block, holder) * a.block_bytes;
        const Piece at = Transposed ? transposed_piece<E, Edge>(piece, ticket.part, lane)
                                    : forward_piece<E, Edge>(a, piece, ticket.part, lane);
        const int first = nth << (pieces_log + 9);
        cp_async_16(stage + static_cast<Shared>(first + at.to), block + at.source, 16);
    }
}

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern
