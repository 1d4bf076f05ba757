// SPDX-License-Identifier: Apache-2.0
#include "stationary.h"

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "stationary_args.h"

namespace sparsekern {
namespace cuda {
namespace {

// Offsets into the tile share a word with flags (stationary_feeder.cuh); above what any GPU has.
constexpr int64_t TILE_LIMIT = 256 * 1024;

[[noreturn]] void refuse(const std::string &expected, const std::string &got) {
    throw std::invalid_argument("stationary: expected " + expected + ", got " + got);
}

template <class Value> void check_one_of(const char *what, Value value, std::initializer_list<Value> allowed) {
    if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return;
    std::string list;
    for (const Value &each : allowed) list += (list.empty() ? "" : ", ") + std::to_string(each);
    refuse(std::string(what) + " to be one of " + list, std::to_string(value));
}

void check_at_least(const char *what, int64_t value, int64_t least) {
    if (value < least) {
        refuse(std::string(what) + " to be at least " + std::to_string(least), std::to_string(value));
    }
}

// Positions of patches of `tile` over `extent` pixels cut into phases; the first phase is the largest.
int64_t tiles_over(int64_t extent, int phases, int tile) {
    return ceil_div(ceil_div(extent, phases), tile);
}

int largest_box(const Axis &axis, bool transposed, int tile) {
    int most = 0;
    for (int phase = 0; phase < axis.phases(transposed); ++phase) {
        most = std::max(most, box_extent(axis, transposed, reach_of(axis, transposed, phase), tile));
    }
    return most;
}

// The product as the kernel sees it, and nothing that needs a pointer.
class Product {
public:
    Product(const Problem &problem, Step step, const ProductPlan &plan)
        : problem_(problem), plan_(plan), transposed_(step == Step::dgrad) {
        if (step == Step::wgrad) refuse("a forward or dgrad step", "wgrad");
        check_problem();
        check_plan();
    }

    bool transposed() const { return transposed_; }
    int feature_edge() const { return transposed_ ? problem_.bi : problem_.bo; }
    int channel_edge() const { return transposed_ ? problem_.bo : problem_.bi; }
    int nb() const { return stationary_nb(feature_edge()); }
    int bytes() const { return element_bytes(problem_.dtype); }

    Axis y() const { return {problem_.r, problem_.stride_h, problem_.dilation_h, problem_.pad_top}; }
    Axis x() const { return {problem_.s, problem_.stride_w, problem_.dilation_w, problem_.pad_left}; }

    // All that does not depend on addresses.
    StationaryArgs args() const {
        const Problem &a = problem_;
        StationaryArgs b{};
        b.n = a.n;
        b.source_h = transposed_ ? a.p : a.h, b.source_w = transposed_ ? a.q : a.w;
        b.result_h = transposed_ ? a.h : a.p, b.result_w = transposed_ ? a.w : a.q;
        b.result_row_bytes = (transposed_ ? a.c : a.o) * bytes();
        b.y = y(), b.x = x();
        b.tile_images = plan_.tile_images, b.tile_h = plan_.tile_h, b.tile_w = plan_.tile_w;
        b.tiles_n = static_cast<int>(ceil_div(a.n, plan_.tile_images));
        b.tiles_y = static_cast<int>(tiles_over(b.result_h, b.y.phases(transposed_), plan_.tile_h));
        b.tiles_x = static_cast<int>(tiles_over(b.result_w, b.x.phases(transposed_), plan_.tile_w));
        b.channels = transposed_ ? a.out_per_group() : a.in_per_group();
        b.features = transposed_ ? a.in_per_group() : a.out_per_group();
        b.blocks = transposed_ ? a.rows() : a.cols();
        b.rows = transposed_ ? a.cols() : a.rows();
        b.slices = feature_edge() / nb();
        b.units = static_cast<int>(ceil_div(b.features, nb()));
        b.block_bytes = a.bo * a.bi * bytes(), b.weight_row_bytes = a.bi * bytes();
        b.channel_bytes = channel_edge() * bytes();
        b.block_stages = b.channel_bytes / (2 * STEP_BYTES);
        b.stages = plan_.stages, b.splits = plan_.splits;
        const Places at = places();
        b.pitch = static_cast<int>(at.pitch);
        b.tile = static_cast<uint32_t>(at.tile);
        b.pixels = static_cast<uint32_t>(at.pixels);
        b.taps = static_cast<uint32_t>(at.taps);
        return b;
    }

    // Of shared memory: the warps' rings, the tile, then the tables.
    struct Places {
        int64_t pitch, tile, pixels, taps, end;
    };
    Places places() const {
        const int64_t blocks = transposed_ ? problem_.rows() : problem_.cols();
        const int64_t pixels = int64_t{plan_.tile_images} * largest_box(y(), transposed_, plan_.tile_h) *
                               largest_box(x(), transposed_, plan_.tile_w);
        Places at{};
        // An odd number of 16 bytes: 8 neighbouring pixels lie in different banks.
        at.pitch = blocks * channel_edge() * bytes() + 16;
        if (pixels * at.pitch > TILE_LIMIT) {
            refuse("a tile of at most " + std::to_string(TILE_LIMIT) + " bytes",
                   std::to_string(pixels) + " pixels of " + std::to_string(at.pitch) + " bytes; use a smaller bm");
        }
        at.tile = int64_t{plan_.warps} * plan_.stages * stationary_stage_bytes(nb());
        at.pixels = at.tile + pixels * at.pitch;
        at.taps = at.pixels + int64_t{plan_.bm} * 8;
        at.end = at.taps + ceil_div(int64_t{4} * problem_.taps(), 16) * 16;
        return at;
    }

