// SPDX-License-Identifier: Apache-2.0
// Forward and dgrad: one gather over the stored blocks of a block row, or of a block column with the transposed index.
#include <cstring>

#include "conv2d_gather.h"
#include "conv2d_prefetch.h"

namespace sparsekern {
namespace SK_ISA {
namespace {

// Floats of one tile's copy of the input that leave room in a 1 MB L2 cache for the output and the weights.
constexpr int64_t WINDOW_BUDGET = 160 * 1024;
constexpr int64_t MAX_IMAGES = 8;  // of one task

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

// Measured at 90 % and blocks of 16 and 32, 3 x 3: on channels_last images vectors along channels are 10 to 30 % faster
// (no transposes); on planes they are 15 to 30 % slower from 16 columns on and 0 to 5 % faster at 8.
bool use_channels(const Gather &g) {
    if (g.bm % LANES != 0) return false;
    return g.out.channels_last || (g.w.out_phases == 1 && g.w.grid < 16);
}

// Vectors of 8 pixels where they waste fewer lanes than full ones.
int choose_lanes(int64_t width) {
    return LANES == 16 && round_up(width, 8) < round_up(width, 16) ? 8 : LANES;
}

struct Workspace {
    float *window, *buffer;
    TilePlan plan;
    int64_t zeroed_for;  // the tile whose padding `window` holds
    Prefetch input, output;

    void prefetch() {
        input.step<0>();
        output.step<1>();
    }
};

// Vectors along pixels: the block row's channels at every pixel of the tile.
template <int L>
void run_vectors(const Gather &g, Workspace &space, const Entry *entries, const int32_t *start, const float *x,
                 int64_t x_plane, const float *bias, int64_t channels, float *y, int64_t y_plane) {
    const TilePlan &plan = space.plan;
    for (int64_t b = 0; b < plan.band_count; ++b) {
        const Span &band = plan.bands[b];
        const Entry *entry = entries + start[band.tap0], *end = entries + start[band.tap1];
        int64_t m = 0;
        for (int log_bm = MAX_LOG_BM; log_bm >= 0; --log_bm) {
            const int64_t step = int64_t{1} << log_bm;
            if (channels - m < step) continue;
            const int64_t stop = m + (channels - m) / step * step, count = band.end - band.begin;
            const int64_t tiles = ceil_div(count, PIXEL_VECTORS[log_bm]);
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t v0 = band.begin + count * t / tiles, v1 = band.begin + count * (t + 1) / tiles;
                const PixelTile tile = pick_pixel_tile<L>(log_bm, v1 - v0);
                space.prefetch();
                for (int64_t i = m; i < stop; i += step)
                    tile(entry, end, x, x_plane, {g.weights.data + i, g.weights.block, g.weights.ld}, plan.pixels + v0,
                         bias ? bias + i : nullptr, y + i * y_plane, y_plane);
            }
            m = stop;
        }
    }
}

void run_line(const Gather &g, Workspace &space, const PixelLine &line, const Entry *entry, const Entry *end,
              const float *x, const float *bias, int64_t m, int64_t channels, float *y) {
    const int64_t tiles = ceil_div(line.count, CHANNEL_PIXELS);
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t p0 = line.count * t / tiles, p1 = line.count * (t + 1) / tiles;
        space.prefetch();
        pick_channel_tile(p1 - p0)(entry, end, x + line.x + p0 * line.x_step, line.x_step,
                                   {g.weights.data + m, g.weights.block, g.weights.ld}, bias ? bias + m : nullptr,
                                   channels - m, y + line.y + p0 * line.y_step + m, line.y_step, g.streamed);
    }
}

// Vectors along channels: the block row's channels at every pixel of the tile.
void run_lines(const Gather &g, Workspace &space, const Entry *entries, const int32_t *start, int64_t starts_per_list,
               const float *x, const float *bias, int64_t channels, float *y) {
    for (int64_t i = 0; i < space.plan.line_count; ++i) {
        const PixelLine &line = space.plan.lines[i];
        const int32_t *list = start + line.list * starts_per_list;
        const Entry *entry = entries + list[line.tap0], *end = entries + list[line.tap1];
        for (int64_t m = 0; m < channels; m += LANES) run_line(g, space, line, entry, end, x, bias, m, channels, y);
    }
}

// Where the kernels write: the output itself, or a buffer that is copied to it when a tile is done: planes [image]
// [channel][pixel] for vectors along pixels, pixels [image][pixel][channel] for vectors along channels.
struct Target {
    bool direct;
    int64_t ld, image;  // floats between planes or pixels, and between images

