// Launches the VQSample kernels.
#include <cuda_runtime.h>

#include "gpu.h"
#include "sample.cuh"
#include "vq/launch.h"

namespace vq {
namespace {

constexpr int64_t kBytesOfCode = sizeof(unsigned long long) + sizeof(unsigned);  // its sum and its peak

cudaError_t LaunchCodes(const SampleArgs& args, const SampleKernels& kernels, const GpuLimits& gpu,
                        cudaStream_t stream) {
    const GatherScatterShape& shape = args.shape;
    SampleCodeArgs codes{args.code_logits, args.codes, args.bias, shape.num_codes, shape.vocab_size, args.temperature,
                         args.uniform,     nullptr,    nullptr,   args.buckets,    args.ids,         args.logprob};
    // Without a bias the buckets' sizes are the masses.
    if (args.bias != nullptr || args.buckets.codes == 0) {
        codes.sums = static_cast<unsigned long long*>(args.workspace);
        codes.peaks = reinterpret_cast<unsigned*>(codes.sums + shape.num_codes);
        cudaError_t status =
            cudaMemsetAsync(args.workspace, 0, static_cast<size_t>(shape.num_codes * kBytesOfCode), stream);
        const int64_t filling = plan::CeilDiv(shape.vocab_size, plan::kStreamThreads);
        const dim3 blocks(static_cast<unsigned>(std::min<int64_t>(filling, 4 * gpu.multiprocessors)));
        for (const auto kernel : {kernels.peaks, kernels.sums}) {
            if (status != cudaSuccess) return status;
            status = LaunchKernel(kernel, blocks, plan::kStreamThreads, 0, gpu, stream, codes);
        }
        if (status != cudaSuccess) return status;
    }
    const dim3 rows(static_cast<unsigned>(shape.rows));
    return LaunchKernel(kernels.code, rows, plan::kStreamThreads, plan::kScratchBytes, gpu, stream, codes);
}

}  // namespace

int64_t SampleWorkspaceBytes(const GatherScatterShape& shape) {
    if (shape.num_codebooks == 1) return shape.num_codes * kBytesOfCode;
    return plan::MostParts(shape.rows) * int64_t{sizeof(float2)};
}

cudaError_t LaunchVQSample(const SampleArgs& args, cudaStream_t stream) {
    const SampleKernels kernels = SampleKernelsOf(args.type, args.code_bits);
    const GatherScatterShape& shape = args.shape;
    if (kernels.code == nullptr) return cudaErrorInvalidValue;
    if (args.buckets.codes > 0 && shape.num_codebooks != 1) return cudaErrorInvalidValue;
    if (shape.rows == 0) return cudaSuccess;
    GpuLimits gpu{};
    if (const cudaError_t status = CurrentGpu(&gpu); status != cudaSuccess) return status;
    if (shape.num_codebooks == 1) return LaunchCodes(args, kernels, gpu, stream);

    const StreamPlan plan = PlanStream(shape, args.type, args.code_bits, gpu);
    const int64_t stride = WordsPerCodebook(shape.vocab_size, args.code_bits) * 32 / args.code_bits;
    const SampleStreamArgs pass{{args.code_logits, args.codes, args.bias, shape, stride, plan},
                                args.temperature,
                                args.uniform,
                                static_cast<float2*>(args.workspace),
                                args.ids,
                                args.logprob};
    const dim3 grid(static_cast<unsigned>(shape.rows), static_cast<unsigned>(plan.parts));
    const cudaError_t status = LaunchKernel(kernels.parts, grid, plan.threads, plan.shared_bytes, gpu, stream, pass);
    if (status != cudaSuccess) return status;
    return LaunchKernel(kernels.token, dim3(grid.x), plan.threads, plan.shared_bytes, gpu, stream, pass);
}

}  // namespace vq