    int64_t tiles(const StationaryArgs &b) const {
        return int64_t{b.y.phases(transposed_)} * b.x.phases(transposed_) * b.tiles_n * b.tiles_y * b.tiles_x;
    }

private:
    void check_problem() const {
        const Problem &a = problem_;
        check_one_of("bo", a.bo, {16, 32, 64, 128});
        check_one_of("bi", a.bi, {16, 32, 64, 128});
        check_at_least("groups", a.groups, 1);
        if (a.c % a.groups || a.o % a.groups) {
            refuse("groups to divide c and o",
                   std::to_string(a.groups) + " for " + std::to_string(a.c) + " and " + std::to_string(a.o));
        }
        check_at_least("n", a.n, 0);
        if (a.n > INT_MAX) refuse("n to be at most 2147483647", std::to_string(a.n));
        for (const auto &[name, size] :
             std::initializer_list<std::pair<const char *, int>>{{"c", a.c},
                                                                 {"h", a.h},
                                                                 {"w", a.w},
                                                                 {"o", a.o},
                                                                 {"p", a.p},
                                                                 {"q", a.q},
                                                                 {"r", a.r},
                                                                 {"s", a.s},
                                                                 {"stride_h", a.stride_h},
                                                                 {"stride_w", a.stride_w},
                                                                 {"dilation_h", a.dilation_h},
                                                                 {"dilation_w", a.dilation_w}}) {
            check_at_least(name, size, 1);
        }
        check_at_least("pad_top", a.pad_top, 0);
        check_at_least("pad_left", a.pad_left, 0);
    }

    void check_plan() const {
        const ProductPlan &b = plan_;
        check_one_of("bm", b.bm, {32, 64, 128});
        check_at_least("tile_images", b.tile_images, 1);
        check_at_least("tile_h", b.tile_h, 1);
        check_at_least("tile_w", b.tile_w, 1);
        if (int64_t{b.tile_images} * b.tile_h * b.tile_w != b.bm) {
            refuse("a tile of bm = " + std::to_string(b.bm) + " pixels",
                   std::to_string(b.tile_images) + " x " + std::to_string(b.tile_h) + " x " + std::to_string(b.tile_w));
        }
        if (stationary_threads(b.bm, nb()) == 512) {
            check_one_of("warps", b.warps, {4, 8, 16});
        } else {
            check_one_of("warps at bm 128 and blocks of 32 and more features", b.warps, {4, 8});
        }
        check_one_of("stages", b.stages, {2, 3, 4});
        check_at_least("splits", b.splits, 1);
        const Problem &a = problem_;
        const int64_t h = transposed_ ? a.h : a.p, w = transposed_ ? a.w : a.q;
        if (b.tile_images * h * w > INT_MAX) {
            refuse("a tile of images with at most 2147483647 pixels",
                   std::to_string(b.tile_images * h * w) + "; use fewer images per tile");
        }
    }

    const Problem &problem_;
    const ProductPlan &plan_;
    const bool transposed_;
};

bool aligned(const void *address, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0 && bytes % 16 == 0;
}

}  // namespace

int64_t stationary_shared_bytes(const Problem &problem, Step step, const ProductPlan &plan) {
    return Product(problem, step, plan).places().end;
}

void stationary(const Problem &problem, Step step, const ProductPlan &plan, const void *source, int64_t source_ld,
                const void *values, const int32_t *index, const void *bias, void *result, const Stream &stream) {
    const Product product(problem, step, plan);
    const bool transposed = product.transposed();
    const int64_t source_channels = transposed ? problem.o : problem.c;
    if (source_ld < source_channels) {
        refuse("source_ld to be at least the " + std::to_string(source_channels) + " channels",
               std::to_string(source_ld));
    }
    if (!aligned(values, 0)) refuse("values on 16 bytes", "another address");
    if (bias && transposed) refuse("no bias for dgrad", "one");

    StationaryLaunch launch{};
    StationaryArgs &args = launch.args;
    args = product.args();
    args.source = source, args.source_ld = source_ld;
    args.values = values, args.bias = bias, args.result = result;
    args.aligned_result =
        aligned(result, args.result_row_bytes) && aligned(nullptr, int64_t{args.features} * product.bytes());

    const Index arrays(problem, index);
    args.ptr = transposed ? arrays.t_ptr : arrays.row_ptr;
    args.code = transposed ? arrays.t_row : arrays.col;
    args.slot = transposed ? arrays.t_perm : nullptr;
    // The order runs over all groups, and a block of the grid has one.
    args.order = problem.groups > 1 ? nullptr : transposed ? arrays.t_order : arrays.row_order;

    launch.transposed = transposed;
    launch.bm = plan.bm, launch.nb = product.nb();
    launch.grid_x = product.tiles(args), launch.grid_y = plan.splits, launch.grid_z = problem.groups;
    launch.threads = plan.warps * 32;
    launch.shared_bytes = product.places().end;
    launch.stream = stream;
    switch (problem.dtype) {
    case Dtype::bfloat16:
        return launch_stationary_bf16(launch);
    case Dtype::float16:
        return launch_stationary_fp16(launch);
    case Dtype::tf32:
        return launch_stationary_tf32(launch);
    }
}

}  // namespace cuda
}  // namespace sparsekern
