// SPDX-License-Identifier: Apache-2.0
// Forward and dgrad of a block-sparse linear layer. Both are one product: every block row of outputs sums
// (stored block) x (slice of the input), over the layout for the forward pass and over its transpose for dgrad.
//
// A panel of batch rows is packed transposed, [feature][batch row], so that vectors run along the batch, weights are
// broadcast, and any block shape keeps its outputs x batch tile in registers over a whole block row.
#include <cstring>

#include "isa.h"
#include "simd.h"
#include "threads.h"

namespace sparsekern {
namespace SK_ISA {
namespace {

struct Product {
    int64_t m;             // batch rows
    int64_t rows, bm, bk;  // block rows of the output; outputs and reduction length of one block
    int64_t features_in, features_out;
    const int32_t *ptr, *idx, *perm;  // perm: slot of each entry, or null where entries are in slot order
    const float *values;
    int64_t stride_m, stride_k;  // within one block of values
    const float *bias;
    const float *x;
    int64_t ldx;
    float *y;
    int64_t ldy;
    int threads;

    int64_t nnz() const { return ptr[rows]; }
    const float *block(int64_t entry) const { return values + (perm ? perm[entry] : entry) * bm * bk; }
};

// Widest tiles that keep their accumulators in registers: NARROW_NV vectors x NARROW_BM outputs, or WIDE_NV x WIDE_BM
// for blocks of few outputs.
constexpr int NARROW_NV = 2, NARROW_BM = REGISTERS == 32 ? 8 : LANES == 8 ? 6 : 4;
constexpr int WIDE_NV = 4, WIDE_BM = REGISTERS == 32 ? 6 : LANES == 8 ? 3 : 2;
// Up to this many batch rows, weights are used where they lie: packing them would cost as much as the product.
constexpr int64_t DIRECT_ROWS = 8;

template <int N> struct Constant {
    static constexpr int value = N;
};

// bm outputs cut into tiles of nearly equal height.
struct Split {
    int64_t count, small, larger;

    Split(int64_t bm, int64_t limit) : count(ceil_div(bm, limit)), small(bm / count), larger(bm % count) {}
    int64_t begin(int64_t piece) const { return piece * small + min64(piece, larger); }
    int64_t size(int64_t piece) const { return small + (piece < larger); }
};

// Where a tile finds weight (k, i) of entry q: at entry(q)[k * step_k() + i * step_m()].
template <int BM> struct PackedWeights {
    const float *w;
    int64_t size;

    const float *entry(int64_t q) const { return w + q * size; }
    static constexpr int64_t step_k() { return BM; }
    static constexpr int64_t step_m() { return 1; }
};
struct DirectWeights {
    const Product &p;
    int64_t first, begin;

