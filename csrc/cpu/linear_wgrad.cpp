// SPDX-License-Identifier: Apache-2.0
// Weight gradient of a block-sparse linear layer: dw[o][i] = sum over batch rows of dy[n][o] x[n][i], at stored blocks.
//
// Threads cut the batch into parts with a gradient each, added up in order at the end; where that takes too much memory
// or the batch is short, they share one part, cut by block rows. A part goes through its batch in tiles: x and dy of a
// tile are packed once, then multiplied.
//   outer:  panels [block][batch row][feature]; vectors along the block's inputs, dy broadcast, no reduction.
//   spread: the same panels for blocks 1, 2, 4 or 8 inputs wide; a vector holds several outputs of one block, dy is
//           repeated along its lanes and x is broadcast in groups of the block's width.
//   dot:    panels [feature][batch row]; vectors along the batch and a sum over lanes at the end, for thin blocks.
#include <cstring>

#include "isa.h"
#include "simd.h"
#include "threads.h"

namespace sparsekern {
namespace SK_ISA {
namespace {

constexpr int HALF = LANES > 4 ? LANES / 2 : 4;
// Batch rows packed at a time (16 where that is a transposition); dbias is summed by such chunks. A leading dimension
// of a multiple of 1024 puts the same column of all rows into one set of the L1 cache, which has 8 ways: 16 rows take
// twice as long.
constexpr int64_t PACK_ROWS = 8;

struct Gradient {
    const LinearArgs &a;
    const Layout &l;
    const float *dy;
    int64_t lddy;
    const float *x;
    int64_t ldx;
    float *dvalues, *dbias;
    int64_t m, tile;  // batch rows, and those of a full tile

