// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels are asked to do and how it is cut. Host code without CUDA headers: pointers are device
// addresses and never read here.
#pragma once

#include <cstdint>

namespace sparsekern {
namespace cuda {

enum class Dtype { bfloat16, float16, tf32 };
enum class Step { forward, dgrad, wgrad };

constexpr int element_bytes(Dtype dtype) {
    return dtype == Dtype::tf32 ? 4 : 2;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// A layer at one input size. A linear layer over M tokens is a convolution of M images of one pixel: n = M, c = I,
// o = O, and h, w, p, q, r, s, strides, dilations and groups 1, padding 0. Images are channels_last.
struct Problem {
    Dtype dtype;
    int groups;
    int bo, bi;        // block edges: 16, 32, 64 or 128
    int64_t capacity;  // block slots
    int64_t n;         // images, or tokens
    int c, h, w;       // x [N, C, H, W]; c of all groups
    int o, p, q;       // y [N, O, P, Q]; o of all groups
    int r, s;
    int stride_h, stride_w;
    int pad_top, pad_left;  // bottom and right follow from p and q: a tap outside the image reads zero
    int dilation_h, dilation_w;

    int taps() const { return r * s; }
    int out_per_group() const { return o / groups; }
    int in_per_group() const { return c / groups; }
    int rows() const { return static_cast<int>(ceil_div(out_per_group(), bo)); }  // block rows of one group
    int cols() const { return static_cast<int>(ceil_div(in_per_group(), bi)); }   // block columns of one group and tap
};

// Features of one union panel, and the block edges whose layouts keep unions (sparsekern/layout.py).
constexpr int UNION_WIDTH = 128;
constexpr int union_rows(int edge) {
    return edge == 16 || edge == 32 ? UNION_WIDTH / edge : 0;
}

// Device addresses of the arrays in the packed buffer of sparsekern/layout.py, in buffer order.
struct Index {
    const int32_t *row_ptr, *col, *row, *t_ptr, *t_row, *t_perm, *row_order, *t_order;
    const int32_t *union_ptr, *union_list, *t_union_ptr, *t_union_list;  // null where the edge keeps none

    Index(const Problem &a, const int32_t *packed) {
        const int64_t rows = int64_t{a.groups} * a.rows(), t_rows = int64_t{a.groups} * a.cols();
        row_ptr = packed;
        col = row_ptr + rows + 1;
        row = col + a.capacity;
        t_ptr = row + a.capacity;
        t_row = t_ptr + t_rows + 1;
        t_perm = t_row + a.capacity;
        row_order = t_perm + a.capacity;
        t_order = row_order + rows;
        const int32_t *next = t_order + t_rows;
        union_ptr = union_list = t_union_ptr = t_union_list = nullptr;
        if (const int panel = union_rows(a.bo)) {
            union_ptr = next;
            union_list = union_ptr + a.groups * ceil_div(a.rows(), panel) + 1;
            next = union_list + a.capacity;
        }
        if (const int panel = union_rows(a.bi)) {
            t_union_ptr = next;
            t_union_list = t_union_ptr + a.groups * ceil_div(a.cols(), panel) + 1;
        }
    }
};

// Where work is queued.
struct Stream {
    int device;
    void *handle;  // cudaStream_t
};

// How forward or dgrad is cut; the kernels' headers say what each allows. A tile is tile_images x tile_h x tile_w
// output pixels (tokens: bm x 1 x 1), bm = their product.
struct ProductPlan {
    int bm;
    int tile_images, tile_h, tile_w;
    int warps;
    int stages;  // of the ring that weights (and, streamed, activations) come through
    int splits;  // stationary: blocks (CTAs) that share the block rows of one tile
};

// How wgrad is cut: a CTA owns the stored blocks of `rows` block rows x `cols` block columns (all taps) and one of
// `splits` parts of the pixel tiles.
struct WgradPlan {
    int rows, cols;
    int tile_images, tile_h, tile_w;
    int warps;
    int stages;
    int splits;
};

}  // namespace cuda
}  // namespace sparsekern
