// SPDX-License-Identifier: Apache-2.0
// Boxes of pixels from a channels_last image into shared memory.
//
// Alignment: `to`, `pitch` and padded * E::bytes are multiples of 16. Copies are asynchronous, 16 bytes each, where the
// first channel of every pixel lies on 16 bytes: image.data + first and image.ld are multiples of 16 bytes (`count` may
// be ragged). Else elements are loaded one by one and stored, 16 bytes at a time.
#pragma once

#include "primitives.cuh"

namespace sparsekern {
namespace cuda {

// ld elements from one pixel to the next, channels contiguous, images dense in n, h, w. A matrix [M, K] is n = M images
// of one pixel.
struct Image {
    const void *data;
    int64_t n;
    int h, w;
    int64_t ld;
};

struct Box {
    int images, height, width;
};

// The chunks of 16 bytes that one thread copies: every `threads`-th of the box. Places are digits (image, row, column,
// chunk), and a step is an addition with carries, because a division per chunk costs more than the copy. Where a kernel
// loads many boxes of one size, it keeps the walk.
template <class E> class BoxWalk {
public:
    static constexpr int chunk = 16 / E::bytes;

    SK_DEVICE BoxWalk(const Box &box, int padded, int thread, int threads) : box_(box), chunks_(padded / chunk) {
        start_ = digits(thread);
        step_ = digits(threads);
    }

    // Pixel (n0, y0, x0) of the image is the box's first; it may lie outside.
    SK_DEVICE void load(Shared to, int pitch, const Image &image, int64_t n0, int y0, int x0, int first,
                        int count) const {
        const auto *data = static_cast<const typename E::Storage *>(image.data) + first;
        const bool aligned =
            (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(image.ld * E::bytes)) % 16 == 0;
        const auto each_chunk = [&](const auto &copy) {
            walk(to, pitch, [&](Shared at, const Place &a) {
                const int64_t n = n0 + a.image;
                const int y = y0 + a.y, x = x0 + a.x, channel = a.chunk * chunk;
                const bool inside = n >= 0 && n < image.n && y >= 0 && y < image.h && x >= 0 && x < image.w;
                const int elements = inside ? clamp(count - channel) : 0;
                copy(at, elements ? data + (((n * image.h + y) * image.w + x) * image.ld + channel) : data, elements);
            });
        };
        if (aligned) {
            each_chunk([](Shared at, const auto *from, int elements) { cp_async_16(at, from, elements * E::bytes); });
        } else {
            each_chunk(
                [](Shared at, const auto *from, int elements) { store_shared(at, BoxWalk::gather(from, elements)); });
        }
    }

    // One chunk, element by element; zeros after the first `elements`.
    SK_DEVICE static Words4 gather(const typename E::Storage *source, int elements) {
        constexpr int per_word = 4 / E::bytes;
        uint32_t words[4] = {0, 0, 0, 0};
        SK_UNROLL
        for (int i = 0; i < chunk; ++i) {
            if (i < elements) words[i / per_word] |= uint32_t{load_global(source + i)} << (i % per_word * 16);
        }
        return {words[0], words[1], words[2], words[3]};
    }

private:
    struct Place {
        int image, y, x, chunk;
    };

    SK_DEVICE Place digits(int i) const {
        Place a;
        a.chunk = i % chunks_, i /= chunks_;
        a.x = i % box_.width, i /= box_.width;
        a.y = i % box_.height, a.image = i / box_.height;
        return a;
    }

    SK_DEVICE void advance(Place &a) const {
        a.chunk += step_.chunk, a.x += step_.x, a.y += step_.y, a.image += step_.image;
        if (a.chunk >= chunks_) a.chunk -= chunks_, ++a.x;
        if (a.x >= box_.width) a.x -= box_.width, ++a.y;
        if (a.y >= box_.height) a.y -= box_.height, ++a.image;
    }

    template <class Visit> SK_DEVICE void walk(Shared to, int pitch, const Visit &visit) const {
        for (Place a = start_; a.image < box_.images; advance(a)) {
            const int row = (a.image * box_.height + a.y) * box_.width + a.x;
            visit(to + static_cast<Shared>(row * pitch + a.chunk * 16), a);
        }
    }

    SK_DEVICE static int clamp(int elements) { return elements < 0 ? 0 : elements > chunk ? chunk : elements; }

    Box box_;
    int chunks_;
    Place start_, step_;
};

// Rows of shared memory `pitch` bytes apart, one per pixel of the box (image-major): channels [first, first + count),
// then zeros up to `padded`; pixels outside the image or batch: zeros. All `threads` threads call it. No commit and no
// barrier: the caller waits for its copies and then meets the others.
template <class E>
SK_DEVICE void load_box(Shared to, int pitch, const Image &image, const Box &box, int64_t n0, int y0, int x0, int first,
                        int count, int padded, int thread, int threads) {
    BoxWalk<E>(box, padded, thread, threads).load(to, pitch, image, n0, y0, x0, first, count);
}

}  // namespace cuda
}  // namespace sparsekern
