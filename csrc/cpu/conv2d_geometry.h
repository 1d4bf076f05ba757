// SPDX-License-Identifier: Apache-2.0
// Geometry shared by the three convolution passes. A strided image is cut into phases (rows y with equal y mod stride,
// columns likewise); between phases every tap is a constant shift, so no kernel ever sees a stride:
//   forward, wgrad:  y[i] reads phase f(r) of x at i + shift(r)
//   dgrad:           phase f(r) of dx at i reads dy at i + shift(r), the same f and the opposite shift
#pragma once

#include "simd.h"
#include "threads.h"

namespace sparsekern {
namespace SK_ISA {

SK_INLINE int64_t floor_div(int64_t a, int64_t b) {
    return a >= 0 ? a / b : -((b - 1 - a) / b);
}

// One spatial dimension of a pass that reads `in` and walks the grid of `out` (one phase of it for dgrad) in tiles.
struct Dim {
    int64_t taps, stride, dilation, pad;
    int64_t in_size, out_size, in_phases, out_phases;
    bool flipped;        // dgrad
    int64_t low, high;   // least and greatest shift
    int64_t grid, tile;  // positions of the longest phase of `out`, and of them in one tile

    Dim(int64_t taps, int64_t stride, int64_t dilation, int64_t pad, int64_t in_size, int64_t out_size, bool flipped)
        : taps(taps), stride(stride), dilation(dilation), pad(pad), in_size(in_size), out_size(out_size),
          in_phases(flipped ? 1 : stride), out_phases(flipped ? stride : 1), flipped(flipped) {
        const int64_t first = shift(0), last = shift(taps - 1);
        low = min64(first, last);
        high = max64(first, last);
        grid = tile = ceil_div(out_size, out_phases);
    }
    int64_t shift(int64_t tap) const {
        const int64_t floor = floor_div(tap * dilation - pad, stride);
        return flipped ? -floor : floor;
    }
    int64_t phase(int64_t tap) const {
        const int64_t at = tap * dilation - pad;
        return at - floor_div(at, stride) * stride;
    }
    int64_t in_phase(int64_t tap) const { return flipped ? 0 : phase(tap); }
    int64_t out_phase(int64_t tap) const { return flipped ? phase(tap) : 0; }
    int64_t in_count(int64_t phase) const { return in_size > phase ? ceil_div(in_size - phase, in_phases) : 0; }
    int64_t out_count(int64_t phase) const { return out_size > phase ? ceil_div(out_size - phase, out_phases) : 0; }
    int64_t extent() const { return tile + high - low; }  // positions of one phase that a tile's copy holds
    int64_t tiles() const { return ceil_div(grid, tile); }
    void split(int64_t parts) { tile = max64(1, ceil_div(grid, max64(1, parts))); }
    // Whether position i of `out` finds tap r inside the image.
    bool inside(int64_t tap, int64_t i) const {
        const int64_t at = i + shift(tap);
        return at >= 0 && at < in_count(in_phase(tap));
    }
};

// An image tensor [N, C, H, W] in either memory order; channel 0 is the first of one group.
template <class T> struct Image {
    T *data;
    int64_t c, h, w;  // of the whole tensor
    bool channels_last;

    T *at(int64_t n, int64_t channel, int64_t y, int64_t x) const {
        return channels_last ? data + ((n * h + y) * w + x) * c + channel : data + ((n * c + channel) * h + y) * w + x;
    }
};

// Copy of the part of the input that one tile reads, zero outside the image: [image][channel /
// unit][phase][row][column] [unit], unit = 1 (planes: kernels with vectors along pixels) or the block's channels
// (kernels with vectors along channels). A vector may read up to LANES floats past the last column. Reading
// channels_last images in place instead gained 4 % at 64 channels and lost 3 to 20 % at 128 and 256, where pixels a
// power of two apart share cache sets.
struct Window {
    int64_t unit;          // channels side by side
    int64_t pitch, plane;  // floats between rows, and of one phase
    int64_t group, image;  // floats between groups of `unit` channels, and between images

