// What the kernels' plans have to know of a GPU. The struct is plain host code, so that plans can be tested without
// one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gather_scatter_plan.h"

namespace vq {

inline constexpr int32_t kSharedWithoutOptIn = 48 << 10;  // bytes, on every GPU

// Limits of the current device. Kept per thread: no lock, and no launch after the first asks the driver.
inline cudaError_t CurrentGpu(GpuLimits* limits) {
    thread_local int known_device = -1;
    thread_local GpuLimits known{};
    int device = 0;
    if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
    if (device != known_device) {
        GpuLimits found{};
        const struct {
            int32_t* value;
            cudaDeviceAttr attribute;
        } wanted[] = {{&found.multiprocessors, cudaDevAttrMultiProcessorCount},
                      {&found.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                      {&found.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
        for (const auto& one : wanted) {
            const cudaError_t status = cudaDeviceGetAttribute(one.value, one.attribute, device);
            if (status != cudaSuccess) return status;
        }
        known = found;
        known_device = device;
    }
    *limits = known;
    return cudaSuccess;
}

// Launches a kernel that takes one struct. Opts in to more shared memory where it needs that: always the same value, so
// that threads launching at once cannot take room away from each other.
template <typename Args>
cudaError_t LaunchKernel(void (*kernel)(Args), dim3 grid, int32_t threads, int64_t shared_bytes, const GpuLimits& gpu,
                         cudaStream_t stream, const Args& args) {
    if (shared_bytes > kSharedWithoutOptIn) {
        const cudaError_t status = cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, gpu.shared_per_block);
        if (status != cudaSuccess) return status;
    }
    Args copy = args;
    void* pointers[] = {&copy};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(threads)), pointers,
                            static_cast<size_t>(shared_bytes), stream);
}

}  // namespace vq
