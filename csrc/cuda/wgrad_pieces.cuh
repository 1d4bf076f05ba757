// SPDX-License-Identifier: Apache-2.0
// Which pieces of stored blocks a thread block owns. They are counted over the window's block rows, in a fixed order:
// by row, within a row by the pieces' o (so that neighbours share dy), then by entry, then by the pieces' i. One pass
// over the pixels takes as many as the warps hold, and lists them in shared memory; the next pass scans the rows again,
// because a list of all would need room for every block that the window could store, and few plans pass twice.
#pragma once

#include "reduce.cuh"
#include "wgrad_tiles.cuh"

namespace sparsekern {
namespace cuda {

// All that the kernel is given.
struct WgradArgs {
    WgradCut cut;
    GradientArgs gradient;
    Image dy, x;
    bool dy_aligned, x_aligned;
    float *partial;       // [splits, capacity, bo, bi], null: one split stores dvalues
    float *bias_partial;  // [splits, O]
    bool with_bias;
    int stages, splits;
    int rows, cols;  // block rows and columns of a window
    int filter_w;    // taps in a row of the filter
    int stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;

    SK_DEVICE int bo() const { return 1 << (gradient.log2_block - gradient.log2_bi); }
    SK_DEVICE int bi() const { return 1 << gradient.log2_bi; }
};

// What one thread block owns: found once, then kept in shared memory.
struct Window {
    int group;
    int row, rows;  // block rows of the group
    int col, cols;  // block columns
    int bias;       // whether it sums dbias
};

SK_DEVICE Window find_window(const WgradArgs &args) {
    Window a;
    a.group = block_z();
    a.row = block_x() / args.cut.col_windows * args.rows;
    a.col = block_x() % args.cut.col_windows * args.cols;
    a.rows = smaller(args.rows, args.gradient.rows - a.row);
    a.cols = smaller(args.cols, args.gradient.cols - a.col);
    a.bias = args.with_bias && a.col == 0;
    return a;
}

SK_DEVICE void write_window(const WgradArgs &args, const Window &a) {
    const GradientArgs &of = args.gradient;
    const Shared to = shared_memory() + args.cut.window;
    store_shared(to, Words4{static_cast<uint32_t>(a.group), static_cast<uint32_t>(a.row), static_cast<uint32_t>(a.rows),
                            static_cast<uint32_t>(a.col)});
    store_shared(to + 16, Words2{static_cast<uint32_t>(a.cols), static_cast<uint32_t>(a.bias)});
    const int o = a.row * args.bo(), os = a.rows * args.bo(), i = a.col * args.bi(), is = a.cols * args.bi();
    write_channels(args.cut.dy, {a.group * of.out_per_group + o, smaller(os, of.out_per_group - o), os});
    write_channels(args.cut.x, {a.group * of.in_per_group + i, smaller(is, of.in_per_group - i), is});
}

SK_DEVICE Window read_window(const WgradArgs &args) {
    const Words4 a = load_shared<Words4>(shared_memory() + args.cut.window);
    const Words2 b = load_shared<Words2>(shared_memory() + args.cut.window + 16);
    return {static_cast<int>(a.x), static_cast<int>(a.y), static_cast<int>(a.z),
            static_cast<int>(a.w), static_cast<int>(b.x), static_cast<int>(b.y)};
}

// Calls visit(rank, slot, col) for the window's entries of one of its block rows, rank counting them; returns how many.
template <class Visit>
SK_DEVICE int scan_row(const WgradArgs &args, const Window &window, int row, const Visit &visit) {
    const int32_t *const begin = args.gradient.row_ptr + window.group * args.gradient.rows + window.row + row;
    const int first = load_global(begin), last = load_global(begin + 1);
    int found = 0;
    SK_NO_UNROLL
    for (int next = first; next < last; next += 32) {
        const int slot = next + lane_id();
        const int col = slot < last ? load_global(args.gradient.col + slot) : 0;
        const int within = col % args.gradient.cols - window.col;
        const bool inside = slot < last && within >= 0 && within < window.cols;
        const uint32_t votes = ballot(inside);
        if (inside) visit(found + bit_count(votes & ((1u << lane_id()) - 1)), slot, col);
        found += bit_count(votes);
    }
    return found;
}

// Numbers of blocks of all rows to shared memory.
SK_DEVICE void count_blocks(const WgradArgs &args, const Window &window) {
    const Shared counts = shared_memory() + args.cut.counts;
    for (int row = warp_id(); row < window.rows; row += thread_count() / 32) {
        const int count = scan_row(args, window, row, [](int, int, int) {});
        if (lane_id() == 0) store_shared(counts + row * 4, count);
    }
}

// Blocks of the window's first `rows` rows.
SK_DEVICE int blocks_before(const WgradArgs &args, int rows) {
    int sum = 0;
    SK_NO_UNROLL
    for (int row = 0; row < rows; ++row) sum += load_shared<int>(shared_memory() + args.cut.counts + row * 4);
    return sum;
}

// An entry of the list: one piece of a block.
struct Piece {
    int slot;
    int o, i;   // of its first element, within the block
    int dy, x;  // where its operands lie: bytes from those of the tile's first pixel
};

SK_DEVICE void store_piece(Shared to, const Piece &a) {
    store_shared(to, Words4{static_cast<uint32_t>(a.slot), static_cast<uint32_t>(a.o << 16 | a.i),
                            static_cast<uint32_t>(a.dy), static_cast<uint32_t>(a.x)});
}
SK_DEVICE Piece load_piece(Shared from) {
    const Words4 words = load_shared<Words4>(from);
    return {static_cast<int>(words.x), static_cast<int>(words.y >> 16), static_cast<int>(words.y & 0xffff),
            static_cast<int>(words.z), static_cast<int>(words.w)};
}

// Lists the pieces [first, last) that lie in one row, of which `before` come in rows before it.
template <class T>
SK_DEVICE void list_row(const WgradArgs &args, const Window &window, int row, int before, int count, int first,
                        int last) {
    const WgradCut &cut = args.cut;
    const int across = args.bi() / T::i, down = args.bo() / T::o;
    scan_row(args, window, row, [&](int rank, int slot, int col) {
        const int tap = col / args.gradient.cols, within = col - tap * args.gradient.cols - window.col;
        const int tap_h = tap / args.filter_w, tap_w = tap - tap_h * args.filter_w;
        const int shift = tap_h * args.dilation_h * cut.x.width + tap_w * args.dilation_w;
        Piece piece{slot, 0, 0, 0, 0};
        SK_NO_UNROLL
        for (int o = 0; o < down; ++o) {
            SK_NO_UNROLL
            for (int i = 0; i < across; ++i) {
                const int at = before + (o * count + rank) * across + i - first;
                if (at < 0 || at >= last - first) continue;
                piece.o = o * T::o, piece.i = i * T::i;
                piece.dy = (row * args.bo() + piece.o) * T::E::bytes;
                piece.x = shift * cut.x.pitch + (within * args.bi() + piece.i) * T::E::bytes;
                store_piece(shared_memory() + cut.pieces + at * 16, piece);
            }
        }
    });
}

template <class T> SK_DEVICE int pieces_per_block(const WgradArgs &args) {
    return args.bo() / T::o * (args.bi() / T::i);
}

template <class T> SK_DEVICE int pieces_of(const WgradArgs &args, const Window &window) {
    return blocks_before(args, window.rows) * pieces_per_block<T>(args);
}

// Lists the window's pieces [first, last).
template <class T> SK_DEVICE void list_pieces(const WgradArgs &args, const Window &window, int first, int last) {
    const int per_block = pieces_per_block<T>(args);
    for (int row = warp_id(); row < window.rows; row += thread_count() / 32) {
        const int count = load_shared<int>(shared_memory() + args.cut.counts + row * 4);
        const int before = blocks_before(args, row) * per_block;
        if (before < last && before + count * per_block > first) {
            list_row<T>(args, window, row, before, count, first, last);
        }
    }
}

// These tell the compiler that all lanes have the same value: it then lies in a uniform register, as long as the
// branches around it are seen to be uniform, too. The lanes' own registers are all in use.
SK_DEVICE int uniform(int value) {
    return shuffle(value, 0);
}
SK_DEVICE bool agreed(bool value) {
    return ballot(value) != 0;
}

// Where a warp's share of a list of `listed` pieces starts. Shares are even: one warp with more to do would hold up
// all. Worked out anew where it is needed, which takes no register in between.
SK_DEVICE int share_start(int listed, int warp) {
    return warp * listed / (thread_count() / 32);
}

SK_DEVICE Piece load_listed(const WgradArgs &args, int i) {
    return load_piece(shared_memory() + args.cut.pieces + i * 16);
}

// A warp's share of the list, as its products want it.
template <class T> struct Share {
    int count;
    int dy[T::pieces], x[T::pieces];  // as in Piece

    SK_DEVICE Share(const WgradArgs &args, int listed) {
        const int first = share_start(listed, warp_id());
        count = share_start(listed, warp_id() + 1) - first;
        SK_UNROLL
        for (int j = 0; j < T::pieces; ++j) {
            const Piece piece = j < count ? load_listed(args, first + j) : Piece{};
            dy[j] = uniform(piece.dy), x[j] = uniform(piece.x);
        }
    }
};

}  // namespace cuda
}  // namespace sparsekern
