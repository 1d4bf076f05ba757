// SPDX-License-Identifier: Apache-2.0
// dw of every stored block: sums over pixels of dy times shifted x. The images are cut into parts by the shape alone;
// each part has its own sums, added in order at the end, so the result does not depend on the number of threads.
#include <cstring>

#include "conv2d_geometry.h"
#include "conv2d_prefetch.h"
#include "conv2d_tiles.h"

namespace sparsekern {
namespace SK_ISA {
namespace {

constexpr int64_t WGRAD_BUDGET = 160 * 1024;  // floats of both copies of one unit: most of a 1 MB L2 cache
constexpr int64_t MAX_PARTS = 16;
constexpr int64_t PARTS_BUDGET = 4 << 20;  // floats of all partial sums, unless one part alone is more

struct Wgrad {
    const Conv2dArgs &args;
    Dim h, w;
    Image<const float> x, dy;
    int64_t out_per_group, in_per_group;
    bool outer;        // outer products over channel blocks, else dot products over planes
    int lanes;         // of dot products
    int64_t dy_pitch;  // pixels of a row of the copy of dy
    int64_t dy_plane;  // floats of one channel or channel block of it
    int64_t images;    // in one unit
    int64_t batches, units, parts;
};

// Part of the work between two writes of the partial sums.
struct Unit {
    int64_t image, images, top, left, height, width;
};

struct WgradSpace {
    float *x, *dy;
    DotVector *vectors;
    int64_t zeroed_for;
    Prefetch next_x, next_dy;

