// SPDX-License-Identifier: Apache-2.0
// What forward and dgrad share: the problem as a gather over block rows (block columns through the transposed index for
// dgrad), the lists of blocks that the kernels walk, and how the output is cut into tiles and lines.
#pragma once

#include "conv2d_geometry.h"
#include "conv2d_tiles.h"

namespace sparsekern {
namespace SK_ISA {

// out[m] = bias[m] + sum over the entries of a row of weights[slot][k][m] * in[k], shifted by tap.
struct Gather {
    const Conv2dArgs &args;
    bool flipped;
    Dim h, w;
    Image<const float> in;
    Image<float> out;
    int64_t rows, cols;  // block rows and columns of one group
    int64_t bm, bk;      // block: output x input channels
    int64_t out_per_group, in_per_group;
    const int32_t *ptr, *index, *perm;
    Weights weights;
    const float *bias;
    bool by_channels;  // vectors along output channels instead of pixels
    int lanes;
    bool streamed = false;  // those vectors are whole cache lines of a large output, stored past the caches

    int64_t phases() const { return h.out_phases * w.out_phases; }
};

// Positions of `out` that see the same taps; at the image's edge taps that read only padding are left out.
struct Span {
    int64_t begin, end;
    int64_t tap0, tap1;
};

// Cuts positions first .. first + count of a phase into spans. At most `room` of them, else one span with all taps.
static int64_t cut_spans(const Dim &d, int64_t phase, int64_t first, int64_t count, Span *spans, int64_t room) {
    int64_t used = 0;
    for (int64_t i = 0; i < count; ++i) {
        int64_t tap0 = d.taps, tap1 = 0;
        for (int64_t r = 0; r < d.taps; ++r)
            if (d.out_phase(r) == phase && d.inside(r, first + i)) tap0 = min64(tap0, r), tap1 = r + 1;
        if (tap0 > tap1) tap0 = tap1;
        if (used > 0 && spans[used - 1].tap0 == tap0 && spans[used - 1].tap1 == tap1) {
            spans[used - 1].end = first + i + 1;
            continue;
        }
        if (used == room) {
            spans[0] = {first, first + count, 0, d.taps};
            return 1;
        }
        spans[used++] = {first + i, first + i + 1, tap0, tap1};
    }
    return used;
}

constexpr int64_t MAX_COLUMN_SPANS = 5;

// Column spans of one column phase. Kernels with vectors along pixels mix columns, so they have one span with all taps.
struct Columns {
    Span spans[MAX_COLUMN_SPANS];
    int64_t count;
};

// Lists of all block rows: [row][phase][column span][entries by tap], and for each list where each tap row starts.
struct Lists {
    Entry *entries;
    int32_t *starts;
    int64_t spans;            // lists of one phase
    int64_t starts_per_list;  // taps of one column + 1

    const Entry *row_entries(const Gather &g, int64_t row) const { return entries + g.ptr[row] * spans; }
    int32_t *list(const Gather &g, int64_t row, int64_t phase, int64_t span) const {
        return starts + ((row * g.phases() + phase) * spans + span) * starts_per_list;
    }
};

static void build_lists(const Gather &g, const Window &window, const Columns *columns, int64_t row,
                        const Lists &lists) {
    Entry *out = lists.entries + g.ptr[row] * lists.spans;
    int32_t count = 0;
    const int64_t last = g.ptr[row + 1];
    for (int64_t fh = 0; fh < g.h.out_phases; ++fh)
        for (int64_t fw = 0; fw < g.w.out_phases; ++fw)
            for (int64_t c = 0; c < columns[fw].count; ++c) {
                const Span &span = columns[fw].spans[c];
                int32_t *start = lists.list(g, row, fh * g.w.out_phases + fw, c);
                int64_t e = g.ptr[row];
                for (int64_t r = 0; r < g.h.taps; ++r) {
                    start[r] = count;
                    const bool skip = g.h.out_phase(r) != fh;
                    for (; e < last && g.index[e] < (r + 1) * g.w.taps * g.cols; ++e) {
                        const int64_t s = g.index[e] / g.cols - r * g.w.taps, block = g.index[e] % g.cols;
                        if (skip || s < span.tap0 || s >= span.tap1 || g.w.out_phase(s) != fw) continue;
                        const int64_t x = block * (window.unit == 1 ? g.bk : 1) * window.group;
                        out[count++] = {int32_t(x + window.tap(g.h, g.w, r, s)), int32_t(g.perm ? g.perm[e] : e),
                                        int32_t(min64(g.bk, g.in_per_group - block * g.bk))};
                    }
                }
                start[g.h.taps] = count;
            }
}

// One unit of work: block rows row0 .. row1 of a group at one tile of some images.
struct Task {
    int64_t group, image, images, top, left, row0, row1;
};

// What a tile and a phase have in common for all block rows and images.
struct TilePlan {
    PixelVector *pixels;
    PixelLine *lines;
    Span *bands;  // rows; for vectors along pixels begin and end count vectors
    int64_t band_count, line_count, height, width;
};

// Vectors along pixels. Output rows are y_row floats apart; vectors store exactly the tile's pixels only if `exact`.
static void plan_vectors(const Gather &g, const Task &task, int64_t y_row, bool exact, TilePlan &plan) {
    int64_t count = 0;
    for (int64_t b = 0; b < plan.band_count; ++b) {
        Span &band = plan.bands[b];
        const int64_t first = count;
        for (int64_t i = band.begin - task.top; i < band.end - task.top; ++i)
            for (int64_t j = 0; j < plan.width; j += g.lanes)
                plan.pixels[count++] = {i * y_row + j, int32_t(i * g.w.extent() + j),
                                        int32_t(exact ? min64(g.lanes, plan.width - j) : g.lanes)};
        band.begin = first, band.end = count;
    }
}

// Vectors along channels: lines along rows, along columns where the rows are short.
static void plan_lines(const Task &task, const Columns &columns, int64_t x_row, int64_t x_col, int64_t y_row,
                       int64_t y_col, TilePlan &plan) {
    plan.line_count = 0;
    for (int64_t b = 0; b < plan.band_count; ++b)
        for (int64_t c = 0; c < columns.count; ++c) {
            const Span &band = plan.bands[b];
            const int64_t i0 = band.begin - task.top, height = band.end - band.begin;
            const int64_t j0 = max64(0, columns.spans[c].begin - task.left);
            const int64_t width = min64(plan.width, columns.spans[c].end - task.left) - j0;
            if (width <= 0) continue;
            const int64_t x = i0 * x_row + j0 * x_col, y = i0 * y_row + j0 * y_col;
            if (width < 4 && height > width)
                for (int64_t j = 0; j < width; ++j)
                    plan.lines[plan.line_count++] = {y + j * y_col, y_row, x + j * x_col, x_row,
                                                     height,        c,     band.tap0,     band.tap1};
            else
                for (int64_t i = 0; i < height; ++i)
                    plan.lines[plan.line_count++] = {y + i * y_row, y_col, x + i * x_row, x_col,
                                                     width,         c,     band.tap0,     band.tap1};
        }
}

}  // namespace SK_ISA
}  // namespace sparsekern
