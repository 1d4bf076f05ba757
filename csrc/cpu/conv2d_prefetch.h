// SPDX-License-Identifier: Apache-2.0
// At 90 % sparsity the kernels finish an image in about the time that memory needs to deliver the next one, so the next
// input is prefetched in small steps between register tiles; without it a third of the time went into waiting copies
// and stores (128 channels, 16 x 16, Zen 4).
#pragma once

#include "conv2d_geometry.h"

namespace sparsekern {
namespace SK_ISA {

class Prefetch {
public:
    // The part of an image tensor that a tile covers: rows y0 .. y1 of `channels` channels of `images` images.
    template <class T>
    void start(const Image<T> &image, int64_t n, int64_t images, int64_t first, int64_t channels, int64_t y0,
               int64_t y1, int64_t steps) {
        y0 = max64(0, y0);
        y1 = min64(image.h, y1);
        left_ = 0;
        if (images <= 0 || channels <= 0 || y1 <= y0 || image.w == 0) return;
        // Whole images side by side are one segment. Of several images only the first is worth more bookkeeping.
        const int64_t row = image.w * (image.channels_last ? image.c : 1);
        at_ = reinterpret_cast<const char *>(image.at(n, image.channels_last ? 0 : first, y0, 0));
        segment_ = (y1 - y0) * row * int64_t(sizeof(float));
        stride_ = image.h * image.w * int64_t(sizeof(float));
        segments_ = image.channels_last ? 1 : channels;
        if (!image.channels_last && segment_ == stride_) segment_ *= segments_, segments_ = 1;
        if (segments_ == 1 && channels == image.c && y1 - y0 == image.h) segment_ *= images;
        position_ = 0;
        left_ = segments_ * ceil_div(segment_, 64);
        per_step_ = ceil_div(left_, max64(1, steps));
    }
    template <int WRITE> void step() {
        for (int64_t i = min64(per_step_, left_); i > 0; --i) {
            if (WRITE)
                __builtin_prefetch(at_ + position_, 1, 3);
            else
                __builtin_prefetch(at_ + position_, 0, 2);
            position_ += 64;
            if (position_ >= segment_) at_ += stride_, position_ = 0;
        }
        left_ -= min64(per_step_, left_);
    }

private:
    const char *at_ = nullptr;
    int64_t segment_ = 0, stride_ = 0, segments_ = 0, position_ = 0, left_ = 0, per_step_ = 0;
};

}  // namespace SK_ISA
}  // namespace sparsekern
