// SPDX-License-Identifier: Apache-2.0
// The kernel of stationary.h, its launch, and the choice of the template for a launch.
//
// After the tile is loaded no barrier joins the warps: each takes units of its own and feeds itself through a ring of
// its own. What should bound it is shared memory: a stage (two steps of BM x NB) reads 2 * (BM + NB) * 32 bytes for
// BM * NB / 64 multiply instructions. Beside those, the loads of their operands and NB / 8 copies, what CUDA 13.0 makes
// of the main loop has 80 to 97 other instructions per stage on sm_90a and 94 to 121 on sm_80, the fewest at BM 32 and
// NB 16; for Tf32, which rounds its weights, 131 to 167 on sm_90a. About ten of them are for other sizes of the ring
// and for the first turns, and are jumped over.
#pragma once

#include "launch.cuh"
#include "ring.cuh"
#include "stationary_feeder.cuh"
#include "stationary_result.cuh"
#include "stationary_tile.cuh"

namespace sparsekern {
namespace cuda {
namespace stationary_kernel {

template <int Bm, int Nb> SK_DEVICE void clear(Sums<Bm, Nb> &sums) {
    SK_UNROLL
    for (int i = 0; i < Bm * Nb / 32; ++i) sums[i / (Nb / 2)][i / 4 % (Nb / 8)][i % 4] = 0.0f;
}

// sums += pixels [Bm, step] * weights [step, Nb]; rows: this lane's row of each 16 pixels. The next pixels are loaded
// while the present ones are multiplied.
template <class E, bool Transposed, int Bm, int Nb>
SK_DEVICE void multiply(Sums<Bm, Nb> &sums, const Shared (&rows)[Bm / 16], Shared offset, Shared weights) {
    uint32_t a[2][4], b[Nb / 8][2];
    WeightStep<E, Transposed, Nb>::load(b, weights);
    ldmatrix_x4(a[0], rows[0] + offset);
    SK_UNROLL
    for (int m = 0; m < Bm / 16; ++m) {
        if (m + 1 < Bm / 16) ldmatrix_x4(a[(m + 1) % 2], rows[m + 1] + offset);
        SK_UNROLL
        for (int j = 0; j < Nb / 8; ++j) mma<E>(sums[m][j], a[m % 2], b[j][0], b[j][1]);
    }
}

// All units of one warp. In the first turns the ring fills, and the cards are blank; wait_for_tile is called once after
// them, by every warp.
template <class E, bool Transposed, int Bm, int Nb, class Wait, class Store>
SK_DEVICE void run(int stages, Feeder<E, Transposed, Nb> &feeder, Shared ring, const Shared (&rows)[Bm / 16],
                   const Wait &wait_for_tile, const Store &store) {
    using Step = WeightStep<E, Transposed, Nb>;
    const Shared weights = keep(ring + static_cast<Shared>(Step::lane_place(lane_id())));
    Sums<Bm, Nb> sums;
    clear<Bm, Nb>(sums);
    int place = stages - 1;
    for (int turn = 1 - stages;; ++turn) {
        const int vacant = place;
        place = place + 1 == stages ? 0 : place + 1;
        const uint32_t card = feeder.card(place);
        if (turn == 0) wait_for_tile();
        if (card & Card::end) return;
        wait_for_oldest(stages);
        // Now the stage at `place` is complete, and all lanes have read the one at `vacant`.
        warp_barrier();
        feeder.push(vacant);
        const Shared at = weights + static_cast<Shared>(place * 2 * Step::bytes);
        if (card & Card::first) multiply<E, Transposed, Bm, Nb>(sums, rows, Card::offset(0, card), at);
        if (card & Card::second) multiply<E, Transposed, Bm, Nb>(sums, rows, Card::offset(1, card), at + Step::bytes);
        if (card & Card::last) {
            store(sums, feeder.unit(place));
            clear<Bm, Nb>(sums);
        }
    }
}

template <class E, bool Transposed, int Bm, int Nb>
SK_KERNEL(stationary_threads(Bm, Nb), 1)
kernel(SK_ARGS(StationaryArgs) args) {
    const Tile<E, Transposed> tile(args);
    if (tile.empty()) return;
    const Shared memory = shared_memory(), pixels = memory + args.pixels, taps = memory + args.taps;
    tile.load(memory + args.tile);  // goes with the first stage's copies: the ring fills before the tile is waited for

    const int warps = thread_count() / 32, warp = warp_id();
    Feeder<E, Transposed, Nb> feeder(args, block_y() * warps + warp, args.splits * warps);
    tile.fill_pixels(pixels, thread_id(), thread_count(), Bm);
    tile.fill_taps(taps, thread_id(), thread_count());
    barrier();

    const Shared ring = memory + static_cast<Shared>(warp * args.stages * (2 * WeightStep<E, Transposed, Nb>::bytes));
    feeder.attach(ring, taps);
    Shared rows[Bm / 16];
    SK_UNROLL
    for (int m = 0; m < Bm / 16; ++m) {
        const int pixel = m * 16 + operand_row(lane_id());
        rows[m] = memory + args.tile + load_shared<uint32_t>(pixels + static_cast<Shared>(pixel * 8)) +
                  static_cast<Shared>(operand_byte(lane_id()));
    }
    const auto wait_for_tile = [&] {
        cp_async_wait<0>();
        barrier();
        if constexpr (E::bytes == 4) {
            tile.round(memory + args.tile);
            barrier();
        }
    };
    const auto store = [&](const Sums<Bm, Nb> &sums, int unit) {
        Result<E, Bm, Nb>(args, pixels, tile.first_pixel(), unit).store(sums);
    };
    run<E, Transposed, Bm, Nb>(args.stages, feeder, ring, rows, wait_for_tile, store);
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
