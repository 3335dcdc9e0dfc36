// Launches the VQGatherScatter kernel.
#include <cuda_runtime.h>

#include "gather_scatter.cuh"
#include "vq/launch.h"

namespace vq {
namespace {

constexpr int kSharedWithoutOptIn = 48 << 10;  // bytes, on every GPU

// Limits of the current device. Kept per thread: no lock, and no launch after the first asks the driver.
cudaError_t CurrentGpu(GpuLimits* limits) {
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

}  // namespace

cudaError_t LaunchVQGatherScatter(const GatherScatterArgs& args, cudaStream_t stream) {
    if (args.code_bits != 8 && args.code_bits != 16) return cudaErrorInvalidValue;
    if (args.shape.rows == 0) return cudaSuccess;
    GpuLimits gpu{};
    if (const cudaError_t status = CurrentGpu(&gpu); status != cudaSuccess) return status;

    const bool aligned = reinterpret_cast<uintptr_t>(args.logits) % plan::kStoreBytes == 0;
    const GatherScatterPlan plan = PlanGatherScatter(args.shape, args.type, aligned, gpu);
    const GatherScatterKernelPointer kernel = GatherScatterKernel(args.type, args.code_bits, plan);
    if (kernel == nullptr) return cudaErrorInvalidValue;

    if (plan.shared_bytes > kSharedWithoutOptIn) {
        // Always the same value, so that threads launching at once cannot take room away from each other.
        const cudaError_t status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, gpu.shared_per_block);
        if (status != cudaSuccess) return status;
    }
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(plan.parts), static_cast<unsigned>(plan.grid_groups));
    launch.blockDim = dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.split));
    launch.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    launch.stream = stream;
    const int64_t stride = WordsPerCodebook(args.shape.vocab_size, args.code_bits) * 32 / args.code_bits;
    return cudaLaunchKernelEx(
        &launch, kernel,
        GatherScatterKernelArgs{args.code_logits, args.codes, args.bias, args.logits, args.shape, stride, plan});
}

}  // namespace vq
