// SPDX-License-Identifier: Apache-2.0
// dw[o, i] += dy[pixel, o] * x[pixel moved by the tap, i] over all pixels, for the stored blocks of one window.
#pragma once

#include "wgrad_bias.cuh"
#include "wgrad_operands.cuh"

namespace sparsekern {
namespace cuda {

constexpr int WGRAD_THREADS = 512;

// -- the product of one tile
// ------------------------------------------------------------------------------------------------------

template <class T>
SK_DEVICE void multiply_piece(float (&sums)[T::m_tiles][T::n_tiles][4], const uint32_t (&a)[T::m_tiles][4],
                              const uint32_t (&b)[T::n_tiles][2]) {
    SK_UNROLL
    for (int m = 0; m < T::m_tiles; ++m) {
        SK_UNROLL
        for (int n = 0; n < T::n_tiles; ++n) mma<typename T::E>(sums[m][n], a[m], b[n][0], b[n][1]);
    }
}

// Count pieces, known when compiled: no test between their multiplications. x of a piece is loaded while the one before
// is multiplied, because the compiler moves no ldmatrix ahead of an mma.
template <class T, int Count>
SK_DEVICE void multiply(const WgradCut &cut, Shared dy, Shared x, const Share<T> &share, Accumulators<T> &sums) {
    using Operands = WgradOperands<T>;
    using E = typename T::E;
    const Shared x_rows = shared_memory() + cut.x_rows;
    typename Operands::DyRows dy_at = Operands::dy_rows(dy, cut.dy.pitch);
    SK_NO_UNROLL
    for (int pixel = 0; pixel < cut.dy.rows; pixel += E::depth) {
        const typename Operands::XRows x_at = Operands::x_rows(x, x_rows, pixel);
        uint32_t a[T::m_tiles][4], b[2][T::n_tiles][2];
        Operands::load_x(b[0], x_at, share.x[0]);
        SK_UNROLL
        for (int j = 0; j < Count; ++j) {
            Operands::load_dy(j == 0 || share.dy[j] != share.dy[j - 1], a, dy_at + share.dy[j], cut.dy.pitch);
            if (j + 1 < Count) Operands::load_x(b[(j + 1) % 2], x_at, share.x[j + 1]);
            multiply_piece<T>(sums.at[j], a, b[j % 2]);
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

// -- the ring of tiles
// ------------------------------------------------------------------------------------------------------------

// For each output pixel of a tile: bytes from the start of the tile of x to the pixel that the first tap reads.
SK_DEVICE void write_x_rows(const WgradArgs &args) {
    const TileCut &dy = args.cut.dy, &x = args.cut.x;
    for (int pixel = thread_id(); pixel < dy.rows; pixel += thread_count()) {
        const int q = pixel % dy.width, line = pixel / dy.width, p = line % dy.height, n = line / dy.height;
        const int row = (n * x.height + p * args.stride_h) * x.width + q * args.stride_w;
        store_shared(shared_memory() + args.cut.x_rows + pixel * 4, static_cast<uint32_t>(row * x.pitch));
    }
}

template <class E>
SK_DEVICE void copy_stage(const WgradArgs &args, const Window &window, Shared stage, const TilePlace &tile) {
    const WgradCut &cut = args.cut;
    const int64_t n = tile.n * (cut.dy.rows / (cut.dy.height * cut.dy.width));
    const int y = tile.y * cut.dy.height, x = tile.x * cut.dy.width;
    copy_tile<E>(stage, shared_memory() + cut.dy.places, cut.dy, args.dy, args.dy_aligned, n, y, x, window.out(args));
    copy_tile<E>(stage + cut.dy.rows * cut.dy.pitch, shared_memory() + cut.x.places, cut.x, args.x, args.x_aligned, n,
                 y * args.stride_h - args.pad_top, x * args.stride_w - args.pad_left, window.in(args));
}

// Until only the newest stages - 2 tiles are under way.
SK_DEVICE void wait_for_tile(int stages) {
    if (stages == 2) {
        cp_async_wait<0>();
    } else if (stages == 3) {
        cp_async_wait<1>();
    } else {
        cp_async_wait<2>();
    }
}

// Tiles [first, last) of this split.
template <class T>
SK_DEVICE void pass_over_pixels(const WgradArgs &args, const Window &window, const Share<T> &share,
                                Accumulators<T> &sums, bool with_bias, BiasSums<typename T::E> &bias) {
    using E = typename T::E;
    const WgradCut &cut = args.cut;
    const int64_t first = cut.tiles * block_y() / args.splits, last = cut.tiles * (block_y() + 1) / args.splits;
    const Shared ring = shared_memory();
    const Shared end = ring + args.stages * cut.stage_bytes;
    TilePlace place = tile_place(cut, first);
    int64_t copied = first;
    Shared free = ring;
    const auto copy_next = [&] {
        if (copied < last) {
            copy_stage<E>(args, window, free, place);
            next_tile(cut, place);
            free = free + cut.stage_bytes == end ? ring : free + cut.stage_bytes;
        }
        ++copied;
        cp_async_commit();
    };
    for (int i = 1; i < args.stages; ++i) copy_next();
    Shared full = ring;
    for (int64_t tile = first; tile < last; ++tile) {
        wait_for_tile(args.stages);
        barrier();  // all threads' copies of this tile have arrived, and all have read the one before
        copy_next();
        multiply_share<T>(cut, full, full + cut.dy.rows * cut.dy.pitch, share, sums);
        if (with_bias) bias.add(cut, full);
        full = full + cut.stage_bytes == end ? ring : full + cut.stage_bytes;
    }
    cp_async_wait<0>();
    barrier();
}

// -- storing
// ----------------------------------------------------------------------------------------------------------------------

template <class T>
SK_DEVICE void store_piece_sums(const WgradArgs &args, const Piece &piece,
                                const float (&sums)[T::m_tiles][T::n_tiles][4]) {
    using Operands = WgradOperands<T>;
    const GradientArgs &to = args.gradient;
    const Learning learning(to, piece.slot);
    const int64_t block = int64_t{piece.slot} << to.log2_block;
    float *const partial =
        args.partial ? args.partial + ((int64_t{block_y()} * to.capacity) << to.log2_block) + block : nullptr;
    SK_UNROLL
    for (int m = 0; m < T::m_tiles; ++m) {
        SK_UNROLL
        for (int half = 0; half < 2; ++half) {
            SK_UNROLL
            for (int pair = 0; pair < T::n_tiles; ++pair) {
                const int element =
                    ((piece.o + Operands::row(m, half)) << to.log2_bi) + piece.i + Operands::column(pair);
                const Floats2 sum = Operands::pair_of(sums[m], half, pair);
                if (partial) {
                    store_global(reinterpret_cast<Floats2 *>(partial + element), sum);
                } else {
                    const uint32_t bits = learning.bits(element);
                    store_pair<typename T::E>(to.dvalues, block + element, kept(sum.x, bits, 0), kept(sum.y, bits, 1));
                }
            }
        }
    }
}

template <class T>
SK_DEVICE void store_share(const WgradArgs &args, const Share<T> &share, const Accumulators<T> &sums) {
    SK_UNROLL
    for (int j = 0; j < T::pieces; ++j) {
        if (j < share.count) store_piece_sums<T>(args, load_piece(share.at(args, j)), sums.at[j]);
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

// -- kernel
// ----------------------------------------------------------------------------------------------------------------------

template <class T> SK_KERNEL(WGRAD_THREADS, 1) wgrad_kernel(SK_ARGS(WgradArgs) args) {
    using E = typename T::E;
    const Window window(args);
    write_places(shared_memory() + args.cut.dy.places, args.cut.dy, args.dy);
    write_places(shared_memory() + args.cut.x.places, args.cut.x, args.x);
    write_x_rows(args);
    count_blocks(args, window);
    barrier();
    const int pieces = blocks_before(args, window.rows) * (args.bo() / T::o) * (args.bi() / T::i);
    const int held = T::pieces * (thread_count() / 32);
    const int passes = (pieces + held - 1) / held;
    const int per_pass = passes ? (pieces + passes - 1) / passes : 0;
    BiasSums<E> bias(args, window);
    for (int pass = 0; pass < passes || (pass == 0 && window.bias); ++pass) {
        const int first = pass * per_pass, last = smaller(first + per_pass, pieces);
        list_pieces<T>(args, window, first, last);
        barrier();
        const Share<T> share(args, last - first);
        Accumulators<T> sums{};
        const bool with_bias = window.bias && pass == 0;
        pass_over_pixels<T>(args, window, share, sums, with_bias, bias);
        store_share<T>(args, share, sums);
        if (with_bias) bias.store(args, window);
        barrier();  // list and ring are free
    }
    if (!args.partial) clear_spare_slots<E>(args);
}

// -- host
// ----------------------------------------------------------------------------------------------------------------------

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
