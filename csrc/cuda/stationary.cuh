// SPDX-License-Identifier: Apache-2.0
// The kernel of stationary.h, its launch, and the choice of the template for a launch.
//
// After the tile is loaded no barrier joins the warps: each takes units of its own and feeds itself through a ring of
// its own. What bounds it is shared memory: a step of BM x NB reads (BM + NB) * 32 bytes for BM * NB / 128 multiply
// instructions.
#pragma once

#include "launch.cuh"
#include "stationary_feeder.cuh"
#include "stationary_result.cuh"
#include "stationary_tile.cuh"

namespace sparsekern {
namespace cuda {
namespace stationary_kernel {

// The constant is the instruction's; stages - 2 is equal over the grid.
SK_DEVICE void wait_for_stage(int stages) {
    if (stages == 2) {
        cp_async_wait<0>();
    } else if (stages == 3) {
        cp_async_wait<1>();
    } else {
        cp_async_wait<2>();
    }
}

template <int Bm, int Nb> SK_DEVICE void clear(Sums<Bm, Nb> &sums) {
    SK_UNROLL
    for (int i = 0; i < Bm * Nb / 32; ++i) sums[i / (Nb / 2)][i / 4 % (Nb / 8)][i % 4] = 0.0f;
}

// sums += pixels [Bm, step] * weights [step, Nb]; rows: this lane's row of each 16 pixels.
template <class E, bool Transposed, int Bm, int Nb>
SK_DEVICE void multiply(Sums<Bm, Nb> &sums, const Shared (&rows)[Bm / 16], Shared offset, Shared weights) {
    uint32_t b[Nb / 8][2];
    WeightStep<E, Transposed, Nb>::load(b, weights);
    SK_UNROLL
    for (int m = 0; m < Bm / 16; ++m) {
        uint32_t a[4];
        ldmatrix_x4(a, rows[m] + offset);
        SK_UNROLL
        for (int j = 0; j < Nb / 8; ++j) mma<E>(sums[m][j], a, b[j][0], b[j][1]);
    }
}

// All units of one warp.
template <class E, bool Transposed, int Bm, int Nb>
SK_DEVICE void run(int stages, Feeder<E, Transposed, Nb> &feeder, const Shared (&rows)[Bm / 16], Shared ring,
                   const Result<E, Bm, Nb> &result) {
    using Step = WeightStep<E, Transposed, Nb>;
    const Shared weights = ring + static_cast<Shared>(Step::lane_place(lane_id()));
    Sums<Bm, Nb> sums;
    clear<Bm, Nb>(sums);
    int stage = 0, vacant = stages - 1;
    for (;;) {
        const uint32_t card = feeder.card(stage);
        if (card & Card::end) break;
        wait_for_stage(stages);
        // This stage is complete, and all lanes have read the vacant one.
        warp_barrier();
        feeder.push(vacant);
        const Shared at = weights + static_cast<Shared>(stage * 2 * Step::bytes);
        if (card & Card::first) multiply<E, Transposed, Bm, Nb>(sums, rows, Card::offset(0, card), at);
        if (card & Card::second) multiply<E, Transposed, Bm, Nb>(sums, rows, Card::offset(1, card), at + Step::bytes);
        if (card & Card::last) {
            result.store(sums, feeder.unit(stage));
            clear<Bm, Nb>(sums);
        }
        vacant = stage;
        stage = stage + 1 == stages ? 0 : stage + 1;
    }
}

template <class E, bool Transposed, int Bm, int Nb>
SK_KERNEL(stationary_threads(Bm, Nb), 1)
kernel(SK_ARGS(StationaryArgs) args) {
    const Tile<E, Transposed> tile(args);
    if (tile.empty()) return;
    const Shared memory = shared_memory();
    tile.load(memory + args.tile);
    cp_async_commit();

    const int warps = thread_count() / 32, warp = warp_id();
    Feeder<E, Transposed, Nb> feeder(args, block_y() * warps + warp, args.splits * warps);
    tile.fill_pixels(memory + args.pixels, thread_id(), thread_count(), Bm);
    tile.fill_taps(memory + args.taps, thread_id(), thread_count());
    barrier();

    const Shared ring = memory + static_cast<Shared>(warp * args.stages * (2 * WeightStep<E, Transposed, Nb>::bytes));
    feeder.attach(ring, memory + args.taps);
    for (int stage = 0; stage < args.stages - 1; ++stage) feeder.push(stage);
    cp_async_wait<0>();
    tile.finish(memory + args.tile);
    barrier();

    Shared rows[Bm / 16];
    SK_UNROLL
    for (int m = 0; m < Bm / 16; ++m) {
        const int row = m * 16 + operand_row(lane_id());
        rows[m] = memory + args.tile + load_shared<uint32_t>(memory + args.pixels + static_cast<Shared>(row * 8)) +
                  static_cast<Shared>(operand_byte(lane_id()));
    }
    run<E, Transposed, Bm, Nb>(args.stages, feeder, rows, ring,
                               Result<E, Bm, Nb>(args, memory + args.pixels, tile.first_pixel()));
}

template <class E, bool Transposed, int Bm, int Nb> void launch_as(const StationaryLaunch &a) {
    launch("stationary", kernel<E, Transposed, Bm, Nb>, Grid{a.grid_x, a.grid_y, a.grid_z}, a.threads, a.shared_bytes,
           a.stream, a.args);
}

template <class E, bool Transposed, int Bm> void launch_nb(const StationaryLaunch &a) {
    a.nb == 16 ? launch_as<E, Transposed, Bm, 16>(a) : launch_as<E, Transposed, Bm, 32>(a);
}

template <class E, bool Transposed> void launch_bm(const StationaryLaunch &a) {
    a.bm == 32   ? launch_nb<E, Transposed, 32>(a)
    : a.bm == 64 ? launch_nb<E, Transposed, 64>(a)
                 : launch_nb<E, Transposed, 128>(a);
}

template <class E> void launch_stationary(const StationaryLaunch &a) {
    a.transposed ? launch_bm<E, true>(a) : launch_bm<E, false>(a);
}

}  // namespace stationary_kernel
}  // namespace cuda
}  // namespace sparsekern
