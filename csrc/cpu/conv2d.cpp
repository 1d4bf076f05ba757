// SPDX-License-Identifier: Apache-2.0
// Forward and dgrad: one gather over the stored blocks of a block row, or of a block column with the transposed index.
#include <cstring>

#include "conv2d_geometry.h"
#include "conv2d_tiles.h"

namespace sparsekern {
namespace SK_ISA {
namespace {

// out[m] = bias[m] + sum over the entries of a row of weights[slot][k][m] * in[k], shifted by tap.
struct Gather {
    const Conv2dArgs &args;
    bool flipped;
    Dim h, w;
    Image<const float> in;
    Image<float> out;
    int64_t rows, cols;        // block rows and columns of one group
    int64_t bm, bk;            // block: output x input channels
    int64_t out_per_group, in_per_group;
    const int32_t *ptr, *index, *perm;
    Weights weights;
    const float *bias;

    int64_t slot(int64_t entry) const { return perm ? perm[entry] : entry; }
    int64_t phases() const { return h.out_phases * w.out_phases; }
};

// Floats of one tile's copy of the input that leave room in a 1 MB L2 cache for the output and the weights.
constexpr int64_t WINDOW_BUDGET = 160 * 1024;

void choose_tile(Dim &h, Dim &w, int64_t channels, int64_t images, int threads) {
    const auto size = [&] { return channels * h.in_phases * w.in_phases * h.extent() * w.extent(); };
    int64_t parts = images > 0 && images < threads ? min64(ceil_div(2 * threads, images), max64(1, h.grid / 4)) : 1;
    for (h.split(parts); size() > WINDOW_BUDGET && h.tile > 1; h.split(++parts)) {
    }
    for (parts = 1; size() > WINDOW_BUDGET && w.tile > 4 * LANES;) {
        w.split(++parts);
        w.tile = round_up(w.tile, LANES);
    }
}

// Lists of one block row: [phase][entries by tap], and for each phase where each tap row starts.
struct Lists {
    const Entry *entries;
    const int32_t *start;  // [phases][taps_h + 1], into entries
};

void build_lists(const Gather &g, const Window &window, int64_t row, Entry *entries, int32_t *start) {
    int32_t count = 0;
    const int64_t first = g.ptr[row], last = g.ptr[row + 1];
    for (int64_t fh = 0; fh < g.h.out_phases; ++fh)
        for (int64_t fw = 0; fw < g.w.out_phases; ++fw) {
            int64_t e = first;
            for (int64_t r = 0; r < g.h.taps; ++r) {
                *start++ = count;
                const bool skip = g.h.out_phase(r) != fh;
                for (; e < last && g.index[e] < (r + 1) * g.w.taps * g.cols; ++e) {
                    const int64_t s = g.index[e] / g.cols % g.w.taps, block = g.index[e] % g.cols;
                    if (skip || g.w.out_phase(s) != fw) continue;
                    const int64_t x = window.unit == 1 ? block * g.bk * window.group : block * window.group;
                    entries[count++] = {int32_t(x + window.tap(g.h, g.w, r, s)), int32_t(g.slot(e)),
                                        int32_t(min64(g.bk, g.in_per_group - block * g.bk))};
                }
            }
            *start++ = count;
        }
}

// Rows of a tile that see the same tap rows: at the image's edge a tap row that reads only padding is left out.
struct Band {
    int64_t begin, end;  // of the tile's pixel vectors
    int64_t tap0, tap1;
};

// What a tile and a phase have in common for all block rows and images.
struct TilePlan {
    PixelVector *pixels;
    Band *bands;
    int64_t band_count, height, width;
};

struct Task {
    int64_t group, image, images, top, left, row0, row1;
};

void plan_tile(const Gather &g, const Task &task, int64_t fh, int64_t fw, int lanes, int64_t y_row, bool exact,
               TilePlan &plan) {
    plan.height = min64(g.h.tile, g.h.out_count(fh) - task.top);
    plan.width = min64(g.w.tile, g.w.out_count(fw) - task.left);
    plan.band_count = 0;
    const int64_t pitch = g.w.extent();
    int64_t count = 0;
    for (int64_t i = 0; i < plan.height && plan.width > 0; ++i) {
        int64_t tap0 = g.h.taps, tap1 = 0;
        for (int64_t r = 0; r < g.h.taps; ++r)
            if (g.h.out_phase(r) == fh && g.h.inside(r, task.top + i)) tap0 = min64(tap0, r), tap1 = r + 1;
        if (tap0 > tap1) tap0 = tap1;
        Band *band = plan.bands + plan.band_count;
        if (i == 0 || band[-1].tap0 != tap0 || band[-1].tap1 != tap1) {
            *band = {count, count, tap0, tap1};
            ++plan.band_count;
        }
        for (int64_t j = 0; j < plan.width; j += lanes)
            plan.pixels[count++] = {i * y_row + j, int32_t(i * pitch + j),
                                    int32_t(exact ? min64(lanes, plan.width - j) : lanes)};
        plan.bands[plan.band_count - 1].end = count;
    }
}

// The block row's channels at every pixel of the tile.
template <int L>
void run_row(const Gather &g, const TilePlan &plan, const Lists &lists, const float *x, int64_t x_plane,
             const float *bias, int64_t channels, float *y, int64_t y_plane) {
    for (int64_t b = 0; b < plan.band_count; ++b) {
        const Band &band = plan.bands[b];
        const Entry *entry = lists.entries + lists.start[band.tap0], *end = lists.entries + lists.start[band.tap1];
        int64_t m = 0;
        for (int log_bm = MAX_LOG_BM; log_bm >= 0; --log_bm) {
            const int64_t step = int64_t{1} << log_bm;
            if (channels - m < step) continue;
            const int64_t stop = m + (channels - m) / step * step;
            const int64_t count = band.end - band.begin;
            const int64_t tiles = ceil_div(count, PIXEL_VECTORS[log_bm]);
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t v0 = band.begin + count * t / tiles, v1 = band.begin + count * (t + 1) / tiles;
                const PixelTile tile = pick_pixel_tile<L>(log_bm, v1 - v0);
                for (int64_t i = m; i < stop; i += step)
                    tile(entry, end, x, x_plane, {g.weights.data + i, g.weights.block, g.weights.ld},
                         plan.pixels + v0, bias ? bias + i : nullptr, y + i * y_plane, y_plane);
            }
            m = stop;
        }
    }
}

void pack_weights(const Layout &l, const float *values, int64_t slot, float *packed) {
    transpose_any(values + slot * l.bo * l.bi, l.bi, l.bo, l.bi, packed + slot * l.bo * l.bi, l.bo);
}

// Vectors of 8 pixels where they waste fewer lanes than full ones.
int choose_lanes(int64_t width) {
    return LANES == 16 && round_up(width, 8) < round_up(width, 16) ? 8 : LANES;
}

// Writes a tile of planes [channel][height][width] to one phase of the output.
void copy_out(const Gather &g, const float *planes, int64_t plane, const TilePlan &plan, int64_t n, int64_t channel,
              int64_t channels, int64_t top, int64_t left, int64_t fh, int64_t fw) {
    const int64_t x = left * g.w.out_phases + fw;
    const bool whole_rows = g.w.out_phases == 1 && g.h.out_phases == 1 && plan.width == g.w.out_size;
    if (g.out.channels_last) {
        const int64_t chunk = whole_rows ? plan.height * plan.width : plan.width;
        for (int64_t i = 0; i * chunk < plan.height * plan.width; ++i)
            transpose_any(planes + i * chunk, plane, channels, chunk,
                          g.out.at(n, channel, (top + i) * g.h.out_phases + fh, x), g.out.c * g.w.out_phases);
        return;
    }
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < plan.height; ++i) {
            float *y = g.out.at(n, channel + c, (top + i) * g.h.out_phases + fh, x);
            const float *p = planes + c * plane + i * plan.width;
            for (int64_t j = 0; j < plan.width; ++j) y[j * g.w.out_phases] = p[j];
        }
}

struct Workspace {
    float *window, *planes;
    PixelVector *pixels;
    Band *bands;
    int64_t zeroed_for = -1;  // the tile whose padding `window` holds
};

void run_task(const Gather &g, const Task &task, const Window &window, const Entry *entries, const int32_t *starts,
              Workspace &space) {
    const int64_t tile_key = task.top * (g.w.grid + 1) + task.left;
    if (space.zeroed_for != tile_key) {
        memset(space.window, 0, sizeof(float) * size_t(window.image * task.images));
        space.zeroed_for = tile_key;
    }
    for (int64_t n = 0; n < task.images; ++n)
        copy_in(g.in, task.image + n, task.group * g.in_per_group, g.in_per_group, g.h, g.w, task.top, task.left,
                window, space.window + n * window.image);

    const bool direct = !g.out.channels_last && g.w.out_phases == 1;
    const int64_t starts_per_phase = g.h.taps + 1, starts_per_row = g.phases() * starts_per_phase;
    TilePlan plan{space.pixels, space.bands, 0, 0, 0};
    for (int64_t fh = 0; fh < g.h.out_phases; ++fh)
        for (int64_t fw = 0; fw < g.w.out_phases; ++fw) {
            const int lanes = choose_lanes(g.w.tile);
            const int64_t width = min64(g.w.tile, g.w.out_count(fw) - task.left);
            plan_tile(g, task, fh, fw, lanes, direct ? g.out.w * g.h.out_phases : width, direct, plan);
            if (plan.band_count == 0) continue;
            // Vectors overhang a row of planes; the next row, written later, and LANES floats of slack take it.
            const int64_t y_plane = direct ? g.out.h * g.out.w : round_up(plan.height * plan.width + LANES, 16);
            for (int64_t row = task.row0; row < task.row1; ++row) {
                const int64_t global = task.group * g.rows + row, phase = fh * g.w.out_phases + fw;
                const Lists lists{entries + g.ptr[global], starts + global * starts_per_row + phase * starts_per_phase};
                const int64_t channel = task.group * g.out_per_group + row * g.bm;
                const int64_t channels = min64(g.bm, g.out_per_group - row * g.bm);
                for (int64_t n = 0; n < task.images; ++n) {
                    const float *x = space.window + n * window.image;
                    float *y = direct ? g.out.at(task.image + n, channel, task.top * g.h.out_phases + fh, task.left)
                                      : space.planes + (n * (task.row1 - task.row0) + row - task.row0) * g.bm * y_plane;
                    const auto run = lanes == LANES ? &run_row<LANES> : &run_row<LANES == 16 ? 8 : LANES>;
                    run(g, plan, lists, x, window.group, g.bias ? g.bias + channel : nullptr, channels, y, y_plane);
                }
            }
            if (direct) continue;
            const int64_t channel = task.row0 * g.bm;
            const int64_t channels = min64(g.out_per_group, task.row1 * g.bm) - channel;
            for (int64_t n = 0; n < task.images; ++n)
                copy_out(g, space.planes + n * (task.row1 - task.row0) * g.bm * y_plane, y_plane, plan, task.image + n,
                         task.group * g.out_per_group + channel, channels, task.top, task.left, fh, fw);
        }
}

void run(Gather &g, const float *values) {
    const Layout &l = g.args.layout;
    const int64_t n = g.args.n;
    if (n == 0 || g.out.c == 0 || g.h.out_size == 0 || g.w.out_size == 0) return;
    const int64_t work = n * l.nnz() * l.bo * l.bi * g.h.grid * g.w.grid;
    const int threads = useful_threads(g.args.threads, work);
    choose_tile(g.h, g.w, g.in_per_group, n * l.groups, threads);
    const Window window(g.h, g.w, g.in_per_group, 1);

    const int64_t tiles = g.h.tiles() * g.w.tiles();
    const int64_t room = tiles == 1 ? WINDOW_BUDGET / window.image : 1;
    const int64_t images = max64(1, min64(min64(room, 8), n / (4 * threads)));
    const int64_t batches = ceil_div(n, images), units = tiles * l.groups * batches;
    // Fewer tiles than threads: share the block rows, at the price of each thread copying the input.
    const int64_t shares = units < threads ? min64(g.rows, ceil_div(2 * threads, units)) : 1;
    const int64_t share = ceil_div(g.rows, shares);

    Scratch<float> packed(g.flipped ? 0 : l.nnz() * l.bo * l.bi);
    Scratch<Entry> entries(l.nnz());
    Scratch<int32_t> starts(l.groups * g.rows * g.phases() * (g.h.taps + 1));
    const int64_t plane = round_up(g.h.tile * g.w.tile + LANES, 16);
    const bool direct = !g.out.channels_last && g.w.out_phases == 1;
    const int64_t plane_size = direct ? 0 : images * share * g.bm * plane;
    const int64_t vectors = g.h.tile * ceil_div(g.w.tile, min64(LANES, 8));
    Scratch<float> windows(threads * (images * window.image + plane_size));
    Scratch<PixelVector> pixels(threads * vectors);
    Scratch<Band> bands(threads * g.h.tile);
    if (g.flipped)
        g.weights = {values, l.bo * l.bi, l.bi};
    else
        g.weights = {packed.get(), l.bo * l.bi, l.bo};

    Counter counter;
    parallel(threads, [&](const Team &team) {
        const int64_t rows = l.groups * g.rows;
        for (int64_t row = rows * team.rank / team.size; row < rows * (team.rank + 1) / team.size; ++row) {
            build_lists(g, window, row, entries.get() + g.ptr[row],
                        starts.get() + row * g.phases() * (g.h.taps + 1));
            if (!g.flipped)
                for (int64_t slot = g.ptr[row]; slot < g.ptr[row + 1]; ++slot)
                    pack_weights(l, values, slot, packed.get());
        }
        team.barrier();
        Workspace space{windows.get() + team.rank * (images * window.image + plane_size), nullptr,
                        pixels.get() + team.rank * vectors, bands.get() + team.rank * g.h.tile};
        space.planes = space.window + images * window.image;
        memset(space.window, 0, sizeof(float) * size_t(images * window.image));
        for (int64_t t = counter.take(); t < units * shares; t = counter.take()) {
            const int64_t row0 = t % shares * share, unit = t / shares;
            const int64_t batch = unit % batches, group = unit / batches % l.groups, tile = unit / batches / l.groups;
            const Task task{group,
                            batch * images,
                            min64(images, n - batch * images),
                            tile / g.w.tiles() * g.h.tile,
                            tile % g.w.tiles() * g.w.tile,
                            row0,
                            min64(g.rows, row0 + share)};
            if (task.row0 < task.row1) run_task(g, task, window, entries.get(), starts.get(), space);
        }
    });
}

}  // namespace

