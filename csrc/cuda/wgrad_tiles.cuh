// SPDX-License-Identifier: Apache-2.0
// Tiles of dy and x on their way to shared memory. They are loaded once per multiplied tile, so that a copy must cost
// few instructions: a table in shared memory holds each pixel's place in its image, and a few threads copy one pixel.
#pragma once

#include "box.cuh"
#include "wgrad_cut.h"

namespace sparsekern {
namespace cuda {

// Tile `n`, `y`, `x` of the output, in tiles.
struct TilePlace {
    int n, y, x;
};

SK_DEVICE TilePlace tile_place(const WgradCut &cut, int64_t tile) {
    TilePlace at;
    at.x = static_cast<int>(tile % cut.tiles_w), tile /= cut.tiles_w;
    at.y = static_cast<int>(tile % cut.tiles_h), at.n = static_cast<int>(tile / cut.tiles_h);
    return at;
}

SK_DEVICE void next_tile(const WgradCut &cut, TilePlace &at) {
    if (++at.x < cut.tiles_w) return;
    at.x = 0;
    if (++at.y < cut.tiles_h) return;
    at.y = 0, ++at.n;
}

// A pixel of a tile: how far it lies from the tile's first pixel, in pixels of the image, and its row and column.
struct PixelPlace {
    int from_first, y, x;
};

// Written once by all threads; read as 8 bytes.
SK_DEVICE void write_places(Shared table, const TileCut &tile, const Image &image) {
    for (int row = thread_id(); row < tile.rows; row += thread_count()) {
        const int x = row % tile.width, line = row / tile.width, y = line % tile.height, n = line / tile.height;
        const int from_first = (n * image.h + y) * image.w + x;
        store_shared(table + row * 8, Words2{static_cast<uint32_t>(from_first), static_cast<uint32_t>(y << 16 | x)});
    }
}

SK_DEVICE PixelPlace read_place(Shared table, int row) {
    const Words2 words = load_shared<Words2>(table + row * 8);
    return {static_cast<int>(words.x), static_cast<int>(words.y >> 16), static_cast<int>(words.y & 0xffff)};
}

// The channels [first, first + count) of a tile's pixels, then zeros up to `padded`. They wait in shared memory,
// because the multiplication takes all registers.
struct Channels {
    int first, count, padded;
};

SK_DEVICE void write_channels(const TileCut &tile, const Channels &a) {
    store_shared(shared_memory() + tile.channels, Words4{static_cast<uint32_t>(a.first), static_cast<uint32_t>(a.count),
                                                         static_cast<uint32_t>(a.padded), 0});
}
SK_DEVICE Channels read_channels(const TileCut &tile) {
    const Words4 words = load_shared<Words4>(shared_memory() + tile.channels);
    return {static_cast<int>(words.x), static_cast<int>(words.y), static_cast<int>(words.z)};
}

constexpr int COPY_STEP = 16 * COPY_LANES;

// The calling thread among those that copy a tile; those that copy the tile of dy come last for x.
SK_DEVICE int copy_thread(const TileCut &tile) {
    const int thread = thread_id() - tile.turn;
    return thread < 0 ? thread + thread_count() : thread;
}

// One thread's share of one pixel: chunks `lane`, `lane` + COPY_LANES, ...; zeros where it lies outside.
template <class E>
SK_DEVICE void copy_pixel(Shared to, const char *from, const char *valid, bool inside, const Channels &channels,
                          int lane) {
    const int count = inside ? channels.count * E::bytes : 0;
    int at = lane * 16;
    // Whole chunks, and 4 of them, by themselves: lengths and distances that the compiler knows take few instructions.
    for (; at + 3 * COPY_STEP + 16 <= count; at += 4 * COPY_STEP) {
        SK_UNROLL
        for (int i = 0; i < 4; ++i) cp_async_16(to + at + i * COPY_STEP, from + at + i * COPY_STEP, 16);
    }
    SK_NO_UNROLL
    for (; at + 16 <= count; at += COPY_STEP) cp_async_16(to + at, from + at, 16);
    SK_NO_UNROLL
    for (; at < channels.padded * E::bytes; at += COPY_STEP) {
        cp_async_16(to + at, at < count ? from + at : valid, at < count ? count - at : 0);
    }
}

// The same where pixels don't lie on 16 bytes: element by element.
template <class E>
SK_DEVICE void gather_pixel(Shared to, const char *from, bool inside, const Channels &channels, int lane) {
    const int count = inside ? channels.count * E::bytes : 0;
    SK_NO_UNROLL
    for (int at = lane * 16; at < channels.padded * E::bytes; at += COPY_STEP) {
        const int left = count - at, bytes = left < 0 ? 0 : left < 16 ? left : 16;
        store_shared(to + at,
                     BoxWalk<E>::gather(reinterpret_cast<const typename E::Storage *>(from + at), bytes / E::bytes));
    }
}

// The tile whose first pixel is (n0, y0, x0), which may lie outside of the image. No commit and no barrier.
template <class E>
SK_DEVICE void copy_tile(Shared to, const TileCut &tile, const Image &image, bool aligned, int64_t n0, int y0, int x0) {
    int row = copy_thread(tile) / COPY_LANES;
    if (row >= tile.rows) return;
    const Channels channels = read_channels(tile);
    const int lane = thread_id() % COPY_LANES, pixel_bytes = static_cast<int>(image.ld) * E::bytes;
    const char *data = static_cast<const char *>(image.data) + int64_t{channels.first} * E::bytes;
    const char *first = data + ((n0 * image.h + y0) * image.w + x0) * pixel_bytes;
    const int64_t images_left = image.n - n0;
    const int per_image = tile.height * tile.width;
    const int rows_left = images_left * per_image < tile.rows ? static_cast<int>(images_left) * per_image : tile.rows;
    for (; row < tile.rows; row += thread_count() / COPY_LANES) {
        const PixelPlace at = read_place(shared_memory() + tile.places, row);
        const bool inside = row < rows_left && static_cast<unsigned>(y0 + at.y) < static_cast<unsigned>(image.h) &&
                            static_cast<unsigned>(x0 + at.x) < static_cast<unsigned>(image.w);
        const char *from = first + int64_t{at.from_first} * pixel_bytes;
        if (aligned) {
            copy_pixel<E>(to + row * tile.pitch, from, data, inside, channels, lane);
        } else {
            gather_pixel<E>(to + row * tile.pitch, from, inside, channels, lane);
        }
    }
}

// Rounds what this thread has copied for mma, once it has arrived; 16-bit operands are what they must be. Only for x,
// which every block row of the window reads, because a number of tf32 takes about 3 instructions. dy is rounded as it
// is read, about once: pieces share it, and dbias wants all its digits.
template <class E> SK_DEVICE void round_tile(Shared tile_at, const TileCut &tile) {
    if constexpr (E::bytes == 4) {
        const int lane = thread_id() % COPY_LANES, padded = read_channels(tile).padded;
        for (int row = copy_thread(tile) / COPY_LANES; row < tile.rows; row += thread_count() / COPY_LANES) {
            for (int at = lane * 16; at < padded * E::bytes; at += COPY_STEP) {
                const Shared chunk = tile_at + row * tile.pitch + at;
                const Words4 words = load_shared<Words4>(chunk);
                store_shared(chunk, Words4{round_operand<E>(words.x), round_operand<E>(words.y),
                                           round_operand<E>(words.z), round_operand<E>(words.w)});
            }
        }
    }
}

}  // namespace cuda
}  // namespace sparsekern