    int64_t block() const { return l.bo * l.bi; }
};

// Block rows in segments of nearly equal work, taken dynamically.
int64_t segment_begin(const Layout &l, int64_t s, int64_t count) {
    const int64_t target = (l.nnz() + l.rows) * s / count;
    int64_t low = 0, high = l.rows;
    while (low < high) {
        const int64_t mid = (low + high) / 2;
        if (l.row_ptr[mid] + mid < target)
            low = mid + 1;
        else
            high = mid;
    }
    return s >= count ? l.rows : low;
}

// -- outer products ---------------------------------------------------------------------------------------------------

// Panel [block][row][width]. Blocks are apart by a little more than they need: whole vectors may be read and written
// past a row, and a power of two would map every block to the same cache sets.
int64_t block_stride(int64_t rows, int64_t width) {
    return round_up(rows * width + 2 * LANES, 16);
}

// FULL: width == FULL * L, so that rows are written exactly; 0: any width, in vectors that spill into the next row.
template <int L, int FULL>
void pack_blocks(const float *src, int64_t ld, int64_t rows, int64_t features, int64_t width, int64_t stride,
                 float *dst) {
    for (int64_t begin = 0; begin < features; begin += width, dst += stride) {
        const float *s = src + begin;
        float *d = dst;
        int64_t n = 0;
        if (begin + round_up(width, L) <= features) {
            if constexpr (FULL > 0) {
                for (; n < rows; ++n, s += ld, d += FULL * L) {
                    SK_UNROLL
                    for (int v = 0; v < FULL; ++v) store<L>(d + v * L, load<L>(s + v * L));
                }
            } else {
                for (; n + 1 < rows; ++n, s += ld, d += width)
                    for (int64_t v = 0; v < width; v += L) store<L>(d + v, load<L>(s + v));
            }
        }
        for (; n < rows; ++n, s += ld, d += width)
            for (int64_t v = 0; v < width; v += L)
                store_partial<L>(d + v, load_partial<L>(s + v, min64(L, max64(0, features - begin - v))),
                                 min64(L, width - v));
    }
}

void pack_blocks(const float *src, int64_t ld, int64_t rows, int64_t features, int64_t width, int64_t stride,
                 float *dst) {
    if (width == 1) return transpose_in(src, ld, rows, features, round_up(rows, LANES), dst, stride);
    const auto pack = width == 2 * LANES ? pack_blocks<LANES, 2>
                      : width == LANES   ? pack_blocks<LANES, 1>
                      : width > HALF     ? pack_blocks<LANES, 0>
                      : width == HALF    ? pack_blocks<HALF, 1>
                      : width == 4       ? pack_blocks<4, 1>
                      : width > 4        ? pack_blocks<HALF, 0>
                                         : pack_blocks<4, 0>;
    pack(src, ld, rows, features, width, stride, dst);
}

void column_sums(const float *src, int64_t ld, int64_t rows, int64_t features, float *dst) {
    for (int64_t c = 0; c < features; c += LANES) {
        const int64_t width = min64(LANES, features - c);
        Vec<LANES> acc = {};
        if (width == LANES)
            for (int64_t n = 0; n < rows; ++n) acc += load<LANES>(src + n * ld + c);
        else
            for (int64_t n = 0; n < rows; ++n) acc += load_partial<LANES>(src + n * ld + c, width);
        store_partial<LANES>(dst + c, acc, width);
    }
}

// dw [MR][KV * L] (+)= g [n][MR]^T x [n][KV * L]; only `width` lanes of a row of dw are stored
using OuterTile = void (*)(const float *g, int64_t ldg, const float *x, int64_t ldx, int64_t n, float *dw, int64_t lddw,
                           int64_t width, bool first);

template <int L, int KV, int MR>
void outer_tile(const float *g, int64_t ldg, const float *x, int64_t ldx, int64_t n, float *dw, int64_t lddw,
                int64_t width, bool first) {
    using V = Vec<L>;
    V acc[MR][KV];
    const int64_t tail = width - (KV - 1) * L;
    SK_UNROLL
    for (int i = 0; i < MR; ++i) {
        SK_UNROLL
        for (int v = 0; v < KV; ++v) {
            const float *p = dw + i * lddw + v * L;
            acc[i][v] = first ? V{} : v + 1 < KV ? load<L>(p) : load_partial<L>(p, tail);
        }
    }
    for (int64_t r = 0; r < n; ++r, g += ldg, x += ldx) {
        V xv[KV];
        SK_UNROLL
        for (int v = 0; v < KV; ++v) xv[v] = load<L>(x + v * L);
        SK_UNROLL
        for (int i = 0; i < MR; ++i) {
            const V gi = broadcast<L>(g[i]);
            SK_UNROLL
            for (int v = 0; v < KV; ++v) acc[i][v] += gi * xv[v];
        }
    }
    SK_UNROLL
    for (int i = 0; i < MR; ++i) {
        SK_UNROLL
        for (int v = 0; v < KV; ++v) {
            float *p = dw + i * lddw + v * L;
            if (v + 1 < KV)
                store<L>(p, acc[i][v]);
            else
                store_partial<L>(p, acc[i][v], tail);
        }
    }
}

constexpr int OUTER_ONE = REGISTERS == 32 ? 16 : 8;                  // MR with one vector
constexpr int OUTER_TWO = REGISTERS == 32 ? 8 : LANES == 8 ? 6 : 4;  // MR with two

template <int L, int KV, int MR> OuterTile outer_tile_for(int64_t mr) {
    if constexpr (MR == 1)
        return outer_tile<L, KV, 1>;
    else
        return mr == MR ? outer_tile<L, KV, MR> : outer_tile_for<L, KV, MR - 1>(mr);
}

void outer_row(const Gradient &d, const float *gp, const float *xp, int64_t row, int64_t n, bool first) {
    const Layout &l = d.l;
    const int64_t stride = block_stride(d.tile, l.bi);
    gp += row * block_stride(d.tile, l.bo);
    for (int64_t k = 0; k < l.bi;) {
        const int64_t rest = l.bi - k;
        const bool two = rest > LANES + HALF, half = !two && rest <= HALF;
        const int64_t width = min64(rest, two ? 2 * LANES : half ? HALF : LANES), limit = two ? OUTER_TWO : OUTER_ONE;
        const int64_t pieces = ceil_div(l.bo, limit);
        for (int64_t p = 0; p < pieces; ++p) {
            const int64_t begin = l.bo * p / pieces, mr = l.bo * (p + 1) / pieces - begin;
            const OuterTile tile = two    ? outer_tile_for<LANES, 2, OUTER_TWO>(mr)
                                   : half ? outer_tile_for<HALF, 1, OUTER_ONE>(mr)
                                          : outer_tile_for<LANES, 1, OUTER_ONE>(mr);
            for (int64_t q = l.row_ptr[row]; q < l.row_ptr[row + 1]; ++q)
                tile(gp + begin, l.bo, xp + l.col[q] * stride + k, l.bi, n,
                     d.dvalues + q * d.block() + begin * l.bi + k, l.bi, width, first);
        }
        k += width;
    }
}

// -- spread outer products: blocks narrower than a vector -------------------------------------------------------------

// The elements of a block lie in dvalues as vectors of L; tile: MV of those vectors in each of BV blocks.
// dw[b] (+)= g [n][MV * L / W]^T x[b] [n][W]
struct SpreadArgs {
    const float *g;
    int64_t ldg;
    const float *const *x;
    int64_t n;
    float *dw;
    int64_t block, tail;  // floats from block to block; floats of the last vector that belong to the block
    bool first;
};
using SpreadTile = void (*)(const SpreadArgs &);

template <int L, int W, int MV, int BV> void spread_tile(const SpreadArgs &a) {
    using V = Vec<L>;
    V acc[BV][MV];
    const float *x[BV];
    SK_UNROLL
    for (int b = 0; b < BV; ++b) {
        x[b] = a.x[b];
        SK_UNROLL
        for (int v = 0; v < MV; ++v) {
            const float *p = a.dw + b * a.block + v * L;
            acc[b][v] = a.first ? V{} : v + 1 < MV ? load<L>(p) : load_partial<L>(p, a.tail);
        }
    }
    const float *g = a.g;
    for (int64_t r = 0; r < a.n * W; r += W, g += a.ldg) {
        V gv[MV];
        SK_UNROLL
        for (int v = 0; v < MV; ++v) gv[v] = spread<L, W>(load<L>(g + v / W * L), v % W * (L / W));
        SK_UNROLL
        for (int b = 0; b < BV; ++b) {
            const V xb = repeat<L, W>(x[b] + r);
            SK_UNROLL
            for (int v = 0; v < MV; ++v) acc[b][v] += gv[v] * xb;
        }
    }
    SK_UNROLL
    for (int b = 0; b < BV; ++b) {
        SK_UNROLL
        for (int v = 0; v < MV; ++v) {
            float *p = a.dw + b * a.block + v * L;
            if (v + 1 < MV)
                store<L>(p, acc[b][v]);
            else
                store_partial<L>(p, acc[b][v], a.tail);
        }
    }
}

constexpr int SPREAD_TILE = REGISTERS == 32 ? 16 : 8;  // MV * BV at most; BV is 8 at most, for want of pointers

template <int L, int W, int MV, int BV> SpreadTile spread_tile_for(int64_t bv) {
    if constexpr (BV == 1)
        return spread_tile<L, W, MV, 1>;
    else
        return bv == BV ? spread_tile<L, W, MV, BV> : spread_tile_for<L, W, MV, BV - 1>(bv);
}

template <int L, int W, int MV>
void spread_piece(const Gradient &d, const float *gp, const float *xp, int64_t row, int64_t n, bool first, int64_t v0) {
    const Layout &l = d.l;
    constexpr int64_t limit = SPREAD_TILE / MV < 8 ? SPREAD_TILE / MV : 8;
    const int64_t stride = block_stride(d.tile, W), tail = min64(L, d.block() - (v0 + MV - 1) * L);
    gp += v0 * (L / W);
    const int64_t begin = l.row_ptr[row], count = l.row_ptr[row + 1] - begin, tiles = ceil_div(count, limit);
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t q = begin + count * t / tiles, blocks = begin + count * (t + 1) / tiles - q;
        const float *x[8];
        for (int64_t b = 0; b < blocks; ++b) x[b] = xp + l.col[q + b] * stride;
        spread_tile_for<L, W, MV, limit>(blocks)(
            {gp, l.bo, x, n, d.dvalues + q * d.block() + v0 * L, d.block(), tail, first});
    }
}

template <int L, int W>
void spread_row(const Gradient &d, const float *gp, const float *xp, int64_t row, int64_t n, bool first) {
    gp += row * block_stride(d.tile, d.l.bo);
    const int64_t vectors = ceil_div(d.block(), L);
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4) spread_piece<L, W, 4>(d, gp, xp, row, n, first, v);
    for (; v + 2 <= vectors; v += 2) spread_piece<L, W, 2>(d, gp, xp, row, n, first, v);
    for (; v < vectors; ++v) spread_piece<L, W, 1>(d, gp, xp, row, n, first, v);
}

bool can_spread(const Layout &l) {
    return (l.bi == 1 || l.bi == 2 || l.bi == 4 || l.bi == 8) && l.bi < LANES && l.bo * l.bi >= 8;
}

// Vectors of 8 for 2 and 4 inputs, even where 16 are to be had: broadcasting two or four floats to 512 bits costs as
// much as the multiply-add it serves (Zen 4: 0.7 of the peak against 0.9).
void spread_row(const Gradient &d, const float *gp, const float *xp, int64_t row, int64_t n, bool first) {
    constexpr int L = LANES < 8 ? LANES : 8;
    if (d.l.bi == 1 && d.l.bo <= L) return spread_row<L, 1>(d, gp, xp, row, n, first);
    if (d.l.bi == 1) return spread_row<LANES, 1>(d, gp, xp, row, n, first);
    if (d.l.bi == 2) return spread_row<L, 2>(d, gp, xp, row, n, first);
    if constexpr (LANES > 4)
        if (d.l.bi == 4) return spread_row<L, 4>(d, gp, xp, row, n, first);
    if constexpr (LANES > 8) return spread_row<LANES, 8>(d, gp, xp, row, n, first);
}

// -- dot products -----------------------------------------------------------------------------------------------------

// Sums over n batch rows of g[i] x[j] for BM * BN == LANES pairs; lane i * BN + j
template <int BM, int BN> Vec<LANES> dot_tile(const float *const *g, const float *const *x, int64_t n) {
    using V = Vec<LANES>;
    static_assert(BM * BN == LANES);
    constexpr int P = BN < 8 ? BN : 8;  // columns at a time: there are no registers for more pointers
    V acc[LANES] = {};
    SK_UNROLL
    for (int begin = 0; begin < BN; begin += P) {
        const float *gp[BM], *xp[P];
        SK_UNROLL
        for (int i = 0; i < BM; ++i) gp[i] = g[i];
        SK_UNROLL
        for (int j = 0; j < P; ++j) xp[j] = x[begin + j];
        for (int64_t r = 0; r < n; r += LANES) {
            V gv[BM];
            SK_UNROLL
            for (int i = 0; i < BM; ++i) gv[i] = load<LANES>(gp[i] + r);
            SK_UNROLL
            for (int j = 0; j < P; ++j) {
                const V xv = load<LANES>(xp[j] + r);
                SK_UNROLL
                for (int i = 0; i < BM; ++i) acc[i * BN + begin + j] += gv[i] * xv;
            }
        }
    }
    return sum_lanes<LANES>(acc);
}

// One block row in tiles of BM outputs x BN columns (the inputs of its blocks, one after another). Short tiles repeat
// an output or a column and drop what comes of it.
template <int BM, int BN>
void dot_row(const Gradient &d, const float *gp, const float *xp, int64_t row, int64_t n, bool first) {
    const Layout &l = d.l;
    const int64_t ld = block_stride(d.tile, 1), q0 = l.row_ptr[row], columns = (l.row_ptr[row + 1] - q0) * l.bi;
    gp += row * l.bo * ld;
    float *dw = d.dvalues + q0 * d.block();
    int64_t slot = q0, inner = 0;
    for (int64_t c = 0; c < columns; c += BN) {
        const int64_t bn = min64(BN, columns - c);
        const float *x[BN], *g[BM];
        int64_t at[BN];
        for (int64_t j = 0; j < bn; ++j) {
            x[j] = xp + (l.col[slot] * l.bi + inner) * ld;
            at[j] = (slot - q0) * d.block() + inner;
            if (++inner == l.bi) inner = 0, ++slot;
        }
        for (int64_t j = bn; j < BN; ++j) x[j] = x[0];
        for (int64_t i0 = 0; i0 < l.bo; i0 += BM) {
            const int64_t bm = min64(BM, l.bo - i0);
            for (int64_t i = 0; i < BM; ++i) g[i] = gp + (i0 + min64(i, bm - 1)) * ld;
            Vec<LANES> sums = dot_tile<BM, BN>(g, x, n);
            if (l.bo == 1) {  // consecutive columns are consecutive elements
                float *out = dw + at[0];
                if (!first) sums += load_partial<LANES>(out, bn);
                store_partial<LANES>(out, sums, bn);
                continue;
            }
            for (int64_t i = 0; i < bm; ++i) {
                for (int64_t j = 0; j < bn; ++j) {
                    float &out = dw[at[j] + (i0 + i) * l.bi];
                    out = first ? sums[i * BN + j] : out + sums[i * BN + j];
                }
            }
        }
    }
}

void dot_row(const Gradient &d, const float *gp, const float *xp, int64_t row, int64_t n, bool first) {
    if (d.l.bo == 1) return dot_row<1, LANES>(d, gp, xp, row, n, first);
    if (d.l.bo == 2 || LANES < 16) return dot_row<2, LANES / 2>(d, gp, xp, row, n, first);
    if constexpr (LANES == 16) return dot_row<4, 4>(d, gp, xp, row, n, first);
}

// ---------------------------------------------------------------------------------------------------------------------

void apply_mask(const uint8_t *mask, int64_t n, float *values) {
    for (int64_t i = 0; i < n; ++i)
        if (!(mask[i / 8] >> (i % 8) & 1)) values[i] = 0;
}

enum class Method { OUTER, SPREAD, DOT };

// Sizes of what one part packs.
struct Panels {
    int64_t x_width, g_width, x_stride, g_stride, x_size, g_size, chunk, chunks, tiles;