    Window(const Dim &h, const Dim &w, int64_t channels, int64_t unit) : unit(unit) {
        pitch = w.extent() * unit;
        plane = h.extent() * pitch;
        // An odd number of cache lines: channels a power of two apart would fall into few sets of the L1 cache.
        group = (ceil_div(h.in_phases * w.in_phases * plane + LANES, 16) | 1) * 16;
        image = ceil_div(channels, unit) * group;
    }
    int64_t tap(const Dim &h, const Dim &w, int64_t r, int64_t s) const {
        return (h.in_phase(r) * w.in_phases + w.in_phase(s)) * plane + (h.shift(r) - h.low) * pitch +
               (w.shift(s) - w.low) * unit;
    }
};

// dst[c * ld_dst + r] = src[r * ld_src + c]; touches exactly rows x cols floats on both sides.
template <int L>
SK_INLINE void transpose_exact(const float *src, int64_t ld_src, int64_t rows, int64_t cols, float *dst,
                               int64_t ld_dst) {
    for (int64_t r = 0; r < rows; r += L) {
        const int64_t height = min64(L, rows - r);
        for (int64_t c = 0; c < cols; c += L) {
            const int64_t width = min64(L, cols - c);
            const float *s = src + r * ld_src + c;
            float *d = dst + c * ld_dst + r;
            Vec<L> t[L];
            if (height == L && width == L) {
                SK_UNROLL
                for (int i = 0; i < L; ++i) t[i] = load<L>(s + i * ld_src);
                transpose(t);
                SK_UNROLL
                for (int i = 0; i < L; ++i) store<L>(d + i * ld_dst, t[i]);
            } else {
                for (int i = 0; i < L; ++i) t[i] = i < height ? load_partial<L>(s + i * ld_src, width) : Vec<L>{};
                transpose(t);
                for (int64_t i = 0; i < width; ++i) store_partial<L>(d + i * ld_dst, t[i], height);
            }
        }
    }
}

static void transpose_any(const float *src, int64_t ld_src, int64_t rows, int64_t cols, float *dst, int64_t ld_dst) {
    if (LANES == 16 && (rows <= 8 || cols <= 8))
        transpose_exact<LANES == 16 ? 8 : LANES>(src, ld_src, rows, cols, dst, ld_dst);
    else
        transpose_exact<LANES>(src, ld_src, rows, cols, dst, ld_dst);
}

SK_INLINE void copy_floats(const float *src, float *dst, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store<LANES>(dst + i, load<LANES>(src + i));
    if (i < count) store_partial<LANES>(dst + i, load_partial<LANES>(src + i, count - i), count - i);
}

SK_INLINE void copy_every(const float *src, int64_t step, float *dst, int64_t count) {
    if (step == 1) return copy_floats(src, dst, count);
    for (int64_t i = 0; i < count; ++i) dst[i] = src[i * step];
}

// Fills the in-image part of `dst` (one image of a Window) for the tile that starts at grid position (top, left); the
// rest must be zero already. Channels first .. first + channels of image n.
static void copy_in(const Image<const float> &image, int64_t n, int64_t first, int64_t channels, const Dim &h,
                    const Dim &w, int64_t top, int64_t left, const Window &window, float *dst) {
    for (int64_t fh = 0; fh < h.in_phases; ++fh)
        for (int64_t fw = 0; fw < w.in_phases; ++fw, dst += window.plane) {
            const int64_t row0 = top + h.low, col0 = left + w.low;
            const int64_t i0 = max64(0, -row0), i1 = min64(h.extent(), h.in_count(fh) - row0);
            const int64_t j0 = max64(0, -col0), count = min64(w.extent(), w.in_count(fw) - col0) - j0;
            if (count <= 0) continue;
            const int64_t x = (col0 + j0) * w.in_phases + fw;
            if (image.channels_last) {
                for (int64_t i = i0; i < i1; ++i) {
                    const float *src = image.at(n, first, (row0 + i) * h.in_phases + fh, x);
                    float *out = dst + i * window.pitch + j0 * window.unit;
                    if (window.unit == 1) {
                        transpose_any(src, image.c * w.in_phases, count, channels, out, window.group);
                        continue;
                    }
                    for (int64_t c = 0; c < channels; c += window.unit, out += window.group)
                        for (int64_t j = 0; j < count; ++j)
                            copy_floats(src + j * w.in_phases * image.c + c, out + j * window.unit,
                                        min64(window.unit, channels - c));
                }
            } else if (window.unit == 1) {
                for (int64_t c = 0; c < channels; ++c)
                    for (int64_t i = i0; i < i1; ++i)
                        copy_every(image.at(n, first + c, (row0 + i) * h.in_phases + fh, x), w.in_phases,
                                   dst + c * window.group + i * window.pitch + j0, count);
            } else {
                float row[LANES * LANES];
                for (int64_t c = 0; c < channels; c += window.unit)
                    for (int64_t i = i0; i < i1; ++i) {
                        const float *src = image.at(n, first + c, (row0 + i) * h.in_phases + fh, x);
                        float *out = dst + c / window.unit * window.group + i * window.pitch + j0 * window.unit;
                        const int64_t width = min64(window.unit, channels - c);
                        if (w.in_phases == 1) {
                            transpose_any(src, image.h * image.w, width, count, out, window.unit);
                            continue;
                        }
                        for (int64_t j = 0; j < count; j += LANES)
                            for (int64_t k = 0; k < width; k += LANES) {
                                const int64_t cols = min64(LANES, count - j), rows = min64(LANES, width - k);
                                for (int64_t l = 0; l < rows; ++l)
                                    copy_every(src + (k + l) * image.h * image.w + j * w.in_phases, w.in_phases,
                                               row + l * LANES, cols);
                                transpose_any(row, LANES, rows, cols, out + j * window.unit + k, window.unit);
                            }
                    }
            }
        }
}

}  // namespace SK_ISA
}  // namespace sparsekern
