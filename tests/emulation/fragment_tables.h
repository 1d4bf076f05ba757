// SPDX-License-Identifier: Apache-2.0
// Which element of a matrix each half of each register of each lane holds, written down from the formulas of the PTX
// manual (warp-level matrix instructions: fragments of mma.m16n8k16 with .f16/.bf16 and of mma.m16n8k8 with .tf32;
// ldmatrix), apart from the emulation, which is checked against them.
#pragma once

#include <vector>

namespace sktest {

struct Held {
    int lane, element;  // the manual's a_i, b_i, c_i: element i of the fragment
    int row, column;
};
struct FragmentTable {
    int rows, columns;
    int halves;  // elements per register: 2 of 16 bits, or 1 of 32
    std::vector<Held> held;

    static int register_of(const Held &h, int halves) { return h.element / halves; }
    static int half_of(const Held &h, int halves) { return h.element % halves; }
};

// row(group, member, i), column(group, member, i) for the `elements` of each lane.
template <class Row, class Column>
FragmentTable fragment_table(int rows, int columns, int halves, int elements, Row row, Column column) {
    FragmentTable table{rows, columns, halves, {}};
    for (int lane = 0; lane < 32; ++lane) {
        const int group_id = lane >> 2, thread_in_group = lane % 4;
        for (int i = 0; i < elements; ++i) {
            table.held.push_back({lane, i, row(group_id, thread_in_group, i), column(group_id, thread_in_group, i)});
        }
    }
    return table;
}

// mma.m16n8k16, .f16 and .bf16: A 16 x 16, B 16 x 8, C 16 x 8 in fp32.
inline FragmentTable m16n8k16_a() {
    return fragment_table(
        16, 16, 2, 8, [](int group, int, int i) { return (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8; },
        [](int, int thread, int i) { return i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8; });
}
inline FragmentTable m16n8k16_b() {
    return fragment_table(
        16, 8, 2, 4, [](int, int thread, int i) { return i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8; },
        [](int group, int, int) { return group; });
}
inline FragmentTable m16n8_c() {
    return fragment_table(
        16, 8, 1, 4, [](int group, int, int i) { return i < 2 ? group : group + 8; },
        [](int, int thread, int i) { return thread * 2 + (i & 1); });
}

// mma.m16n8k8, .tf32: A 16 x 8, B 8 x 8, C as above.
inline FragmentTable m16n8k8_a() {
    return fragment_table(
        16, 8, 1, 4, [](int group, int, int i) { return i == 0 || i == 2 ? group : group + 8; },
        [](int, int thread, int i) { return i == 0 || i == 1 ? thread : thread + 4; });
}
inline FragmentTable m16n8k8_b() {
    return fragment_table(
        8, 8, 1, 2, [](int, int thread, int i) { return i == 0 ? thread : thread + 4; },
        [](int group, int, int) { return group; });
}

// ldmatrix.m8n8.x4.b16: register m holds matrix m, of which lanes 8 m to 8 m + 7 name the rows 0 to 7; rows of the
// table are 8 m + row. Each group of four lanes receives a row, or with .trans a column.
inline FragmentTable ldmatrix_x4_table() {
    return fragment_table(
        32, 8, 2, 8, [](int group, int, int i) { return i / 2 * 8 + group; },
        [](int, int thread, int i) { return thread * 2 + i % 2; });
}
inline FragmentTable ldmatrix_x4_trans_table() {
    return fragment_table(
        32, 8, 2, 8, [](int, int thread, int i) { return i / 2 * 8 + thread * 2 + i % 2; },
        [](int group, int, int) { return group; });
}

// Places read off the manual's figures: lane, register, half, row, column.
struct Figure {
    int lane, reg, half, row, column;
};
inline const std::vector<Figure> &figure_m16n8k16_a() {
    static const std::vector<Figure> places = {
        {0, 0, 0, 0, 0}, {0, 0, 1, 0, 1},  {0, 1, 0, 8, 0},   {0, 2, 0, 0, 8},   {0, 3, 1, 8, 9},   {3, 0, 1, 0, 7},
        {4, 0, 0, 1, 0}, {31, 0, 0, 7, 6}, {31, 1, 1, 15, 7}, {31, 2, 1, 7, 15}, {31, 3, 1, 15, 15}};
    return places;
}
inline const std::vector<Figure> &figure_m16n8k16_b() {
    static const std::vector<Figure> places = {{0, 0, 0, 0, 0}, {0, 0, 1, 1, 0},  {0, 1, 0, 8, 0},  {3, 0, 0, 6, 0},
                                               {4, 0, 0, 0, 1}, {31, 0, 1, 7, 7}, {31, 1, 1, 15, 7}};
    return places;
}
inline const std::vector<Figure> &figure_m16n8_c() {
    static const std::vector<Figure> places = {{0, 0, 0, 0, 0}, {0, 1, 0, 0, 1}, {0, 2, 0, 8, 0},
                                               {3, 1, 0, 0, 7}, {4, 0, 0, 1, 0}, {31, 3, 0, 15, 7}};
    return places;
}
inline const std::vector<Figure> &figure_m16n8k8_a() {
    static const std::vector<Figure> places = {{0, 0, 0, 0, 0}, {0, 1, 0, 8, 0}, {0, 2, 0, 0, 4},  {0, 3, 0, 8, 4},
                                               {3, 0, 0, 0, 3}, {4, 0, 0, 1, 0}, {31, 3, 0, 15, 7}};
    return places;
}
inline const std::vector<Figure> &figure_m16n8k8_b() {
    static const std::vector<Figure> places = {
        {0, 0, 0, 0, 0}, {0, 1, 0, 4, 0}, {3, 0, 0, 3, 0}, {4, 0, 0, 0, 1}, {31, 1, 0, 7, 7}};
    return places;
}

}  // namespace sktest
