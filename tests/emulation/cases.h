// SPDX-License-Identifier: Apache-2.0
// Tiny problems that every family of kernels must solve.
#pragma once

#include "support.h"

namespace sktest {

inline std::vector<Case> numbered(std::vector<Case> cases, uint64_t first) {
    for (Case &a : cases) a.seed_ = first++;
    return cases;
}

inline std::vector<Case> linear_cases() {
    std::vector<Case> cases;
    for (const int bo : {16, 32}) {
        for (const int bi : {16, 32}) {
            cases.push_back(linear(40, 3 * bi, 3 * bo, bo, bi));
            cases.push_back(
                linear(33, 2 * bi + 8, 2 * bo + 8, bo, bi).density(0.8).masked().digits());  // ragged, aligned
            cases.push_back(
                linear(17, 2 * bi + 9, 3 * bo + 7, bo, bi).density(0.6).unaligned().masked());  // ragged, not
            cases.push_back(linear(20, 10 * bi, 9 * bo, bo, bi).density(0.2).spare(3));  // more than one panel of rows
            cases.push_back(linear(16, 37 * bi, bo, bo, bi).all());  // more blocks in a row than lanes
            cases.push_back(linear(16, bi, 37 * bo, bo, bi).all().no_bias());
        }
    }
    // Lists that end where 32 lanes end, and more block rows than 4 warps with a lane each.
    for (const int count : {32, 33, 64}) {
        cases.push_back(linear(16, 16 * count, 24).all().full_rows());
        cases.push_back(linear(16, 24, 16 * count).all().full_rows());
    }
    cases.push_back(linear(9, 16, 2240).density(0.7));
    cases.push_back(linear(9, 2240, 16).density(0.7));
    const int wide[][2] = {{64, 64}, {128, 128}, {16, 128}, {128, 16}, {64, 32}, {32, 64}};
    for (const auto &edges : wide) {
        const int bo = edges[0], bi = edges[1];
        cases.push_back(linear(18, bi + bi / 2, bo + 8, bo, bi).density(0.7).full_rows());
        cases.push_back(linear(7, 2 * bi, bo + 3, bo, bi).all().unaligned().masked().digits());
    }
    for (const int m : {0, 1, 15, 17, 130}) cases.push_back(linear(m, 48, 40).digits());
    for (const int features : {1, 15, 17, 33}) {
        cases.push_back(linear(19, features, 48).full_rows());
        cases.push_back(linear(19, 32, features).full_rows().unaligned());
        cases.push_back(linear(35, features, features, 32, 16).all().masked());
    }
    cases.push_back(linear(21, 48, 64).none());
    cases.push_back(linear(21, 48, 64).none().no_bias().spare(2));
    cases.push_back(linear(21, 48, 64).none().spare(0));
    cases.push_back(linear(33, 80, 64).one());
    cases.push_back(linear(33, 80, 64, 32, 32).one().spare(0).no_bias());
    cases.push_back(linear(37, 64, 64).all().spare(0).gapped());
    cases.push_back(linear(37, 41, 55).all().gapped().masked());
    cases.push_back(linear(21, 77, 90, 32, 32).full_rows().gapped());
    cases.push_back(linear(37, 64, 80).poisoned());
    cases.push_back(linear(37, 96, 96, 32, 32).all().poisoned().no_bias());
    cases.push_back(linear(20, 41, 55).full_rows().poisoned().masked());
    return numbered(std::move(cases), 1000);
}

inline std::vector<Case> conv_cases() {
    return numbered(
        {
            conv(1, 32, 7, 7, 32, 3, 3).pad(1),
            conv(2, 48, 5, 9, 40, 3, 3).pad(1).block(16, 32).masked(),
            conv(1, 40, 6, 5, 48, 3, 3).pad(1).block(32, 16).digits().masked(),
            conv(3, 64, 4, 4, 64, 3, 3).pad(1).block(32, 32).density(0.3),
            conv(1, 64, 5, 4, 128, 3, 3).pad(1).block(128, 64).density(0.4).full_rows(),
            conv(1, 128, 3, 5, 64, 1, 3).pad(0, 0, 1, 1).block(64, 128).density(0.6).full_rows().masked(),
            // one pixel, more taps than pixels, padding wider than the filter
            conv(5, 16, 1, 1, 32, 3, 3).pad(1).all(),
            conv(3, 32, 2, 2, 16, 5, 5).pad(2).density(0.7),
            conv(1, 16, 4, 4, 16, 3, 3).pad(3).all().masked(),
            // no padding; one output pixel
            conv(2, 32, 7, 7, 32, 3, 3).density(0.6).no_bias(),
            conv(3, 16, 3, 3, 48, 3, 3).all().spare(0),
            // other kernels; rows of more blocks than lanes
            conv(3, 48, 7, 7, 32, 1, 1).digits(),
            conv(2, 32, 5, 9, 32, 1, 3).pad(0, 0, 1, 1),
            conv(1, 32, 9, 5, 32, 3, 1).pad(1, 1, 0, 0).masked(),
            conv(1, 32, 7, 7, 16, 5, 5).pad(2).all().no_bias(),
            conv(1, 16, 5, 5, 64, 3, 3).pad(1).all().gapped(),
            conv(2, 20, 5, 6, 37, 3, 3).pad(1).full_rows().gapped().masked(),
            conv(1, 160, 3, 4, 144, 1, 1).density(0.25).spare(4),
            // stride and dilation; inputs that no output reads
            conv(2, 32, 7, 7, 32, 3, 3).pad(1).stride(2, 2),
            conv(1, 32, 8, 5, 48, 3, 3).pad(1).stride(2, 1).masked(),
            conv(2, 32, 9, 7, 16, 3, 3).pad(1, 0, 0, 1).stride(1, 2).digits(),
            conv(2, 48, 7, 7, 32, 1, 1).stride(2, 2),
            conv(1, 16, 7, 10, 32, 2, 2).stride(3, 3).all(),
            conv(1, 32, 8, 9, 32, 3, 3).pad(2).dilation(2, 2),
            conv(2, 16, 7, 9, 32, 3, 3).pad(0, 3, 2, 1).stride(2, 1).dilation(1, 2).masked(),
            conv(1, 16, 9, 11, 16, 5, 2).pad(0, 3, 1, 0).stride(3, 1).dilation(1, 2).all(),
            conv(1, 32, 6, 8, 32, 3, 3).pad(2).stride(2, 2).dilation(2, 2).density(0.7),
            // groups, ragged channels, views
            conv(2, 64, 5, 5, 64, 3, 3).pad(1).groups(2).masked(),
            conv(1, 60, 5, 9, 66, 3, 3).pad(1).groups(3).density(0.7).digits(),
            conv(2, 34, 7, 7, 46, 3, 3).pad(1).groups(2).stride(2, 2).unaligned().masked(),
            conv(3, 80, 4, 5, 48, 1, 1).groups(2).block(16, 32).gapped(),
            conv(1, 51, 7, 7, 45, 3, 3).pad(1).groups(3).block(32, 16).stride(2, 1).full_rows(),
            conv(1, 20, 6, 7, 23, 3, 3).pad(1).full_rows().unaligned().digits().masked(),
            conv(5, 33, 5, 5, 17, 3, 3).pad(1).block(16, 16).full_rows().masked(),
            conv(1, 3, 9, 9, 32, 3, 3).pad(1).stride(2, 2).full_rows(),
            conv(1, 8, 5, 5, 1, 1, 3).pad(0, 0, 2, 0).all().no_bias(),
            // no image, no block, one block, a NaN
            conv(0, 32, 5, 5, 32, 3, 3).pad(1).masked(),
            conv(2, 32, 5, 5, 48, 3, 3).pad(1).none(),
            conv(1, 32, 5, 5, 48, 3, 3).pad(1).stride(2, 2).none().no_bias().spare(0).masked(),
            conv(1, 48, 7, 5, 48, 3, 3).pad(1).one().masked(),
            conv(2, 48, 5, 5, 48, 3, 3).pad(1).stride(2, 2).groups(3).one().spare(0),
            conv(2, 48, 6, 5, 48, 3, 3).pad(1).poisoned(),
            conv(3, 32, 5, 5, 32, 3, 3).pad(1).stride(2, 2).block(32, 32).poisoned(),
        },
        2000);
}

// The few to begin with.
inline std::vector<Case> first_cases() {
    return numbered({linear(40, 48, 48).masked(), linear(17, 41, 55, 32, 16).density(0.6).unaligned().masked(),
                     conv(2, 48, 5, 9, 40, 3, 3).pad(1).masked(),
                     conv(2, 34, 7, 7, 46, 3, 3).pad(1).groups(2).stride(2, 2).masked()},
                    3000);
}

}  // namespace sktest
