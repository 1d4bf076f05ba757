// SPDX-License-Identifier: Apache-2.0
// A tile of result pixels, the box of source pixels that it reads, and the tables that say which is where.
#pragma once

#include "box.cuh"
#include "stationary_args.h"

namespace sparsekern {
namespace cuda {
namespace stationary_kernel {

// One spatial axis of a block's tile.
struct Side {
    int phase, first;  // result pixel i of the tile is (first + i) * result_step + phase
    Reach reach;
    int extent;  // of the box

    SK_DEVICE static Side make(const Axis &axis, bool transposed, int phase, int tile_index, int tile) {
        const Reach reach = reach_of(axis, transposed, phase);
        return {phase, tile_index * tile, reach, box_extent(axis, transposed, reach, tile)};
    }
    SK_DEVICE int result(const Axis &axis, bool transposed, int i) const {
        return (first + i) * axis.result_step(transposed) + phase;
    }
    SK_DEVICE int source(const Axis &axis, bool transposed) const {
        return first * axis.source_step(transposed) + reach.low;
    }
    // Where the tap lies in the box, in pixels; -1 where it does not exist or reads zeros for every pixel of the tile.
    SK_DEVICE int tap(const Axis &axis, bool transposed, int tap, int tile, int source_pixels) const {
        const int shift = axis.shift(transposed, phase, tap);
        if (shift == NO_TAP) return -1;
        const int step = axis.source_step(transposed), begin = first * step + shift;
        const bool reads = begin < source_pixels && begin + (tile - 1) * step >= 0;
        return reads ? shift - reach.low : -1;
    }
};

template <class E, bool Transposed> class Tile {
public:
    SK_DEVICE explicit Tile(const StationaryArgs &args) : args_(args) {
        int i = block_x();
        const int tile_x = i % args.tiles_x;
        i /= args.tiles_x;
        const int tile_y = i % args.tiles_y;
        i /= args.tiles_y;
        tile_n_ = i % args.tiles_n;
        const int phase = i / args.tiles_n, phases_x = args.x.phases(Transposed);
        x_ = Side::make(args.x, Transposed, phase % phases_x, tile_x, args.tile_w);
        y_ = Side::make(args.y, Transposed, phase / phases_x, tile_y, args.tile_h);
    }

    // Phases differ by a pixel in size, and the grid is cut for the largest.
    SK_DEVICE bool empty() const {
        return y_.result(args_.y, Transposed, 0) >= args_.result_h ||
               x_.result(args_.x, Transposed, 0) >= args_.result_w;
    }

    // The result's pixels before the tile's first image.
    SK_DEVICE int64_t first_pixel() const { return first_image() * args_.result_h * args_.result_w; }

    // All threads; complete after cp_async_wait and a barrier.
    SK_DEVICE void load(Shared to) const {
        const Box box = source_box();
        if (box.height * box.width == 0) return;
        const Image image{args_.source, args_.n, args_.source_h, args_.source_w, args_.source_ld};
        load_box<E>(to, args_.pitch, image, box, first_image(), y_.source(args_.y, Transposed),
                    x_.source(args_.x, Transposed), block_z() * args_.channels, args_.channels,
                    args_.blocks * args_.channel_bytes / E::bytes, thread_id(), thread_count());
    }

    // Rounds the tile to what the multiply instruction takes: once here instead of once per block. Between barriers.
    SK_DEVICE void round(Shared tile) const {
        const Shared end = tile + static_cast<Shared>(args_.tile_images * y_.extent * x_.extent * args_.pitch);
        for (Shared at = tile + static_cast<Shared>(thread_id() * 16); at < end; at += thread_count() * 16) {
            const Words4 words = load_shared<Words4>(at);
            store_shared(at, Words4{round_operand<E>(words.x), round_operand<E>(words.y), round_operand<E>(words.z),
                                    round_operand<E>(words.w)});
        }
    }

    // Per pixel of the tile: byte of its first tap in the tile's memory, and its place in the result after first_pixel,
    // -1 outside.
    SK_DEVICE void fill_pixels(Shared to, int thread, int threads, int pixels) const {
        const Box box = source_box();
        for (int i = thread; i < pixels; i += threads) {
            const int x = i % args_.tile_w, rest = i / args_.tile_w;
            const int y = rest % args_.tile_h, image = rest / args_.tile_h;
            const int box_y = y * args_.y.source_step(Transposed), box_x = x * args_.x.source_step(Transposed);
            const int byte = ((image * box.height + box_y) * box.width + box_x) * args_.pitch;
            const int result_y = y_.result(args_.y, Transposed, y), result_x = x_.result(args_.x, Transposed, x);
            const bool inside =
                first_image() + image < args_.n && result_y < args_.result_h && result_x < args_.result_w;
            const int pixel = inside ? (image * args_.result_h + result_y) * args_.result_w + result_x : -1;
            store_shared(to + static_cast<Shared>(i * 8),
                         Words2{static_cast<uint32_t>(byte), static_cast<uint32_t>(pixel)});
        }
    }

    // Per tap: its shift in bytes, or -1 where no pixel of the tile has it.
    SK_DEVICE void fill_taps(Shared to, int thread, int threads) const {
        for (int i = thread; i < args_.y.taps * args_.x.taps; i += threads) {
            const int r = i / args_.x.taps, s = i % args_.x.taps;
            const int y = y_.tap(args_.y, Transposed, r, args_.tile_h, args_.source_h);
            const int x = x_.tap(args_.x, Transposed, s, args_.tile_w, args_.source_w);
            store_shared(to + static_cast<Shared>(i * 4), y < 0 || x < 0 ? -1 : (y * x_.extent + x) * args_.pitch);
        }
    }

private:
    SK_DEVICE int64_t first_image() const { return int64_t{tile_n_} * args_.tile_images; }
    SK_DEVICE Box source_box() const { return {args_.tile_images, y_.extent, x_.extent}; }

    const StationaryArgs &args_;
    int tile_n_;
    Side y_, x_;
};

}  // namespace stationary_kernel
}  // namespace cuda
}  // namespace sparsekern