    Target(const Gather &g, int64_t channels) {
        const int64_t area = g.h.tile * g.w.tile;
        direct = g.by_channels ? g.out.channels_last : !g.out.channels_last && g.w.out_phases == 1;
        // Vectors overhang a row of planes; the next row, written later, and LANES floats of slack take it.
        ld = direct ? (g.by_channels ? g.out.c : g.out.h * g.out.w)
                    : (g.by_channels ? channels + 16 : round_up(area + LANES, 16));
        image = direct ? 0 : (g.by_channels ? area * ld : channels * ld);
    }
};

void copy_out(const Gather &g, const Target &target, const float *buffer, const TilePlan &plan, const Task &task,
              int64_t n, int64_t fh, int64_t fw) {
    const int64_t channel = task.group * g.out_per_group + task.row0 * g.bm;
    const int64_t channels = min64(g.out_per_group, task.row1 * g.bm) - task.row0 * g.bm;
    const int64_t x = task.left * g.w.out_phases + fw;
    const bool whole = g.w.out_phases == 1 && g.h.out_phases == 1 && plan.width == g.w.out_size;
    const int64_t chunk = whole ? plan.height * plan.width : plan.width;
    const auto at = [&](int64_t c, int64_t i) {
        return g.out.at(n, channel + c, (task.top + i) * g.h.out_phases + fh, x);
    };
    for (int64_t i = 0; i * chunk < plan.height * plan.width; ++i) {
        if (g.by_channels)
            transpose_any(buffer + i * chunk * target.ld, target.ld, chunk, channels, at(0, i), g.out.h * g.out.w);
        else if (g.out.channels_last)
            transpose_any(buffer + i * chunk, target.ld, channels, chunk, at(0, i), g.out.c * g.w.out_phases);
        else
            for (int64_t c = 0; c < channels; ++c) {
                float *y = at(c, i);
                const float *p = buffer + c * target.ld + i * chunk;
                for (int64_t j = 0; j < chunk; ++j) y[j * g.w.out_phases] = p[j];
            }
    }
}

void run_phase(const Gather &g, const Task &task, const Window &window, const Columns *columns, const Lists &lists,
               const Target &target, int64_t fh, int64_t fw, Workspace &space) {
    TilePlan &plan = space.plan;
    plan.height = min64(g.h.tile, g.h.out_count(fh) - task.top);
    plan.width = min64(g.w.tile, g.w.out_count(fw) - task.left);
    if (plan.height <= 0 || plan.width <= 0) return;
    plan.band_count = cut_spans(g.h, fh, task.top, plan.height, plan.bands, plan.height);
    const int64_t width = target.direct ? g.out.w * g.h.out_phases : plan.width;
    const int64_t step = target.direct ? g.w.out_phases : 1;
    if (g.by_channels)
        plan_lines(task, columns[fw], window.pitch, window.unit, width * target.ld, step * target.ld, plan);
    else
        plan_vectors(g, task, width, target.direct, plan);

    const int64_t channel = task.group * g.out_per_group;
    for (int64_t row = task.row0; row < task.row1; ++row) {
        const int64_t global = task.group * g.rows + row, channels = min64(g.bm, g.out_per_group - row * g.bm);
        const Entry *entries = lists.row_entries(g, global);
        const int32_t *start = lists.list(g, global, fh * g.w.out_phases + fw, 0);
        const float *bias = g.bias ? g.bias + channel + row * g.bm : nullptr;
        for (int64_t n = 0; n < task.images; ++n) {
            const float *x = space.window + n * window.image;
            float *y = target.direct ? g.out.at(task.image + n, channel + row * g.bm, task.top * g.h.out_phases + fh,
                                                task.left * g.w.out_phases + fw)
                                     : space.buffer + n * target.image +
                                           (row - task.row0) * g.bm * (g.by_channels ? 1 : target.ld);
            if (g.by_channels)
                run_lines(g, space, entries, start, lists.starts_per_list, x, bias, channels, y);
            else if (g.lanes == LANES)
                run_vectors<LANES>(g, space, entries, start, x, window.group, bias, channels, y, target.ld);
            else
                run_vectors<LANES == 16 ? 8 : LANES>(g, space, entries, start, x, window.group, bias, channels, y,
                                                     target.ld);
        }
    }
    for (int64_t n = 0; !target.direct && n < task.images; ++n)
        copy_out(g, target, space.buffer + n * target.image, plan, task, task.image + n, fh, fw);
}

// Register tiles of one task, roughly.
int64_t count_steps(const Gather &g, const Task &task) {
    const int64_t rows = (task.row1 - task.row0) * task.images * g.phases();
    if (g.by_channels) return rows * g.h.tile * max64(1, g.w.tile / CHANNEL_PIXELS) * ceil_div(g.bm, LANES);
    int log_bm = 0;
    while (log_bm < MAX_LOG_BM && 2 << log_bm <= g.bm) ++log_bm;
    return rows * ceil_div(g.h.tile * ceil_div(g.w.tile, g.lanes), PIXEL_VECTORS[log_bm]);
}

// The input of `task`, to be fetched during `steps` steps of the task before it.
void prefetch_input(const Gather &g, const Task &task, int64_t steps, Prefetch &prefetch) {
    prefetch.start(g.in, task.image, task.images, task.group * g.in_per_group, g.in_per_group,
                   (task.top + g.h.low) * g.h.in_phases, (task.top + g.h.tile + g.h.high) * g.h.in_phases, steps);
}

void run_task(const Gather &g, const Task &task, const Window &window, const Columns *columns, const Lists &lists,
              const Target &target, Workspace &space, int64_t images) {
    const int64_t tile_key = task.top * (g.w.grid + 1) + task.left;
    if (space.zeroed_for != tile_key) {
        memset(space.window, 0, sizeof(float) * size_t(window.image * images));
        space.zeroed_for = tile_key;
    }
    for (int64_t n = 0; n < task.images; ++n)
        copy_in(g.in, task.image + n, task.group * g.in_per_group, g.in_per_group, g.h, g.w, task.top, task.left,
                window, space.window + n * window.image);
    for (int64_t fh = 0; fh < g.h.out_phases; ++fh)
        for (int64_t fw = 0; fw < g.w.out_phases; ++fw)
            run_phase(g, task, window, columns, lists, target, fh, fw, space);
}

void run(Gather &g, const float *values) {
    const Layout &l = g.args.layout;
    const int64_t n = g.args.n;
    if (n == 0 || g.out.c == 0 || g.h.out_size == 0 || g.w.out_size == 0) return;
    const int threads = useful_threads(g.args.threads, n * l.nnz() * l.bo * l.bi * g.h.grid * g.w.grid);
    choose_tile(g.h, g.w, g.in_per_group, n * l.groups, threads);
    g.by_channels = use_channels(g);
    g.lanes = choose_lanes(g.w.tile);
    Scratch<Columns> columns(g.w.out_phases);
    int64_t spans = 1;
    for (int64_t fw = 0; fw < g.w.out_phases; ++fw) {
        columns[fw].count =
            cut_spans(g.w, fw, 0, g.w.out_count(fw), columns[fw].spans, g.by_channels ? MAX_COLUMN_SPANS : 0);
        spans = max64(spans, columns[fw].count);
    }
    const Window window(g.h, g.w, g.in_per_group, g.by_channels ? g.bk : 1);

    const int64_t tiles = g.h.tiles() * g.w.tiles();
    const int64_t room = tiles == 1 ? WINDOW_BUDGET / window.image : 1;
    const int64_t images = max64(1, min64(min64(room, MAX_IMAGES), n / (4 * threads)));
    const int64_t batches = ceil_div(n, images), units = tiles * l.groups * batches;
    // Fewer tiles than threads: share the block rows, at the price of each thread copying the input.
    const int64_t shares = units < threads ? min64(g.rows, ceil_div(2 * threads, units)) : 1;
    const int64_t share = ceil_div(g.rows, shares);

    const int64_t starts_per_list = g.h.taps + 1;
    Scratch<Entry> entries(l.nnz() * spans);
    Scratch<int32_t> starts(l.groups * g.rows * g.phases() * spans * starts_per_list);
    const Lists lists{entries.get(), starts.get(), spans, starts_per_list};

    const Target target(g, share * g.bm);
    g.streamed = g.by_channels && target.direct && n * g.out.h * g.out.w * g.out.c >= STREAM_FLOATS &&
                 can_stream(g.out.at(0, 0, 0, 0), g.out.c) && g.out_per_group % LANES == 0;
    const int64_t window_size = images * window.image, buffer_size = images * target.image;
    const int64_t vectors = g.by_channels ? 0 : g.h.tile * ceil_div(g.w.tile, g.lanes);
    const int64_t lines = g.by_channels ? MAX_COLUMN_SPANS * g.h.tile : 0;
    Scratch<float> buffers(threads * (window_size + buffer_size));
    Scratch<PixelVector> all_pixels(threads * vectors);
    Scratch<PixelLine> all_lines(threads * lines);
    Scratch<Span> bands(threads * g.h.tile);
    Scratch<float> packed(g.flipped ? 0 : l.nnz() * l.bo * l.bi);
    g.weights = {g.flipped ? values : packed.get(), l.bo * l.bi, g.bm};

    Counter counter;
    parallel(threads, [&](const Team &team) {
        const int64_t rows = l.groups * g.rows;
        for (int64_t row = rows * team.rank / team.size; row < rows * (team.rank + 1) / team.size; ++row) {
            build_lists(g, window, columns.get(), row, lists);
            for (int64_t slot = g.ptr[row]; !g.flipped && slot < g.ptr[row + 1]; ++slot)
                transpose_any(values + slot * l.bo * l.bi, l.bi, l.bo, l.bi, packed.get() + slot * l.bo * l.bi, l.bo);
        }
        team.barrier();
        float *buffer = buffers.get() + team.rank * (window_size + buffer_size);
        Workspace space{buffer,
                        buffer + window_size,
                        {all_pixels.get() + team.rank * vectors, all_lines.get() + team.rank * lines,
                         bands.get() + team.rank * g.h.tile, 0, 0, 0, 0},
                        -1,
                        {},
                        {}};
        const auto task_at = [&](int64_t t) {
            const int64_t row0 = t % shares * share, unit = t / shares;
            const int64_t batch = unit % batches, group = unit / batches % l.groups, tile = unit / batches / l.groups;
            return Task{group,
                        batch * images,
                        min64(images, n - batch * images),
                        tile / g.w.tiles() * g.h.tile,
                        tile % g.w.tiles() * g.w.tile,
                        row0,
                        min64(g.rows, row0 + share)};
        };
        const int64_t tasks = units * shares;
        for (int64_t t = counter.take(), next; t < tasks; t = next) {
            next = counter.take();
            const Task task = task_at(t);
            const int64_t steps = count_steps(g, task);
            if (next < tasks) prefetch_input(g, task_at(next), steps, space.input);
            if (!target.direct)
                space.output.start(g.out, task.image, task.images, task.group * g.out_per_group + task.row0 * g.bm,
                                   min64(g.out_per_group - task.row0 * g.bm, share * g.bm), task.top * g.h.out_phases,
                                   (task.top + g.h.tile) * g.h.out_phases, steps);
            if (task.row0 < task.row1) run_task(g, task, window, columns.get(), lists, target, space, images);
        }
        if (g.streamed) stream_fence();
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
             bias,
             false,
             0};
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
             nullptr,
             false,
             0};
    run(g, values);
}

}  // namespace SK_ISA
}  // namespace sparsekern