void conv2d_forward(const Conv2dArgs &a, const float *x, const float *values, const float *bias, float *y) {
    const Layout &l = a.layout;
    Gather g{a,
             false,
             Dim(a.r, a.stride_h, a.dilation_h, a.pad_top, a.h, a.p, false),
             Dim(a.s, a.stride_w, a.dilation_w, a.pad_left, a.w, a.q, false),
             {x, a.c, a.h, a.w, a.channels_last},
             {y, a.o, a.p, a.q, a.channels_last},
             l.rows,
             l.cols,
             l.bo,
             l.bi,
             a.o / l.groups,
             a.c / l.groups,
             l.row_ptr,
             l.col,
             nullptr,
             {},
             bias};
    run(g, values);
}

void conv2d_dgrad(const Conv2dArgs &a, const float *dy, const float *values, float *dx) {
    const Layout &l = a.layout;
    Gather g{a,
             true,
             Dim(a.r, a.stride_h, a.dilation_h, a.pad_top, a.p, a.h, true),
             Dim(a.s, a.stride_w, a.dilation_w, a.pad_left, a.q, a.w, true),
             {dy, a.o, a.p, a.q, a.channels_last},
             {dx, a.c, a.h, a.w, a.channels_last},
             l.cols,
             l.rows,
             l.bi,
             l.bo,
             a.c / l.groups,
             a.o / l.groups,
             l.t_ptr,
             l.t_row,
             l.t_perm,
             {},
             nullptr};
    run(g, values);
}

}  // namespace SK_ISA
}  // namespace sparsekern
