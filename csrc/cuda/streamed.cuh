// SPDX-License-Identifier: Apache-2.0
// Forward and dgrad with streamed activations (streamed.h): traits, kernel, launch, dispatch.
//
// A warp owns 32 pixels and all outputs of the panel. Per step it loads the operands of its pixels once and multiplies
// them with each block that is present; rows of the panel that lack the column are skipped by a branch that the whole
// warp takes, so that neither a product nor a weight is spent on them.
#pragma once

#include <climits>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "ring.cuh"
#include "streamed.h"
#include "streamed_result.cuh"

namespace sparsekern {
namespace cuda {
namespace streaming {

template <class E_, bool Transposed_, int Edge_> struct Traits {
    using E = E_;
    static constexpr bool Transposed = Transposed_;
    static constexpr int Edge = Edge_;
    static constexpr int ROWS = panel_rows(Edge), OUTPUTS = panel_outputs(Edge);
    using Tile = WeightTile<E, Transposed, Edge>;
};

// -- products --

template <class T> class Consumer {
    using E = typename T::E;
    using Tile = typename T::Tile;

public:
    SK_DEVICE Consumer(const Args &a, int warp)
        : steps_log_(a.steps_log),
          source_(
              keep(static_cast<Shared>(chunk_place(warp * 32 + operand_row(lane_id()), operand_byte(lane_id()) / 16)))),
          weights_(keep(static_cast<Shared>(thread_count() * ROW_BYTES + Tile::Step::lane_place(lane_id())))) {}

    SK_DEVICE void consume(Sums<T::OUTPUTS> &sums, Shared stage, uint32_t present) const {
        if constexpr (T::ROWS == 1) {
            const int steps = bit_count(present) << steps_log_;
            if (T::Edge == 128 && steps == STEPS) {
                consume_row<true>(sums, stage, steps);
            } else {
                consume_row<false>(sums, stage, steps);
            }
        } else {
            consume_rows(sums, stage, present);
        }
    }

private:
    // A panel of one row has every block of the stage. Without branches the loads of a step go on during the products
    // of the one before.
    template <bool Full> SK_DEVICE void consume_row(Sums<T::OUTPUTS> &sums, Shared stage, int steps) const {
        SK_UNROLL
        for (int step = 0; step < STEPS; ++step) {
            if (!Full && step >= steps) break;
            uint32_t a[2][4];
            load_pixels(a, stage, step);
            multiply(sums, a, stage + weights_ + static_cast<Shared>(step * Tile::step_bytes), 0);
        }
    }

    SK_DEVICE void consume_rows(Sums<T::OUTPUTS> &sums, Shared stage, uint32_t present) const {
        SK_UNROLL
        for (int step = 0; step < STEPS; ++step) {
            const int first = (step >> steps_log_) * T::ROWS, within = step & ((1 << steps_log_) - 1);
            const uint32_t rows = present >> first & ((1u << T::ROWS) - 1);
            if (rows == 0) continue;
            uint32_t a[2][4];
            load_pixels(a, stage, step);
            const int before = bit_count(present & ((1u << first) - 1));
            Shared weights =
                stage + weights_ + static_cast<Shared>(((before << steps_log_) + within) * Tile::step_bytes);
            SK_UNROLL
            for (int row = 0; row < T::ROWS; ++row) {
                if (!(rows >> row & 1)) continue;
                multiply(sums, a, weights, row);
                weights += static_cast<Shared>(Tile::step_bytes << steps_log_);
            }
        }
    }

    SK_DEVICE void load_pixels(uint32_t (&a)[2][4], Shared stage, int step) const {
        const Shared first = (stage + source_) ^ static_cast<Shared>(step * 32);
        SK_UNROLL
        for (int m = 0; m < 2; ++m) {
            ldmatrix_x4(a[m], first + static_cast<Shared>(m * 16 * ROW_BYTES));
            SK_UNROLL
            for (int i = 0; i < 4; ++i) a[m][i] = round_operand<E>(a[m][i]);
        }
    }

    // One step of one block.
    SK_DEVICE static void multiply(Sums<T::OUTPUTS> &sums, const uint32_t (&a)[2][4], Shared weights, int row) {
        SK_UNROLL
        for (int slice = 0; slice < Tile::SLICES; ++slice) {
            uint32_t b[Tile::Nb / 8][2];
            Tile::Step::load(b, weights + static_cast<Shared>(slice * Tile::Step::bytes));
            SK_UNROLL
            for (int j = 0; j < Tile::Nb / 8; ++j) {
                SK_UNROLL
                for (int m = 0; m < 2; ++m) {
                    mma<E>(sums[m][(row * Tile::SLICES + slice) * (Tile::Nb / 8) + j], a[m], b[j][0], b[j][1]);
                }
            }
        }
    }

    const int steps_log_;
    const Shared source_, weights_;  // of this lane, from the start of a stage
};

// -- the ring --

template <class T> class Ring {
    using E = typename T::E;

public:
    SK_DEVICE Ring(const Args &a, const Spot &spot, int warp, Shared stages, Shared taps)
        : a_(a), begin_(stages), bytes_(static_cast<Shared>(a.stage_bytes)), write_(stages), read_(stages),
          walk_(a, spot, taps), pixels_(a, spot, warp), weights_(a, warp) {}

    // Once the taps are in shared memory.
    SK_DEVICE void fill() {
        next_ = walk_.take();
        for (int i = 0; i < a_.stages - 1; ++i) push();
    }

    // The rows of the next stage, 0 at the end. The stage before it is free from here on.
    SK_DEVICE uint32_t pop() {
        const uint32_t present = a_.stages == 4 ? third_ : a_.stages == 3 ? second_ : first_;
        if (present == 0) return 0;
        wait_for_oldest(a_.stages);
        barrier();
        return present;
    }
    SK_DEVICE Shared front() const { return read_; }

    // The ticket was taken one stage earlier, so that its index has come.
    SK_DEVICE void push() {
        if (next_.present) {
            pixels_.issue(next_, write_);
            weights_.template issue<T::ROWS>(next_, write_ + static_cast<Shared>(thread_count() * ROW_BYTES));
        }
        cp_async_commit();
        third_ = second_, second_ = first_, first_ = next_.present;
        write_ = following(write_);
        if (next_.present) next_ = walk_.take();
    }
    SK_DEVICE void release() { read_ = following(read_); }

private:
    SK_DEVICE Shared following(Shared stage) const {
        return stage + bytes_ == begin_ + static_cast<Shared>(a_.stages) * bytes_ ? begin_ : stage + bytes_;
    }

    const Args &a_;
    const Shared begin_, bytes_;
    Shared write_, read_;
    Walk<E, T::Transposed, T::ROWS> walk_;
    PixelCopy<E, T::Transposed> pixels_;
    WeightCopy<E, T::Transposed, T::Edge> weights_;
    Ticket next_;
    uint32_t first_ = 0, second_ = 0, third_ = 0;  // rows of the stages under way, the last first
};

// -- kernel --

template <int Outputs> SK_DEVICE void clear(Sums<Outputs> &sums) {
    SK_UNROLL
    for (int i = 0; i < Outputs; ++i) sums[i / (Outputs / 2)][i / 4 % (Outputs / 8)][i % 4] = 0.0f;
}

// The sums of a panel of 128 outputs take 128 registers of each thread, and a multiprocessor has room for 8 such warps;
// those of 64 outputs leave room for 16.
template <class E, bool Transposed, int Edge> SK_KERNEL(256, Edge == 64 ? 2 : 1) kernel(SK_ARGS(Args) args) {
    using T = Traits<E, Transposed, Edge>;
    const Spot spot = spot_of<Transposed>(args, block_x());
    const int warp = warp_id();
    const Shared stages = shared_memory();
    const Shared taps = stages + static_cast<Shared>(args.stages * args.stage_bytes);
    Ring<T> ring(args, spot, warp, stages, taps);
    write_taps<Transposed>(args, spot, taps);
    barrier();
    ring.fill();

    const Consumer<T> consumer(args, warp);
    Sums<T::OUTPUTS> sums;
    clear<T::OUTPUTS>(sums);
    while (const uint32_t present = ring.pop()) {
        ring.push();
        consumer.consume(sums, ring.front(), present);
        ring.release();
    }
    // Found again, so that the spot takes no registers until here.
    const Spot same_spot = spot_of<Transposed>(args, keep(block_x()));
    Result<E, Transposed, T::OUTPUTS>(args, same_spot, warp).store(sums);
}

// -- launch --

// Positions of tiles of `tile` over `extent` pixels cut into phases; the first phase is the largest.
inline int64_t tiles_over(int64_t extent, int phases, int tile) {
    return ceil_div(ceil_div(extent, phases), tile);
}

inline bool on_16_bytes(const void *address, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0 && bytes % 16 == 0;
}

inline void set_geometry(Args &b, const Problem &a, const ProductPlan &plan, bool transposed) {
    b.n = a.n;
    b.source_h = transposed ? a.p : a.h, b.source_w = transposed ? a.q : a.w;
    b.result_h = transposed ? a.h : a.p, b.result_w = transposed ? a.w : a.q;
    b.y = {a.r, a.stride_h, a.dilation_h, a.pad_top};
    b.x = {a.s, a.stride_w, a.dilation_w, a.pad_left};
    b.tile_images = plan.tile_images, b.tile_h = plan.tile_h, b.tile_w = plan.tile_w;
    b.tiles_y = static_cast<int>(tiles_over(b.result_h, b.y.phases(transposed), plan.tile_h));
    b.tiles_x = static_cast<int>(tiles_over(b.result_w, b.x.phases(transposed), plan.tile_w));
    b.stages = plan.stages;
}

inline void set_blocks(Args &b, const Problem &a, const int32_t *packed, bool transposed) {
    const int bytes = element_bytes(a.dtype), edge = transposed ? a.bi : a.bo, depth = transposed ? a.bo : a.bi;
    b.channels = transposed ? a.out_per_group() : a.in_per_group();
    b.features = transposed ? a.in_per_group() : a.out_per_group();
    b.columns = transposed ? a.rows() : a.cols();
    b.rows = transposed ? a.cols() : a.rows();
    b.panels = static_cast<int>(ceil_div(b.rows, panel_rows(edge)));
    b.last_channels = b.channels - (b.columns - 1) * depth;

    const Index index(a, packed);
    b.ptr = transposed ? index.t_ptr : index.row_ptr;
    b.perm = transposed ? index.t_perm : nullptr;
    b.list_ptr = transposed ? index.t_union_ptr : index.union_ptr;
    b.list = transposed ? index.t_union_list : index.union_list;
    if (!union_rows(edge)) {
        b.list_ptr = b.ptr;
        b.list = transposed ? index.t_row : index.col;
    }
    b.block_bytes = static_cast<uint32_t>(a.bo * a.bi * bytes);
    b.weight_row_bytes = a.bi * bytes;
    const int steps = depth * bytes / (ROW_BYTES / STEPS);
    b.steps_log = steps == 1 ? 0 : steps == 2 ? 1 : 2;
    b.parts = steps <= STEPS ? 1 : steps / STEPS;
    b.stage_bytes = static_cast<int>(stage_bytes(b.tile_images * b.tile_h * b.tile_w, edge));
}

inline void set_operands(Args &b, const Call &call, bool transposed) {
    const Problem &a = call.problem;
    const int bytes = element_bytes(a.dtype);
    b.source = static_cast<const char *>(call.source), b.values = static_cast<const char *>(call.values);
    b.bias = call.bias, b.result = call.result;
    b.result_ld = transposed ? a.c : a.o;
    b.aligned_result = on_16_bytes(b.result, b.result_ld * bytes) && int64_t{b.features} * bytes % 16 == 0;
    const bool chunks = on_16_bytes(b.source, call.source_ld * bytes) && int64_t{b.channels} * bytes % 16 == 0;
    b.unit_bytes = chunks ? 16 : bytes, b.chunk_units = 16 / b.unit_bytes;
    b.column_units = (transposed ? a.bo : a.bi) * bytes / b.unit_bytes;
    // Within a tile, pixels are found by 32 bits.
    const int64_t images = a.n < b.tile_images ? a.n : b.tile_images, units = call.source_ld * bytes / b.unit_bytes;
    const int64_t height = images * b.source_h + int64_t{b.y.taps} * b.y.dilation + b.y.pad + b.y.stride;
    const int64_t span = (height * b.source_w + int64_t{b.x.taps} * b.x.dilation + b.x.pad + b.x.stride) * units;
    if (span > INT32_MAX) {
        throw std::invalid_argument("streamed: expected a tile that spans at most 2147483647 x " +
                                    std::to_string(b.unit_bytes) + " bytes of the source, got " + std::to_string(span) +
                                    "; use a tile of fewer images");
    }
    b.pixel_units = static_cast<int>(units);
}

template <class E, bool Transposed, int Edge> void launch_as(const Call &call, const Args &args) {
    const int64_t tiles = ceil_div(args.n, args.tile_images) * args.tiles_y * args.tiles_x;
    const int64_t phases = int64_t{args.y.phases(Transposed)} * args.x.phases(Transposed);
    launch("streamed", kernel<E, Transposed, Edge>, Grid{tiles * phases * args.panels, 1, call.problem.groups},
           call.plan.bm, call.shared_bytes, call.stream, args);
}

template <class E, bool Transposed> void launch_edge(const Call &call) {
    Args args{};
    set_geometry(args, call.problem, call.plan, Transposed);
    set_blocks(args, call.problem, call.index, Transposed);
    set_operands(args, call, Transposed);
    switch (Transposed ? call.problem.bi : call.problem.bo) {
    case 16:
        return launch_as<E, Transposed, 16>(call, args);
    case 32:
        return launch_as<E, Transposed, 32>(call, args);
    case 64:
        return launch_as<E, Transposed, 64>(call, args);
    default:
        return launch_as<E, Transposed, 128>(call, args);
    }
}

template <class E> void run(const Call &call) {
    call.step == Step::dgrad ? launch_edge<E, true>(call) : launch_edge<E, false>(call);
}

}  // namespace streaming
}  // namespace cuda
}  // namespace sparsekern