    const float *entry(int64_t q) const { return p.block(first + q) + begin * p.stride_m; }
    int64_t step_k() const { return p.stride_k; }
    int64_t step_m() const { return p.stride_m; }
};

// y [BM][NR] = bias + sum over n entries of their weights times their slices of the panel x [feature][NR], for the
// first NV * L batch rows of the panel. Small tiles sum several entries side by side, in accumulators of their own:
// a multiply-add takes four cycles, in which 4 to 8 others can start.
template <int L, int NV, int NR, int BM, class Weights>
SK_INLINE void tile(const float *x, const int32_t *idx, int64_t n, int64_t bk, const Weights &weights,
                    const float *bias, float *y) {
    using V = Vec<L>;
    constexpr int CHAINS = BM * NV >= 8 ? 1 : BM * NV >= 4 ? 2 : 4;
    V acc[CHAINS][BM][NV] = {};
    const auto add = [&](int64_t q, auto chains) __attribute__((always_inline)) {
        (void)chains;
        constexpr int C = decltype(chains)::value;
        const float *xq[C], *wq[C];
        SK_UNROLL
        for (int c = 0; c < C; ++c) {
            xq[c] = x + idx[q + c] * bk * NR;
            wq[c] = weights.entry(q + c);
        }
        for (int64_t k = 0; k < bk; ++k) {
            SK_UNROLL
            for (int c = 0; c < C; ++c) {
                V xv[NV];
                SK_UNROLL
                for (int v = 0; v < NV; ++v) xv[v] = load<L>(xq[c] + v * L);
                SK_UNROLL
                for (int i = 0; i < BM; ++i) {
                    const V wi = broadcast<L>(wq[c][i * weights.step_m()]);
                    SK_UNROLL
                    for (int v = 0; v < NV; ++v) acc[c][i][v] += wi * xv[v];
                }
                xq[c] += NR;
                wq[c] += weights.step_k();
            }
        }
    };
    int64_t q = 0;
    for (; q + CHAINS <= n; q += CHAINS) add(q, Constant<CHAINS>());
    for (; q < n; ++q) add(q, Constant<1>());
    SK_UNROLL
    for (int i = 0; i < BM; ++i) {
        SK_UNROLL
        for (int v = 0; v < NV; ++v) {
            V sum = acc[0][i][v];
            SK_UNROLL
            for (int c = 1; c < CHAINS; ++c) sum += acc[c][i][v];
            store<L>(y + i * NR + v * L, sum + broadcast<L>(bias[i]));
        }
    }
}

using PackedTile = void (*)(const float *x, const int32_t *idx, int64_t n, int64_t bk, const float *w,
                            const float *bias, float *y);

template <int NV, int BM>
void packed_tile(const float *x, const int32_t *idx, int64_t n, int64_t bk, const float *w, const float *bias,
                 float *y) {
    tile<LANES, NV, NV * LANES, BM>(x, idx, n, bk, PackedWeights<BM>{w, bk * BM}, bias, y);
}

template <int NV, int BM> PackedTile packed_tile_for(int64_t bm) {
    if constexpr (BM == 1)
        return packed_tile<NV, 1>;
    else
        return bm == BM ? packed_tile<NV, BM> : packed_tile_for<NV, BM - 1>(bm);
}

PackedTile packed_tile_for(int nv, int64_t bm) {
    constexpr int tall = NARROW_BM > WIDE_BM ? NARROW_BM : WIDE_BM;
    switch (nv) {
    case 1:
        return packed_tile_for<1, tall>(bm);
    case 2:
        return packed_tile_for<2, tall>(bm);
    default:
        return packed_tile_for<4, WIDE_BM>(bm);
    }
}

using DirectTile = void (*)(const Product &p, const float *x, int64_t first, int64_t n, int64_t begin,
                            const float *bias, float *y);

template <int L, int NV, int BM>
void direct_tile(const Product &p, const float *x, int64_t first, int64_t n, int64_t begin, const float *bias,
                 float *y) {
    constexpr int NR = L * NV > LANES ? L * NV : LANES;
    tile<L, NV, NR, BM>(x, p.idx + first, n, p.bk, DirectWeights{p, first, begin}, bias, y);
}

template <int L, int NV, int BM> DirectTile direct_tile_for(int64_t bm) {
    if constexpr (BM == 1)
        return direct_tile<L, NV, 1>;
    else
        return bm == BM ? direct_tile<L, NV, BM> : direct_tile_for<L, NV, BM - 1>(bm);
}

DirectTile direct_tile_for(int64_t m, int64_t bm) {
    if (m <= 4) return direct_tile_for<4, 1, NARROW_BM>(bm);
    constexpr int L = LANES < 8 ? LANES : 8;
    return direct_tile_for<L, 8 / L, NARROW_BM>(bm);
}

// Weights of a block row in the order its tiles read them: [piece][entry][k][output of the piece].
void pack_row(const Product &p, const Split &split, int64_t row, float *w) {
    if (p.bm * p.bk == 1) {
        for (int64_t q = p.ptr[row]; q < p.ptr[row + 1]; ++q) *w++ = *p.block(q);
        return;
    }
    for (int64_t piece = 0; piece < split.count; ++piece) {
        const int64_t begin = split.begin(piece), size = split.size(piece);
        for (int64_t q = p.ptr[row]; q < p.ptr[row + 1]; ++q) {
            const float *block = p.block(q) + begin * p.stride_m;
            for (int64_t k = 0; k < p.bk; ++k)
                for (int64_t i = 0; i < size; ++i) *w++ = block[i * p.stride_m + k * p.stride_k];
        }
    }
}

// First block row of segment s of `count`, so that segments hold nearly equal numbers of entries and rows.
int64_t segment_begin(const Product &p, int64_t s, int64_t count) {
    if (s >= count) return p.rows;
    const int64_t target = (p.nnz() + p.rows) * s / count;
    int64_t low = 0, high = p.rows;
    while (low < high) {
        const int64_t mid = (low + high) / 2;
        if (p.ptr[mid] + mid < target)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

void pack_panel(const Product &p, int64_t n0, int64_t count, int64_t nr, float *panel) {
    transpose_in(p.x + n0 * p.ldx, p.ldx, count, p.features_in, nr, panel, nr);
    const int64_t padded = ceil_div(p.features_in, p.bk) * p.bk;
    memset(panel + p.features_in * nr, 0, (padded - p.features_in) * nr * sizeof(float));
}

void product(const Product &p) {
    if (p.m == 0) return;
    const bool direct = p.m <= DIRECT_ROWS && p.bm * p.bk > 4;  // one by one they cost more than packing
    const bool wide = !direct && p.bm <= WIDE_BM && p.m > NARROW_NV * LANES;
    const int64_t nr_full = direct ? max64(LANES, p.m <= 4 ? 4 : 8) : LANES * (wide ? WIDE_NV : NARROW_NV);
    const Split split(p.bm, wide ? WIDE_BM : NARROW_BM);
    const int64_t panels = ceil_div(p.m, nr_full);
    const int64_t group = max64(1, 64 / p.bm);  // block rows computed before they are written out
    const bool streamed = p.m * p.features_out >= STREAM_FLOATS;
    const int threads = useful_threads(p.threads, p.m * (p.nnz() * p.bm * p.bk + p.features_in + p.features_out));
    const int64_t segments = threads == 1 || panels >= 4 * threads ? 1 : min64(ceil_div(4 * threads, panels), p.rows);

    const int64_t panel_size = ceil_div(p.features_in, p.bk) * p.bk * nr_full, stage_size = group * p.bm * nr_full;
    const Scratch<float> scratch(threads * round_up(panel_size + stage_size, 16));
    const Scratch<float> packed(direct ? 0 : p.nnz() * p.bm * p.bk);
    const Scratch<float> bias(p.rows * p.bm);
    memset(bias.get(), 0, p.rows * p.bm * sizeof(float));
    if (p.bias) memcpy(bias.get(), p.bias, p.features_out * sizeof(float));

    Counter pack_rows, tasks;
    parallel(threads, [&](const Team &team) {
        if (!direct) {
            constexpr int64_t chunk = 16;
            for (int64_t c; (c = pack_rows.take() * chunk) < p.rows;)
                for (int64_t row = c; row < min64(c + chunk, p.rows); ++row)
                    pack_row(p, split, row, packed.get() + p.ptr[row] * p.bm * p.bk);
            team.barrier();
        }
        float *panel = scratch.get() + team.rank * round_up(panel_size + stage_size, 16);
        float *stage = panel + panel_size;
        int64_t held = -1;
        for (int64_t task; (task = tasks.take()) < panels * segments;) {
            const int64_t n0 = task / segments * nr_full, count = min64(nr_full, p.m - n0);
            const int nv = direct ? 1 : count <= LANES ? 1 : count <= 2 * LANES ? 2 : 4;
            const int64_t nr = direct ? nr_full : nv * LANES;
            if (held != n0) pack_panel(p, n0, count, nr, panel);
            held = n0;
            const int64_t last = segment_begin(p, task % segments + 1, segments);
            for (int64_t row = segment_begin(p, task % segments, segments); row < last; row += group) {
                const int64_t end = min64(row + group, last);
                for (int64_t r = row; r < end; ++r) {
                    const int64_t first = p.ptr[r], n = p.ptr[r + 1] - first;
                    for (int64_t piece = 0; piece < split.count; ++piece) {
                        const int64_t begin = split.begin(piece), size = split.size(piece);
                        float *y = stage + ((r - row) * p.bm + begin) * nr;
                        const float *b = bias.get() + r * p.bm + begin;
                        if (direct)
                            direct_tile_for(p.m, size)(p, panel, first, n, begin, b, y);
                        else
                            packed_tile_for(nv, size)(panel, p.idx + first, n, p.bk,
                                                      packed.get() + (first * p.bm + begin * n) * p.bk, b, y);
                    }
                }
                const int64_t o0 = row * p.bm;
                const int64_t o_count = min64(end * p.bm, p.features_out) - o0;
                float *y = p.y + n0 * p.ldy + o0;
                if (streamed && can_stream(y, p.ldy))
                    transpose_out<true>(stage, nr, count, o_count, y, p.ldy);
                else
                    transpose_out(stage, nr, count, o_count, y, p.ldy);
            }
        }
        if (streamed) stream_fence();
    });
}

}  // namespace

void linear_forward(const LinearArgs &a, const float *x, int64_t ldx, const float *values, const float *bias, float *y,
                    int64_t ldy) {
    const Layout &l = a.layout;
    product({a.m, l.rows, l.bo, l.bi, a.in_features, a.out_features, l.row_ptr, l.col, nullptr, values, l.bi, 1, bias,
             x, ldx, y, ldy, a.threads});
}

void linear_dgrad(const LinearArgs &a, const float *dy, int64_t lddy, const float *values, float *dx, int64_t lddx) {
    const Layout &l = a.layout;
    product({a.m, l.cols, l.bi, l.bo, a.out_features, a.in_features, l.t_ptr, l.t_row, l.t_perm, values, 1, l.bi,
             nullptr, dy, lddy, dx, lddx, a.threads});
}

}  // namespace SK_ISA
}  // namespace sparsekern