    Panels(const Gradient &d, Method method)
        : x_width(method == Method::DOT ? 1 : d.l.bi), g_width(method == Method::DOT ? 1 : d.l.bo),
          x_stride(block_stride(d.tile, x_width)), g_stride(block_stride(d.tile, g_width)),
          x_size(d.l.cols * d.l.bi / x_width * x_stride), g_size(d.l.rows * d.l.bo / g_width * g_stride),
          chunk(x_width == 1 || g_width == 1 ? 16 : PACK_ROWS), chunks(ceil_div(d.tile, chunk)),
          tiles(ceil_div(d.m, d.tile)) {}
};

struct Buffers {
    float *x, *g, *sums;  // sums [chunks][out_features]: column sums of dy
    Counter *counters;    // [2 * tiles]
};

// The gradient of one part; every thread of the team calls this.
void accumulate(const Gradient &d, Method method, const Panels &p, const Buffers &to, const Team &team) {
    const Layout &l = d.l;
    const int64_t segments = team.size == 1 ? 1 : min64(8 * team.size, l.rows);
    for (int64_t t = 0; t * d.tile < d.m; ++t) {
        const bool first = t == 0;
        const int64_t n0 = t * d.tile, n = min64(d.tile, d.m - n0);
        for (int64_t c; (c = to.counters[2 * t].take() * p.chunk) < n;) {
            const int64_t rows = min64(p.chunk, n - c);
            const float *x = d.x + (n0 + c) * d.ldx, *dy = d.dy + (n0 + c) * d.lddy;
            pack_blocks(x, d.ldx, rows, d.a.in_features, p.x_width, p.x_stride, to.x + c * p.x_width);
            pack_blocks(dy, d.lddy, rows, d.a.out_features, p.g_width, p.g_stride, to.g + c * p.g_width);
            if (d.dbias) column_sums(dy, d.lddy, rows, d.a.out_features, to.sums + c / p.chunk * d.a.out_features);
        }
        team.barrier();
        for (int64_t s; (s = to.counters[2 * t + 1].take()) < segments;) {
            const int64_t begin = segment_begin(l, s, segments), last = segment_begin(l, s + 1, segments);
            if (method == Method::DOT)
                for (int64_t row = begin; row < last; ++row) dot_row(d, to.g, to.x, row, round_up(n, LANES), first);
            else if (method == Method::SPREAD)
                for (int64_t row = begin; row < last; ++row) spread_row(d, to.g, to.x, row, n, first);
            else
                for (int64_t row = begin; row < last; ++row) outer_row(d, to.g, to.x, row, n, first);
        }
        if (d.dbias && team.rank == 0) {
            for (int64_t c = 0; c < ceil_div(n, p.chunk); ++c) {
                const float *sum = to.sums + c * d.a.out_features;
                for (int64_t o = 0; o < d.a.out_features; ++o)
                    d.dbias[o] = first && c == 0 ? sum[o] : d.dbias[o] + sum[o];
            }
        }
        team.barrier();
    }
}

// dst += copies [parts - 1][stride], this thread's share of n floats
void add_copies(float *dst, const float *copies, int64_t parts, int64_t stride, int64_t n, const Team &team) {
    const int64_t last = n * (team.rank + 1) / team.size;
    for (int64_t i = n * team.rank / team.size; i < last; ++i) {
        float sum = dst[i];
        for (int64_t part = 1; part < parts; ++part) sum += copies[(part - 1) * stride + i];
        dst[i] = sum;
    }
}

constexpr int64_t MAX_COPIES = int64_t{1} << 24;  // floats of gradients of parts

void gradient(const Gradient &d, Method method, int threads) {
    const int64_t values = d.l.nnz() * d.block(), stride = values + (d.dbias ? d.a.out_features : 0);
    // One part per thread needs one barrier instead of two per tile: each costs a time slice on a busy machine.
    const bool split = threads > 1 && d.m >= 2 * threads * d.tile && (threads - 1) * stride <= MAX_COPIES;
    const int64_t part_rows = split ? round_up(ceil_div(d.m, threads), d.tile) : d.m, parts = ceil_div(d.m, part_rows);
    const Panels p(d, method);
    const int64_t sums_size = d.dbias ? p.chunks * d.a.out_features : 0;
    const Scratch<float> copies((parts - 1) * stride), x(parts * p.x_size), g(parts * p.g_size),
        sums(parts * sums_size);
    const Scratch<Counter> counters(parts * 2 * p.tiles);
    for (int64_t i = 0; i < parts * 2 * p.tiles; ++i) counters[i] = Counter{};
    for (int64_t part = 0; part < parts && method == Method::DOT; ++part) {  // features that only pad an edge block
        const int64_t x_used = d.a.in_features * p.x_stride, g_used = d.a.out_features * p.g_stride;
        memset(x.get() + part * p.x_size + x_used, 0, (p.x_size - x_used) * sizeof(float));
        memset(g.get() + part * p.g_size + g_used, 0, (p.g_size - g_used) * sizeof(float));
    }
    parallel(threads, [&](const Team &team) {
        for (int64_t part = parts == 1 ? 0 : team.rank; part < parts; part += team.size) {
            Gradient own = d;
            own.x += part * part_rows * d.ldx;
            own.dy += part * part_rows * d.lddy;
            own.m = min64(part_rows, d.m - part * part_rows);
            if (part > 0) own.dvalues = copies.get() + (part - 1) * stride;
            if (part > 0 && d.dbias) own.dbias = own.dvalues + values;
            accumulate(own, method, p,
                       {x.get() + part * p.x_size, g.get() + part * p.g_size, sums.get() + part * sums_size,
                        counters.get() + part * 2 * p.tiles},
                       parts == 1 ? team : Team{0, 1});
        }
        if (parts == 1) return;
        team.barrier();
        add_copies(d.dvalues, copies.get(), parts, stride, values, team);
        if (d.dbias) add_copies(d.dbias, copies.get() + values, parts, stride, d.a.out_features, team);
    });
}

}  // namespace

