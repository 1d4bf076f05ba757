// SPDX-License-Identifier: Apache-2.0
// Queues a kernel on the caller's device and stream; every CUDA call is checked.
#pragma once

#include <stdexcept>
#include <string>

#include "primitives.cuh"
#include "problem.h"

namespace sparsekern {
namespace cuda {

struct Grid {
    int64_t x, y, z;
};

// Limits of a launch that hold on every GPU the kernels support.
inline void check_grid(const char *name, const Grid &grid) {
    if (grid.x > 2147483647 || grid.y > 65535 || grid.z > 65535) {
        throw std::invalid_argument(std::string(name) + ": expected a grid within 2147483647 x 65535 x 65535, got " +
                                    std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                                    std::to_string(grid.z) + "; use a larger tile or fewer splits");
    }
}

#ifndef SK_EMULATE

inline void check_call(cudaError_t status, const char *name, const char *what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(name) + ": " + what + " failed: " + cudaGetErrorString(status) +
                                 " (CUDA error " + std::to_string(static_cast<int>(status)) + ")");
    }
}

// Makes `device` current and the caller's device current again.
class DeviceGuard {
public:
    DeviceGuard(int device, const char *name) : name_(name) {
        check_call(cudaGetDevice(&before_), name, "cudaGetDevice");
        if (before_ != device) check_call(cudaSetDevice(device), name, "cudaSetDevice");
        changed_ = before_ != device;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;

private:
    const char *name_;
    int before_ = 0;
    bool changed_ = false;
};

template <class Args>
void launch(const char *name, void (*kernel)(Args), const Grid &grid, int threads, int64_t shared_bytes,
            const Stream &stream, const Args &args) {
    if (grid.x * grid.y * grid.z == 0) return;
    check_grid(name, grid);
    DeviceGuard guard(stream.device, name);
    // Above 48 KB a kernel has to ask; the call is a table look-up and cheap beside the launch.
    if (shared_bytes > 48 * 1024) {
        const cudaError_t status =
            cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
        if (status == cudaErrorInvalidValue) {
            cudaGetLastError();
            int limit = 0;
            cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device);
            throw std::invalid_argument(std::string(name) + ": expected at most " + std::to_string(limit) +
                                        " bytes of shared memory on this GPU, got " + std::to_string(shared_bytes) +
                                        "; use a smaller tile or fewer stages");
        }
        check_call(status, name, "cudaFuncSetAttribute");
    }
    void *pointers[] = {const_cast<void *>(static_cast<const void *>(&args))};
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    check_call(cudaLaunchKernel(reinterpret_cast<const void *>(kernel), blocks, dim3(static_cast<unsigned>(threads)),
                                pointers, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream.handle)),
               name, "cudaLaunchKernel");
}

#else

template <class Args>
void launch(const char *name, void (*kernel)(Args), const Grid &grid, int threads, int64_t shared_bytes, const Stream &,
            const Args &args) {
    static_assert(sizeof(Args) <= 4096, "a kernel's arguments are at most 4096 bytes");
    if (grid.x * grid.y * grid.z == 0) return;
    check_grid(name, grid);
    const auto call = [&] { kernel(args); };
    sktest::emulation::machine.launch(
        name, grid.x, grid.y, grid.z, threads, shared_bytes,
        [](const void *bound) { (*static_cast<const decltype(call) *>(bound))(); }, &call);
}

#endif

}  // namespace cuda
}  // namespace sparsekern
