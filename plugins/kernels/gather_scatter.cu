// Launches the VQGatherScatter kernel.
#include <cuda_runtime.h>

#include "gather_scatter.cuh"
#include "gpu.h"
#include "vq/launch.h"

namespace vq {

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
