// SPDX-License-Identifier: Apache-2.0
// dw[o, i] += dy[pixel, o] * x[pixel moved by the tap, i] over all pixels, for the stored blocks of one window.
#pragma once

#include "ring.cuh"
#include "wgrad_bias.cuh"
#include "wgrad_operands.cuh"

namespace sparsekern {
namespace cuda {

constexpr int WGRAD_THREADS = 512;

// -- the product of one tile --

template <class T>
SK_DEVICE void multiply_piece(float (&sums)[T::m_tiles][T::n_tiles][4], const uint32_t (&a)[T::m_tiles][4],
                              const uint32_t (&b)[T::n_tiles][2]) {
    SK_UNROLL
    for (int m = 0; m < T::m_tiles; ++m) {
        SK_UNROLL
        for (int n = 0; n < T::n_tiles; ++n) mma<typename T::E>(sums[m][n], a[m], b[n][0], b[n][1]);
    }
}

// Count pieces, known when compiled: no test between their multiplications. x of a 16-bit piece is loaded while the one
// before is multiplied, because the compiler moves no ldmatrix ahead of an mma.
template <class T, int Count>
SK_DEVICE void multiply(const WgradCut &cut, Shared dy, Shared x, const Share<T> &share, Accumulators<T> &sums) {
    using Operands = WgradOperands<T>;
    using E = typename T::E;
    constexpr int ahead = E::bytes == 2 ? 1 : 0;
    const Shared x_rows = shared_memory() + cut.x_rows;
    typename Operands::DyRows dy_at = Operands::dy_rows(dy, cut.dy.pitch);
    SK_NO_UNROLL
    for (int pixel = 0; pixel < cut.dy.rows; pixel += E::depth) {
        const typename Operands::XRows x_at = Operands::x_rows(x, x_rows, pixel);
        uint32_t a[T::m_tiles][4], b[1 + ahead][T::n_tiles][2];
        if (ahead) Operands::load_x(b[0], x_at, share.x[0]);
        SK_UNROLL
        for (int j = 0; j < Count; ++j) {
            Operands::load_dy(j == 0 || share.dy[j] != share.dy[j - 1], a, dy_at + share.dy[j], cut.dy.pitch);
            const int next = j + ahead;
            if (next < Count) Operands::load_x(b[next % (1 + ahead)], x_at, share.x[next]);
            multiply_piece<T>(sums.at[j], a, b[j % (1 + ahead)]);
        }
        dy_at += E::depth * cut.dy.pitch;
    }
}

template <class T, int Count = T::pieces>
SK_DEVICE void multiply_share(const WgradCut &cut, Shared dy, Shared x, const Share<T> &share, Accumulators<T> &sums) {
    if (share.count == Count) {
        multiply<T, Count>(cut, dy, x, share, sums);
    } else if constexpr (Count > 1) {
        multiply_share<T, Count - 1>(cut, dy, x, share, sums);
    }
}

// -- the ring of tiles --

// For each output pixel of a tile: bytes from the start of the tile of x to the pixel that the first tap reads.
SK_DEVICE void write_x_rows(const WgradArgs &args) {
    const TileCut &dy = args.cut.dy, &x = args.cut.x;
    for (int pixel = thread_id(); pixel < dy.rows; pixel += thread_count()) {
        const int q = pixel % dy.width, line = pixel / dy.width, p = line % dy.height, n = line / dy.height;
        const int row = (n * x.height + p * args.stride_h) * x.width + q * args.stride_w;
        store_shared(shared_memory() + args.cut.x_rows + pixel * 4, static_cast<uint32_t>(row * x.pitch));
    }
}

template <class E> SK_DEVICE void copy_stage(const WgradArgs &args, Shared stage, const TilePlace &tile) {
    const WgradCut &cut = args.cut;
    const int64_t n = int64_t{tile.n} * cut.tile_images;
    const int y = tile.y * cut.dy.height, x = tile.x * cut.dy.width;
    copy_tile<E>(stage, cut.dy, args.dy, args.dy_aligned, n, y, x);
    copy_tile<E>(stage + cut.dy.rows * cut.dy.pitch, cut.x, args.x, args.x_aligned, n, y * args.stride_h - args.pad_top,
                 x * args.stride_w - args.pad_left);
}

// All tiles of this split.
template <class T>
SK_DEVICE void pass_over_pixels(const WgradArgs &args, const Share<T> &share, Accumulators<T> &sums,
                                BiasSums<typename T::E> &bias) {
    using E = typename T::E;
    const WgradCut &cut = args.cut;
    const int64_t first = cut.tiles * block_y() / args.splits;
    const int tiles = static_cast<int>(cut.tiles * (block_y() + 1) / args.splits - first);
    const Shared ring = shared_memory(), last_stage = ring + (args.stages - 1) * cut.stage_bytes;
    const int dy_bytes = cut.dy.rows * cut.dy.pitch;
    TilePlace place = tile_place(cut, first);
    Shared free = ring;
    for (int tile = 1 - args.stages; tile < tiles; ++tile) {
        const Shared stage = free == last_stage ? ring : free + cut.stage_bytes;  // where `tile` lies
        if (tile >= 0) {
            wait_for_oldest(args.stages);
            round_tile<E>(stage + dy_bytes, cut.x);
            barrier();  // all threads' copies of this tile have arrived, and all have read the one before
        }
        if (tile + args.stages - 1 < tiles) {
            copy_stage<E>(args, free, place);
            next_tile(cut, place);
        }
        cp_async_commit();
        if (tile >= 0) {
            multiply_share<T>(cut, stage, stage + dy_bytes, share, sums);
            bias.add(cut, stage);
        }
        free = stage;
    }
    barrier();  // all have read the last tile
}

// -- storing --

// One row of a piece: the lane's results of all n-tiles. `element` is the row's first, within the block.
template <class T>
SK_DEVICE void store_row(const WgradArgs &args, int64_t block, int element, uint32_t bits, int half,
                         const float (&sums)[T::n_tiles][4]) {
    const GradientArgs &to = args.gradient;
    SK_UNROLL
    for (int n = 0; n < T::n_tiles; ++n) {
        const int i = 8 * n + lane_id() % 4 * 2;
        const float low = sums[n][2 * half], high = sums[n][2 * half + 1];
        if (args.partial) {
            const int64_t split = (block_y() * to.capacity) << to.log2_block;
            store_global(reinterpret_cast<Floats2 *>(args.partial + (split + block + element + i)), Floats2{low, high});
        } else {
            store_pair<typename T::E>(to.dvalues, block + element + i, kept(low, bits, i), kept(high, bits, i + 1));
        }
    }
}

template <class T>
SK_DEVICE void store_piece_sums(const WgradArgs &args, const Piece &piece,
                                const float (&sums)[T::m_tiles][T::n_tiles][4]) {
    const Learning learning(args.gradient, piece.slot);
    const int64_t block = int64_t{piece.slot} << args.gradient.log2_block;
    SK_UNROLL
    for (int m = 0; m < T::m_tiles; ++m) {
        SK_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int element = ((piece.o + WgradOperands<T>::row(m, half)) << args.gradient.log2_bi) + piece.i;
            store_row<T>(args, block, element, learning.bits(element), half, sums[m]);
        }
    }
}

template <class T>
SK_DEVICE void store_share(const WgradArgs &args, int listed, const Share<T> &share, const Accumulators<T> &sums) {
    const int first = share_start(listed, warp_id());
    SK_UNROLL
    for (int j = 0; j < T::pieces; ++j) {
        if (j < share.count) store_piece_sums<T>(args, load_listed(args, first + j), sums.at[j]);
    }
}

// Zeros to the slots past the stored blocks, shared out over all thread blocks: the host doesn't know how many there
// are, and the reduction, which writes them where there are splits, would cost a launch here.
template <class E> SK_DEVICE void clear_spare_slots(const WgradArgs &args) {
    const GradientArgs &to = args.gradient;
    const int windows = args.cut.row_windows * args.cut.col_windows;
    for (int64_t slot = stored_blocks(to) + int64_t{block_z()} * windows + block_x(); slot < to.capacity;
         slot += int64_t{windows} * to.groups) {
        for (int i = thread_id(); i < 1 << (to.log2_block - 2); i += thread_count()) {
            store_four<E>(to.dvalues, (slot << to.log2_block) + 4 * i, Floats4{0, 0, 0, 0});
        }
    }
}

// -- kernel --

SK_DEVICE void write_tables(const WgradArgs &args) {
    const Window window = find_window(args);
    if (thread_id() == 0) write_window(args, window);
    write_places(shared_memory() + args.cut.dy.places, args.cut.dy, args.dy);
    write_places(shared_memory() + args.cut.x.places, args.cut.x, args.x);
    write_x_rows(args);
    count_blocks(args, window);
}

// One pass over the pixels for the window's pieces from `first` on: what the warps hold, or an even share of what is
// left. Returns how many.
template <class T> SK_DEVICE int pass(const WgradArgs &args, int first) {
    using E = typename T::E;
    const Window window = read_window(args);
    const int held = T::pieces * (thread_count() / 32), left = pieces_of<T>(args, window) - first;
    const int passes = (left + held - 1) / held, size = left ? (left + passes - 1) / passes : 0;
    list_pieces<T>(args, window, first, first + size);
    barrier();
    const Share<T> share(args, size);
    Accumulators<T> sums{};
    const bool with_bias = window.bias && first == 0;
    BiasSums<E> bias(args, with_bias);
    if (size || with_bias) pass_over_pixels<T>(args, share, sums, bias);
    store_share<T>(args, size, share, sums);
    if (with_bias) bias.store(args);
    return size;
}

template <class T> SK_KERNEL(WGRAD_THREADS, 1) wgrad_kernel(SK_ARGS(WgradArgs) args) {
    if (!args.partial) clear_spare_slots<typename T::E>(args);
    write_tables(args);
    barrier();
    int first = 0;
    do {
        first += pass<T>(args, first);
        barrier();  // list and ring are free
    } while (agreed(first < pieces_of<T>(args, read_window(args))));
}

// -- host --

inline int log2_of(int power) {
    int log2 = 0;
    while (1 << log2 < power) ++log2;
    return log2;
}

inline bool on_16_bytes(const void *data, int64_t ld, int channels, const Problem &a) {
    const int bytes = element_bytes(a.dtype);
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld * bytes % 16 == 0 &&
           (a.groups == 1 || channels * bytes % 16 == 0);
}

inline WgradArgs wgrad_args(const WgradCall &call) {
    const Problem &a = call.problem;
    const WgradPlan &plan = call.plan;
    const Index index(a, call.index);
    WgradArgs args;
    args.cut = cut_wgrad(a, plan);
    args.gradient = {index.row_ptr,     index.col,
                     index.row,         reinterpret_cast<const uint32_t *>(call.element_mask),
                     call.dvalues,      call.dbias,
                     a.capacity,        a.groups,
                     a.rows(),          a.cols(),
                     a.out_per_group(), a.in_per_group(),
                     log2_of(a.bi),     log2_of(a.bo * a.bi)};
    args.dy = {call.dy, a.n, a.p, a.q, call.dy_ld};
    args.x = {call.x, a.n, a.h, a.w, call.x_ld};
    args.dy_aligned = on_16_bytes(call.dy, call.dy_ld, a.out_per_group(), a);
    args.x_aligned = on_16_bytes(call.x, call.x_ld, a.in_per_group(), a);
    args.partial = plan.splits > 1 ? static_cast<float *>(call.workspace) : nullptr;
    args.with_bias = call.dbias != nullptr;
    args.bias_partial =
        args.partial && args.with_bias ? args.partial + plan.splits * a.capacity * a.bo * a.bi : nullptr;
    args.stages = plan.stages, args.splits = plan.splits;
    args.rows = plan.rows, args.cols = plan.cols;
    args.filter_w = a.s;
    args.stride_h = a.stride_h, args.stride_w = a.stride_w;
    args.pad_top = a.pad_top, args.pad_left = a.pad_left;
    args.dilation_h = a.dilation_h, args.dilation_w = a.dilation_w;
    return args;
}

template <class T> void launch_wgrad_pieces(const WgradArgs &args, const WgradCall &call) {
    const Grid grid{int64_t{args.cut.row_windows} * args.cut.col_windows, call.plan.splits, call.problem.groups};
    launch("wgrad", wgrad_kernel<T>, grid, 32 * call.plan.warps, args.cut.shared_bytes, call.stream, args);
}

template <class E> void launch_wgrad(const WgradCall &call) {
    const Problem &a = call.problem;
    const WgradArgs args = wgrad_args(call);
    if (a.capacity == 0 && !args.with_bias) return;
    if (a.bo == 16 && a.bi == 16) {
        launch_wgrad_pieces<WgradTraits<E, 16, 16>>(args, call);
    } else if (a.bo == 16) {
        launch_wgrad_pieces<WgradTraits<E, 16, 32>>(args, call);
    } else if (a.bi == 16) {
        launch_wgrad_pieces<WgradTraits<E, 32, 16>>(args, call);
    } else {
        launch_wgrad_pieces<WgradTraits<E, 32, 32>>(args, call);
    }
    if (args.partial) {
        launch_reduce<E>({args.gradient, args.partial, args.bias_partial, call.plan.splits, a.o}, call.stream);
    }
}

}  // namespace cuda
}  // namespace sparsekern
