// SPDX-License-Identifier: Apache-2.0
// Python module sparsekern._C.cuda. Tensors come as addresses; sparsekern/backends/cuda/launch.py has checked shape,
// stride, dtype and device. Everything but addresses is put into objects once, so that a call takes a few of them.
#include "bindings_cuda.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "stationary.h"
#include "streamed.h"
#include "wgrad.h"

namespace py = pybind11;

namespace sparsekern {
namespace cuda {
namespace {

using Address = uintptr_t;

template <class T = void> T *at(Address address) {
    return reinterpret_cast<T *>(address);
}

Dtype dtype_of(const std::string &name) {
    if (name == "bfloat16") return Dtype::bfloat16;
    if (name == "float16") return Dtype::float16;
    if (name == "tf32") return Dtype::tf32;
    throw std::invalid_argument("dtype: expected bfloat16, float16 or tf32, got " + name);
}

Problem problem_of(const std::string &dtype, int groups, int bo, int bi, int64_t capacity, int64_t n, int c, int h,
                   int w, int o, int p, int q, int r, int s, int stride_h, int stride_w, int pad_top, int pad_left,
                   int dilation_h, int dilation_w) {
    return {dtype_of(dtype), groups,   bo,      bi,       capacity,   n,         c, h, w, o, p, q, r, s,
            stride_h,        stride_w, pad_top, pad_left, dilation_h, dilation_w};
}

using ProductKernel = void (*)(const Problem &, Step, const ProductPlan &, const void *, int64_t, const void *,
                               const int32_t *, const void *, void *, const Stream &);

// A kernel of forward and dgrad as a function of addresses.
template <ProductKernel kernel> void def_product(py::module_ &module, const char *name) {
    module.def(
        name,
        [](const Problem &problem, Step step, const ProductPlan &plan, Address source, int64_t source_ld,
           Address values, Address index, Address bias, Address result, int device, Address stream) {
            kernel(problem, step, plan, at(source), source_ld, at(values), at<const int32_t>(index), at(bias),
                   at(result), {device, at(stream)});
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void define(py::module_ module) {
    py::enum_<Step>(module, "Step")
        .value("forward", Step::forward)
        .value("dgrad", Step::dgrad)
        .value("wgrad", Step::wgrad);
    py::class_<Problem>(module, "Problem").def(py::init(&problem_of));
    py::class_<ProductPlan>(module, "ProductPlan")
        .def(py::init([](int bm, int tile_images, int tile_h, int tile_w, int warps, int stages, int splits) {
            return ProductPlan{bm, tile_images, tile_h, tile_w, warps, stages, splits};
        }));
    py::class_<WgradPlan>(module, "WgradPlan")
        .def(py::init(
            [](int rows, int cols, int tile_images, int tile_h, int tile_w, int warps, int stages, int splits) {
                return WgradPlan{rows, cols, tile_images, tile_h, tile_w, warps, stages, splits};
            }));

    module.def("stationary_shared_bytes", &stationary_shared_bytes);
    module.def("streamed_shared_bytes", &streamed_shared_bytes);
    module.def("wgrad_shared_bytes", &wgrad_shared_bytes);
    module.def("wgrad_workspace_bytes", &wgrad_workspace_bytes);
    def_product<&stationary>(module, "stationary");
    def_product<&streamed>(module, "streamed");
    module.def(
        "wgrad",
        [](const Problem &problem, const WgradPlan &plan, Address dy, int64_t dy_ld, Address x, int64_t x_ld,
           Address index, Address element_mask, Address workspace, Address dvalues, Address dbias, int device,
           Address stream) {
            wgrad(problem, plan, at(dy), dy_ld, at(x), x_ld, at<const int32_t>(index), at<const uint8_t>(element_mask),
                  at(workspace), at(dvalues), at(dbias), {device, at(stream)});
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace cuda
}  // namespace sparsekern
