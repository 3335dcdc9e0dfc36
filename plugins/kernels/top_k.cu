// Launches the VQTopK kernels.
#include <cuda_runtime.h>

#include "gpu.h"
#include "top_k.cuh"
#include "vq/contract.h"
#include "vq/launch.h"

namespace vq {

int64_t TopKWorkspaceBytes(const GatherScatterShape& shape, int64_t k) {
    return plan::MostParts(shape.rows) * (k * int64_t{sizeof(unsigned long long)} + int64_t{sizeof(float2)});
}

cudaError_t LaunchVQTopK(const TopKArgs& args, cudaStream_t stream) {
    const TopKKernels kernels = TopKKernelsOf(args.type, args.code_bits);
    const GatherScatterShape& shape = args.shape;
    if (kernels.stream == nullptr) return cudaErrorInvalidValue;
    if (args.k < 1 || args.k > contract::kMaxBest || args.k > shape.vocab_size) return cudaErrorInvalidValue;
    if (args.buckets.codes > 0 && shape.num_codebooks != 1) return cudaErrorInvalidValue;
    if (shape.rows == 0) return cudaSuccess;
    GpuLimits gpu{};
    if (const cudaError_t status = CurrentGpu(&gpu); status != cudaSuccess) return status;
    const dim3 rows(static_cast<unsigned>(shape.rows));
    const auto k = static_cast<int>(args.k);
    if (args.buckets.codes > 0) {
        const TopKBucketArgs one{args.code_logits, args.codes,  shape.num_codes, k,
                                 args.buckets,     args.values, args.ids,        args.logsumexp};
        return LaunchKernel(kernels.buckets, rows, plan::kStreamThreads, plan::kScratchBytes, gpu, stream, one);
    }
    const StreamPlan plan = PlanStream(shape, args.type, args.code_bits, gpu);
    const int64_t stride = WordsPerCodebook(shape.vocab_size, args.code_bits) * 32 / args.code_bits;
    auto* const keys = static_cast<unsigned long long*>(args.workspace);
    const TopKStreamArgs pass{{args.code_logits, args.codes, args.bias, shape, stride, plan},
                              k,
                              {keys, reinterpret_cast<float2*>(keys + shape.rows * plan.parts * k)},
                              args.values,
                              args.ids,
                              args.logsumexp};
    const dim3 grid(rows.x, static_cast<unsigned>(plan.parts));
    const cudaError_t status = LaunchKernel(kernels.stream, grid, plan.threads, plan.shared_bytes, gpu, stream, pass);
    if (status != cudaSuccess || plan.parts == 1) return status;
    return LaunchKernel(&device::TopKMerge, rows, plan::kStreamThreads, plan::kScratchBytes, gpu, stream, pass);
}

}  // namespace vq
