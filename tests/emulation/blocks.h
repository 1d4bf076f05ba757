// SPDX-License-Identifier: Apache-2.0
// Random sets of stored blocks and their packed index.
#pragma once

#include <numeric>
#include <vector>

#include "arrays.h"

namespace sktest {

using sparsekern::cuda::Problem;

inline bool is_linear(const Problem &a) {
    return a.h * a.w * a.taps() == 1;
}

enum class Stored { some, none, one, all };

// A block grid [G, Ob, T, Ib] and the packed int32 buffer of its stored blocks (format: sparsekern/layout.py,
// IndexView).
struct Blocks {
    int64_t groups, rows, taps, cols, nnz = 0, capacity = 0;
    int bo, bi;
    std::vector<int64_t> slots;  // [G * Ob * T * Ib], -1 where no block is stored

    // `empty` bars every third block row and the last block column of each group, where there is more than one.
    Blocks(const Problem &a, Stored stored, double density, bool empty, int64_t spare, Random &random)
        : groups(a.groups), rows(a.rows()), taps(a.taps()), cols(a.cols()), bo(a.bo), bi(a.bi),
          slots(static_cast<size_t>(groups * rows * taps * cols), -1) {
        const int64_t count = static_cast<int64_t>(slots.size()), only = random.below(count);
        for (int64_t k = 0; k < count; ++k) {
            const int64_t row = k / (taps * cols) % rows, col = k % cols;
            const bool barred = empty && (row % 3 == 1 || (cols > 1 && col == cols - 1));
            const bool chosen = random.flip(density) && !barred;
            if (stored == Stored::all || (stored == Stored::one && k == only) || (stored == Stored::some && chosen)) {
                slots[static_cast<size_t>(k)] = nnz++;
            }
        }
        capacity = nnz + spare;
    }

    int64_t slot(int64_t group, int64_t row, int64_t tap, int64_t col) const {
        return slots[static_cast<size_t>(((group * rows + row) * taps + tap) * cols + col)];
    }

    // The packed buffer; exactly as long as sparsekern.layout makes it.
    Array index() const {
        std::vector<int32_t> packed;
        const auto append = [&](const std::vector<int32_t> &part, int64_t size) {
            packed.insert(packed.end(), part.begin(), part.end());
            packed.resize(packed.size() - part.size() + static_cast<size_t>(size), 0);
        };
        std::vector<int32_t> ptr{0}, col, row, t_ptr{0}, t_row, t_perm;
        for (int64_t i = 0; i < groups * rows; ++i) {
            for (int64_t k = 0; k < taps * cols; ++k) {
                if (slot(i / rows, i % rows, k / cols, k % cols) < 0) continue;
                col.push_back(static_cast<int32_t>(k));
                row.push_back(static_cast<int32_t>(i));
            }
            ptr.push_back(static_cast<int32_t>(col.size()));
        }
        for (int64_t j = 0; j < groups * cols; ++j) {
            for (int64_t k = 0; k < taps * rows; ++k) {
                const int64_t found = slot(j / cols, k % rows, k / rows, j % cols);
                if (found < 0) continue;
                t_row.push_back(static_cast<int32_t>(k));
                t_perm.push_back(static_cast<int32_t>(found));
            }
            t_ptr.push_back(static_cast<int32_t>(t_row.size()));
        }
        append(ptr, groups * rows + 1), append(col, capacity), append(row, capacity);
        append(t_ptr, groups * cols + 1), append(t_row, capacity), append(t_perm, capacity);
        append(longest_first(ptr), groups * rows), append(longest_first(t_ptr), groups * cols);
        append_unions(bo, rows, taps * cols, append,
                      [&](int64_t group, int64_t i, int64_t k) { return slot(group, i, k / cols, k % cols) >= 0; });
        append_unions(bi, cols, taps * rows, append,
                      [&](int64_t group, int64_t j, int64_t k) { return slot(group, k % rows, k / rows, j) >= 0; });
        Array buffer(static_cast<int64_t>(packed.size()), 4);
        std::copy(packed.begin(), packed.end(), buffer.as<int32_t>());
        return buffer;
    }

private:
    static std::vector<int32_t> longest_first(const std::vector<int32_t> &ptr) {
        std::vector<int32_t> order(ptr.size() - 1);
        std::iota(order.begin(), order.end(), 0);
        const auto length = [&](int32_t i) { return ptr[static_cast<size_t>(i) + 1] - ptr[static_cast<size_t>(i)]; };
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return length(a) > length(b); });
        return order;
    }

    // `has(group, row, column)` over `lines` rows of a group, in panels of neighbours.
    template <class Append, class Has>
    void append_unions(int edge, int64_t lines, int64_t columns, Append append, Has has) const {
        const int panel = sparsekern::cuda::union_rows(edge);
        if (panel == 0) return;
        std::vector<int32_t> ptr{0}, entries;
        for (int64_t group = 0; group < groups; ++group) {
            for (int64_t first = 0; first < lines; first += panel) {
                for (int64_t k = 0; k < columns; ++k) {
                    int32_t bits = 0;
                    for (int64_t i = first; i < std::min(first + panel, lines); ++i) {
                        if (has(group, i, k)) bits |= 1 << (i - first);
                    }
                    if (bits) entries.push_back(static_cast<int32_t>(k) << panel | bits);
                }
                ptr.push_back(static_cast<int32_t>(entries.size()));
            }
        }
        append(ptr, static_cast<int64_t>(ptr.size())), append(entries, capacity);
    }
};

}  // namespace sktest
