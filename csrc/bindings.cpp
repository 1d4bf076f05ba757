// SPDX-License-Identifier: Apache-2.0
// Python module sparsekern._C. Tensors come as addresses; sparsekern/backends/cpu.py has checked shape, stride, dtype.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/dispatch.h"
#ifdef SK_WITH_CUDA
#include "cuda/bindings_cuda.h"
#endif

namespace py = pybind11;
using namespace sparsekern;

namespace {

using Address = uintptr_t;

template <class T> T *at(Address address) {
    return reinterpret_cast<T *>(address);
}

LinearArgs linear_args(Address index, int64_t capacity, int64_t bo, int64_t bi, int64_t m, int64_t out_features,
                       int64_t in_features, int threads) {
    const int64_t rows = (out_features + bo - 1) / bo, cols = (in_features + bi - 1) / bi;
    return {Layout(at<const int32_t>(index), 1, rows, 1, cols, capacity, bo, bi), m, out_features, in_features,
            threads};
}

Conv2dArgs conv2d_args(Address index, int64_t capacity, int64_t bo, int64_t bi, int64_t groups, int64_t n, int64_t c,
                       int64_t h, int64_t w, int64_t o, int64_t p, int64_t q, int64_t r, int64_t s, int64_t stride_h,
                       int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t dilation_h, int64_t dilation_w,
                       bool channels_last, int threads) {
    const int64_t rows = (o / groups + bo - 1) / bo, cols = (c / groups + bi - 1) / bi;
    return {Layout(at<const int32_t>(index), groups, rows, r * s, cols, capacity, bo, bi),
            n,
            c,
            h,
            w,
            o,
            p,
            q,
            r,
            s,
            stride_h,
            stride_w,
            pad_top,
            pad_left,
            dilation_h,
            dilation_w,
            channels_last,
            threads};
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = SK_COMPILER;
    info["isa"] = kernels().name;
#ifdef _OPENMP
    info["openmp"] = _OPENMP;
#else
    info["openmp"] = 0;
#endif
    info["cuda_archs"] = SK_CUDA_ARCHS;
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::class_<LinearArgs>(module, "LinearArgs").def(py::init(&linear_args));
    py::class_<Conv2dArgs>(module, "Conv2dArgs").def(py::init(&conv2d_args));
    module.def("build_info", &build_info);
#ifdef SK_WITH_CUDA
    cuda::define(module.def_submodule("cuda"));
#endif

    module.def(
        "linear_forward",
        [](const LinearArgs &a, Address x, int64_t ldx, Address values, Address bias, Address y, int64_t ldy) {
            kernels().linear_forward(a, at<float>(x), ldx, at<float>(values), at<float>(bias), at<float>(y), ldy);
        },
        release());
    module.def(
        "linear_dgrad",
        [](const LinearArgs &a, Address dy, int64_t lddy, Address values, Address dx, int64_t lddx) {
            kernels().linear_dgrad(a, at<float>(dy), lddy, at<float>(values), at<float>(dx), lddx);
        },
        release());
    module.def(
        "linear_wgrad",
        [](const LinearArgs &a, Address dy, int64_t lddy, Address x, int64_t ldx, Address element_mask, Address dvalues,
           Address dbias) {
            kernels().linear_wgrad(a, at<float>(dy), lddy, at<float>(x), ldx, at<uint8_t>(element_mask),
                                   at<float>(dvalues), at<float>(dbias));
        },
        release());
    module.def(
        "conv2d_forward",
        [](const Conv2dArgs &a, Address x, Address values, Address bias, Address y) {
            kernels().conv2d_forward(a, at<float>(x), at<float>(values), at<float>(bias), at<float>(y));
        },
        release());
    module.def(
        "conv2d_dgrad",
        [](const Conv2dArgs &a, Address dy, Address values, Address dx) {
            kernels().conv2d_dgrad(a, at<float>(dy), at<float>(values), at<float>(dx));
        },
        release());
    module.def(
        "conv2d_wgrad",
        [](const Conv2dArgs &a, Address dy, Address x, Address element_mask, Address dvalues, Address dbias) {
            kernels().conv2d_wgrad(a, at<float>(dy), at<float>(x), at<uint8_t>(element_mask), at<float>(dvalues),
                                   at<float>(dbias));
        },
        release());
}