void linear_wgrad(const LinearArgs &a, const float *dy, int64_t lddy, const float *x, int64_t ldx,
                  const uint8_t *element_mask, float *dvalues, float *dbias) {
    const Layout &l = a.layout;
    const int64_t size = l.bo * l.bi, nnz = l.nnz();
    const int64_t used = a.m == 0 ? 0 : nnz;
    memset(dvalues + used * size, 0, (l.capacity - used) * size * sizeof(float));
    if (a.m == 0) {
        if (dbias) memset(dbias, 0, a.out_features * sizeof(float));
        return;
    }
    const int threads = useful_threads(a.threads, a.m * (nnz * size + a.in_features + a.out_features));
    const Method method = can_spread(l) ? Method::SPREAD : l.bo >= 4 && l.bi > 4 ? Method::OUTER : Method::DOT;
    // Tiles of x and dy share the L2 cache: 1 MB for outer products. A dot product pays one sum over lanes per tile,
    // so those tiles are taller.
    const int64_t budget = (int64_t{1} << (method == Method::DOT ? 19 : 18)) / (a.in_features + a.out_features);
    Gradient d{a, l, dy, lddy, x, ldx, dvalues, dbias, a.m, 0};
    d.tile = min64(round_up(a.m, LANES), max64(64, min64(512, round_up(budget, LANES))));
    gradient(d, method, threads);
    if (element_mask)
        for (int64_t q = 0; q < nnz; ++q) apply_mask(element_mask + q * ceil_div(size, 8), size, dvalues + q * size);
}

}  // namespace SK_ISA
}  // namespace sparsekern