    void prefetch() {
        next_x.step<0>();
        next_dy.step<0>();
    }
};

Unit unit_at(const Wgrad &g, int64_t index) {
    const int64_t tile = index / g.batches, batch = index % g.batches;
    Unit u;
    u.image = batch * g.images;
    u.images = min64(g.images, g.args.n - u.image);
    u.top = tile / g.w.tiles() * g.h.tile;
    u.left = tile % g.w.tiles() * g.w.tile;
    u.height = min64(g.h.tile, g.h.grid - u.top);
    u.width = min64(g.w.tile, g.w.grid - u.left);
    return u;
}

// Positions of a tile at which tap r reads the image: [begin, end).
void inside_range(const Dim &d, int64_t tap, int64_t first, int64_t count, int64_t &begin, int64_t &end) {
    begin = max64(0, -(first + d.shift(tap)));
    end = min64(count, d.in_count(d.in_phase(tap)) - (first + d.shift(tap)));
    if (end < begin) end = begin;
}

// Copy of dy, channels first .. first + channels: planes of rows padded with zeros, or blocks of channels by pixel.
void copy_dy(const Wgrad &g, const Unit &u, int64_t n, int64_t first, int64_t channels, float *dst) {
    const int64_t bo = g.args.layout.bo;
    for (int64_t i = 0; i < u.height; ++i) {
        const float *src = g.dy.at(n, first, u.top + i, u.left);
        float *row = dst + i * g.dy_pitch * (g.outer ? bo : 1);
        if (!g.outer && g.dy.channels_last)
            transpose_any(src, g.dy.c, u.width, channels, row, g.dy_plane);
        else if (!g.outer)
            for (int64_t c = 0; c < channels; ++c)
                copy_floats(src + c * g.dy.h * g.dy.w, row + c * g.dy_plane, u.width);
        else
            for (int64_t c = 0; c < channels; c += bo, row += g.dy_plane) {
                const int64_t width = min64(bo, channels - c);
                if (!g.dy.channels_last)
                    transpose_any(src + c * g.dy.h * g.dy.w, g.dy.h * g.dy.w, width, u.width, row, bo);
                else
                    for (int64_t j = 0; j < u.width; ++j) copy_floats(src + j * g.dy.c + c, row + j * bo, width);
            }
    }
}

template <int L, int LOG_BM>
void dot_rows(const Wgrad &g, const Unit &u, const Window &window, WgradSpace &space, const float *dy, int64_t row,
              int64_t m0, int64_t m1, float *sums) {
    constexpr int BM = 1 << LOG_BM, BC = DOT_TILE / BM;
    const Layout &l = g.args.layout;
    const int64_t per_row = ceil_div(u.width, L);
    const DotImages images{u.images, window.image, l.rows * l.bo * g.dy_plane};
    int32_t column[BC];
    int64_t target[BC];
    float tile[DOT_TILE];
    int count = 0;
    int64_t begin = u.height, end = 0;
    const auto flush = [&] {
        space.prefetch();
        if (end > begin)
            for (int64_t m = m0; m < m1; m += BM) {
                for (int c = count; c < BC; ++c) column[c] = column[0];
                dot_tile<L, BM>(dy + m * g.dy_plane, g.dy_plane, space.x, column, space.vectors + begin * per_row,
                                space.vectors + end * per_row, images, tile);
                for (int i = 0; i < BM; ++i)
                    for (int c = 0; c < count; ++c) sums[target[c] + (m + i) * l.bi] += tile[i * BC + c];
            }
        count = 0;
        begin = u.height, end = 0;
    };
    for (int64_t slot = l.row_ptr[row]; slot < l.row_ptr[row + 1]; ++slot) {
        const int64_t tap = l.col[slot] / l.cols, block = l.col[slot] % l.cols;
        const int64_t r = tap / g.w.taps, s = tap % g.w.taps;
        int64_t i0, i1;
        inside_range(g.h, r, u.top, u.height, i0, i1);
        if (i0 == i1) continue;
        const int64_t depth = min64(l.bi, g.in_per_group - block * l.bi), shift = window.tap(g.h, g.w, r, s);
        for (int64_t k = 0; k < depth; ++k) {
            column[count] = int32_t((block * l.bi + k) * window.group + shift);
            target[count++] = slot * l.bo * l.bi + k;
            begin = min64(begin, i0), end = max64(end, i1);
            if (count == BC) flush();
        }
    }
    if (count) flush();
}

template <int L>
void dot_block_row(const Wgrad &g, const Unit &u, const Window &window, WgradSpace &space, const float *dy, int64_t row,
                   int64_t channels, float *sums) {
    int64_t m = 0;
    if constexpr (MAX_LOG_DOT == 2) {
        if (channels >= 4) dot_rows<L, 2>(g, u, window, space, dy, row, 0, channels & ~int64_t{3}, sums);
        m = channels & ~int64_t{3};
    }
    if (channels - m >= 2) dot_rows<L, 1>(g, u, window, space, dy, row, m, channels & ~int64_t{1}, sums);
    if (channels & 1) dot_rows<L, 0>(g, u, window, space, dy, row, channels - 1, channels, sums);
}

template <int BM, int VK>
int64_t outer_rows(const PixelBlock &dy, const PixelBlock &x, const Unit &u, int64_t rows, int64_t cols, int64_t m,
                   int64_t channels, float *dw, int64_t ld) {
    for (; m + BM <= channels; m += BM) {
        PixelBlock part = dy;
        part.data += m;
        outer_tile<LANES, BM, VK>(part, x, u.images, rows, cols, dw + m * ld, ld);
    }
    return m;
}

void outer_block_row(const Wgrad &g, const Unit &u, const Window &window, WgradSpace &space, const float *dy,
                     int64_t row, int64_t channels, float *sums) {
    const Layout &l = g.args.layout;
    for (int64_t slot = l.row_ptr[row]; slot < l.row_ptr[row + 1]; ++slot) {
        const int64_t tap = l.col[slot] / l.cols, block = l.col[slot] % l.cols;
        const int64_t r = tap / g.w.taps, s = tap % g.w.taps;
        int64_t i0, i1, j0, j1;
        inside_range(g.h, r, u.top, u.height, i0, i1);
        inside_range(g.w, s, u.left, u.width, j0, j1);
        if (i0 == i1 || j0 == j1) continue;
        const PixelBlock gy{dy + (i0 * g.dy_pitch + j0) * l.bo, l.bo, g.dy_pitch * l.bo, l.rows * g.dy_plane};
        PixelBlock x{space.x + block * window.group + window.tap(g.h, g.w, r, s) + i0 * window.pitch + j0 * l.bi, l.bi,
                     window.pitch, window.image};
        float *dw = sums + slot * l.bo * l.bi;
        space.prefetch();
        int64_t k = 0;
        for (; k + 2 * LANES <= l.bi; k += 2 * LANES, x.data += 2 * LANES) {
            int64_t m = outer_rows<REGISTERS == 32 ? 12 : 6, 2>(gy, x, u, i1 - i0, j1 - j0, 0, channels, dw + k, l.bi);
            if (REGISTERS == 32) m = outer_rows<8, 2>(gy, x, u, i1 - i0, j1 - j0, m, channels, dw + k, l.bi);
            m = outer_rows<4, 2>(gy, x, u, i1 - i0, j1 - j0, m, channels, dw + k, l.bi);
            m = outer_rows<2, 2>(gy, x, u, i1 - i0, j1 - j0, m, channels, dw + k, l.bi);
            outer_rows<1, 2>(gy, x, u, i1 - i0, j1 - j0, m, channels, dw + k, l.bi);
        }
        for (; k + LANES <= l.bi; k += LANES, x.data += LANES) {
            int64_t m = outer_rows<REGISTERS == 32 ? 16 : 8, 1>(gy, x, u, i1 - i0, j1 - j0, 0, channels, dw + k, l.bi);
            if (REGISTERS == 32) m = outer_rows<8, 1>(gy, x, u, i1 - i0, j1 - j0, m, channels, dw + k, l.bi);
            m = outer_rows<4, 1>(gy, x, u, i1 - i0, j1 - j0, m, channels, dw + k, l.bi);
            m = outer_rows<2, 1>(gy, x, u, i1 - i0, j1 - j0, m, channels, dw + k, l.bi);
            outer_rows<1, 1>(gy, x, u, i1 - i0, j1 - j0, m, channels, dw + k, l.bi);
        }
    }
}

void add_bias_sums(const Wgrad &g, const Unit &u, const float *dy, int64_t channels, float *sums) {
    const int64_t bo = g.args.layout.bo;
    for (int64_t n = 0; n < u.images; ++n, dy += g.args.layout.rows * (g.outer ? 1 : bo) * g.dy_plane) {
        if (g.outer) {
            for (int64_t i = 0; i < u.height; ++i)
                for (int64_t j = 0; j < u.width; ++j)
                    for (int64_t m = 0; m < channels; ++m) sums[m] += dy[(i * g.dy_pitch + j) * bo + m];
            continue;
        }
        for (int64_t m = 0; m < channels; ++m) {
            Vec<LANES> acc = {};
            for (int64_t i = 0; i < u.height * g.dy_pitch; i += LANES) acc += load<LANES>(dy + m * g.dy_plane + i);
            sums[m] += sum<LANES>(acc);
        }
    }
}

// Adds one unit's sums for block rows row0 .. row1 of a group.
void run_unit(const Wgrad &g, const Unit &u, const Window &window, int64_t group, int64_t row0, int64_t row1,
              WgradSpace &space, float *sums, float *bias_sums) {
    const Layout &l = g.args.layout;
    const int64_t dy_blocks = g.outer ? 1 : l.bo, dy_image = l.rows * dy_blocks * g.dy_plane;
    const int64_t tile_key = u.top * (g.w.grid + 1) + u.left;
    if (space.zeroed_for != tile_key) {
        memset(space.x, 0, sizeof(float) * size_t(g.images * window.image));
        memset(space.dy, 0, sizeof(float) * size_t(g.images * dy_image));
        space.zeroed_for = tile_key;
    }
    const int64_t first = row0 * l.bo, channels = min64(g.out_per_group, row1 * l.bo) - first;
    for (int64_t n = 0; n < u.images; ++n) {
        copy_in(g.x, u.image + n, group * g.in_per_group, g.in_per_group, g.h, g.w, u.top, u.left, window,
                space.x + n * window.image);
        copy_dy(g, u, u.image + n, group * g.out_per_group + first, channels,
                space.dy + n * dy_image + row0 * dy_blocks * g.dy_plane);
    }
    if (!g.outer) {
        DotVector *v = space.vectors;
        for (int64_t i = 0; i < u.height; ++i)
            for (int64_t j = 0; j < u.width; j += g.lanes)
                *v++ = {int32_t(i * window.pitch + j), int32_t(i * g.dy_pitch + j)};
    }
    for (int64_t row = row0; row < row1; ++row) {
        const float *dy = space.dy + row * dy_blocks * g.dy_plane;
        const int64_t count = min64(l.bo, g.out_per_group - row * l.bo);
        constexpr int HALF = LANES == 16 ? 8 : LANES;
        const auto run = g.outer ? &outer_block_row : g.lanes == LANES ? &dot_block_row<LANES> : &dot_block_row<HALF>;
        run(g, u, window, space, dy, group * l.rows + row, count, sums);
        if (bias_sums) add_bias_sums(g, u, dy, count, bias_sums + group * g.out_per_group + row * l.bo);
    }
}

// Fetches what a unit reads while the one before it is computed: between dot tiles, or between blocks.
void prefetch_unit(const Wgrad &g, const Unit &u, int64_t group, int64_t row0, int64_t row1, WgradSpace &space) {
    const Layout &l = g.args.layout;
    const int64_t blocks = l.row_ptr[group * l.rows + row1] - l.row_ptr[group * l.rows + row0];
    const int64_t columns = DOT_TILE >> (l.bo >= 4 ? MAX_LOG_DOT : l.bo >= 2 ? 1 : 0);
    const int64_t steps = g.outer ? blocks : blocks * l.bi / columns;
    space.next_x.start(g.x, u.image, u.images, group * g.in_per_group, g.in_per_group,
                       (u.top + g.h.low) * g.h.in_phases, (u.top + g.h.tile + g.h.high) * g.h.in_phases, steps);
    space.next_dy.start(g.dy, u.image, u.images, group * g.out_per_group + row0 * l.bo,
                        min64(g.out_per_group, row1 * l.bo) - row0 * l.bo, u.top, u.top + u.height, steps);
}

// dvalues[i] = sum of the parts, in order, where the mask keeps the element.
void add_parts(const Wgrad &g, const float *sums, int64_t begin, int64_t end, const uint8_t *element_mask,
               float *dvalues) {
    const Layout &l = g.args.layout;
    const int64_t block = l.bo * l.bi, used = l.nnz() * block, mask_bytes = ceil_div(block, 8);
    for (int64_t i = begin; i < end; ++i) dvalues[i] = 0;
    for (int64_t p = 0; p < g.parts; ++p)
        for (int64_t i = begin; i < min64(end, used); ++i) dvalues[i] += sums[p * used + i];
    for (int64_t i = begin; element_mask && i < min64(end, used); ++i) {
        const int64_t bit = i % block;
        if (!(element_mask[i / block * mask_bytes + bit / 8] >> (bit % 8) & 1)) dvalues[i] = 0;
    }
}

// Outer products want pixels of channels. Measured at 90 %, 3 x 3: on images of 8 columns they are 50 % faster than dot
// products, because they leave out the taps outside the image; planes of 16 and more columns are not worth transposing
// for them (10 % slower).
bool use_outer(const Conv2dArgs &a) {
    return a.layout.bi % LANES == 0 && a.layout.bo >= 8 && (a.channels_last || a.w < 16);
}

// Tiles, units and parts: functions of the shape and the number of blocks alone.
void choose_units(Wgrad &g) {
    const Layout &l = g.args.layout;
    const auto size = [&] {
        return g.in_per_group * g.h.in_phases * g.w.in_phases * g.h.extent() * g.w.extent() +
               g.out_per_group * g.h.tile * g.w.tile;
    };
    for (int64_t parts = 1; size() > WGRAD_BUDGET && g.h.tile > 1;) g.h.split(++parts);
    for (int64_t parts = 1; size() > WGRAD_BUDGET && g.w.tile > 4 * LANES;) {
        g.w.split(++parts);
        g.w.tile = round_up(g.w.tile, LANES);
    }
    g.lanes = LANES == 16 && round_up(g.w.tile, 8) < round_up(g.w.tile, 16) ? 8 : LANES;
    g.dy_pitch = g.outer ? g.w.tile : round_up(g.w.tile, g.lanes);
    g.dy_plane = (ceil_div(g.h.tile * g.dy_pitch * (g.outer ? l.bo : 1) + LANES, 16) | 1) * 16;
    const int64_t tiles = g.h.tiles() * g.w.tiles();
    g.images = tiles > 1 ? 1 : max64(1, min64(WGRAD_BUDGET / max64(1, size()), ceil_div(g.args.n, MAX_PARTS)));
    g.batches = ceil_div(g.args.n, g.images);
    g.units = tiles * g.batches;
    const int64_t room = PARTS_BUDGET / max64(1, l.nnz() * l.bo * l.bi);
    g.parts = max64(1, min64(min64(MAX_PARTS, room), g.units));
}

}  // namespace

void conv2d_wgrad(const Conv2dArgs &a, const float *dy, const float *x, const uint8_t *element_mask, float *dvalues,
                  float *dbias) {
    const Layout &l = a.layout;
    const int64_t used = l.nnz() * l.bo * l.bi, total = l.capacity * l.bo * l.bi;
    Wgrad g{a,
            Dim(a.r, a.stride_h, a.dilation_h, a.pad_top, a.h, a.p, false),
            Dim(a.s, a.stride_w, a.dilation_w, a.pad_left, a.w, a.q, false),
            {x, a.c, a.h, a.w, a.channels_last},
            {dy, a.o, a.p, a.q, a.channels_last},
            a.o / l.groups,
            a.c / l.groups,
            use_outer(a),
            0,
            0,
            0,
            0,
            0,
            0,
            0};
    if (a.n == 0 || a.p == 0 || a.q == 0) {
        memset(dvalues, 0, sizeof(float) * size_t(total));
        if (dbias) memset(dbias, 0, sizeof(float) * size_t(a.o));
        return;
    }
    choose_units(g);
    const Window window(g.h, g.w, g.in_per_group, g.outer ? l.bi : 1);
    const int threads = useful_threads(a.threads, a.n * used * a.p * a.q);
    // Fewer parts than threads: share the block rows, at the price of each thread copying x.
    const int64_t shares = g.parts * l.groups < threads ? min64(l.rows, ceil_div(2 * threads, g.parts * l.groups)) : 1;
    const int64_t share = ceil_div(l.rows, shares);

    const int64_t dy_size = g.images * l.rows * (g.outer ? 1 : l.bo) * g.dy_plane, x_size = g.images * window.image;
    const int64_t vectors = g.h.tile * ceil_div(g.w.tile, g.lanes);
    Scratch<float> copies(threads * (x_size + dy_size));
    Scratch<DotVector> all_vectors(threads * vectors);
    Scratch<float> sums(g.parts * used);
    Scratch<float> bias_sums(dbias ? g.parts * a.o : 0);
    Counter counter;
    parallel(threads, [&](const Team &team) {
        WgradSpace space{copies.get() + team.rank * (x_size + dy_size),
                         nullptr,
                         all_vectors.get() + team.rank * vectors,
                         -1,
                         {},
                         {}};
        space.dy = space.x + x_size;
        for (int64_t t = counter.take(); t < g.parts * l.groups * shares; t = counter.take()) {
            const int64_t part = t / shares / l.groups, group = t / shares % l.groups;
            const int64_t row0 = t % shares * share, row1 = min64(l.rows, row0 + share);
            if (row0 >= row1) continue;
            float *part_sums = sums.get() + part * used, *part_bias = dbias ? bias_sums.get() + part * a.o : nullptr;
            const int64_t slot0 = l.row_ptr[group * l.rows + row0], slot1 = l.row_ptr[group * l.rows + row1];
            memset(part_sums + slot0 * l.bo * l.bi, 0, sizeof(float) * size_t((slot1 - slot0) * l.bo * l.bi));
            const int64_t first = row0 * l.bo, last = min64(g.out_per_group, row1 * l.bo);
            if (dbias) memset(part_bias + group * g.out_per_group + first, 0, sizeof(float) * size_t(last - first));
            const int64_t last_unit = g.units * (part + 1) / g.parts;
            for (int64_t u = g.units * part / g.parts; u < last_unit; ++u) {
                if (u + 1 < last_unit) prefetch_unit(g, unit_at(g, u + 1), group, row0, row1, space);
                run_unit(g, unit_at(g, u), window, group, row0, row1, space, part_sums, part_bias);
            }
        }
        team.barrier();
        add_parts(g, sums.get(), total * team.rank / team.size, total * (team.rank + 1) / team.size, element_mask,
                  dvalues);
        for (int64_t o = team.rank; dbias && o < a.o; o += team.size) {
            float sum = 0;
            for (int64_t p = 0; p < g.parts; ++p) sum += bias_sums[p * a.o + o];
            dbias[o] = sum;
        }
    });
}

}  // namespace SK_ISA
}  // namespace sparsekern
