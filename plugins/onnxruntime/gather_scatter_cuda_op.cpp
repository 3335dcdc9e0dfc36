#include "gather_scatter_cuda_op.h"

#include <string>
#include <vector>

#include "vq/launch.h"

namespace vq::ort {
namespace {

void Check(cudaError_t status, const char* doing) {
    if (status == cudaSuccess) return;
    throw Ort::Exception(std::string(doing) + " failed: " + cudaGetErrorString(status), ORT_FAIL);
}

}  // namespace

// A failure here leaves nothing to do: the context is gone or going.
void GatherScatterCudaKernel::CudaFree::operator()(void* memory) const noexcept { (void)cudaFree(memory); }

GatherScatterCudaKernel::DeviceMemory GatherScatterCudaKernel::OnDevice(const void* host, size_t bytes) {
    void* memory = nullptr;
    Check(cudaMalloc(&memory, bytes), "allocating the head's constants on the GPU");
    DeviceMemory owned(memory);
    Check(cudaMemcpy(memory, host, bytes, cudaMemcpyHostToDevice), "copying the head's constants to the GPU");
    return owned;
}

GatherScatterCudaKernel::GatherScatterCudaKernel(const OrtKernelInfo* info)
    : constants_(info), code_bits_(CodeBits(int64_t{constants_.max_code()} + 1)) {
    const int64_t v_count = constants_.vocab_size(), m_count = constants_.num_codebooks();
    std::vector<uint32_t> words(static_cast<size_t>(m_count * WordsPerCodebook(v_count, code_bits_)));
    PackCodes(constants_.codes(), v_count, m_count, code_bits_, words.data());
    codes_ = OnDevice(words.data(), words.size() * sizeof(uint32_t));
    if (constants_.bias() != nullptr) {
        bias_ = OnDevice(constants_.bias(), static_cast<size_t>(v_count * SizeOf(constants_.type())));
    }
}

OrtStatusPtr GatherScatterCudaKernel::ComputeV2(OrtKernelContext* raw) noexcept {
    try {
        Ort::KernelContext context{raw};
        const auto scores = context.GetInput(contract::kCodeLogits);
        const auto [shape, logits_shape] = constants_.Sizes(scores.GetTensorTypeAndShapeInfo().GetShape());
        auto logits = context.GetOutput(0, logits_shape);
        Check(LaunchVQGatherScatter({scores.GetTensorRawData(), codes_.get(), bias_.get(),
                                     logits.GetTensorMutableRawData(), shape, code_bits_, constants_.type()},
                                    static_cast<cudaStream_t>(context.GetGPUComputeStream())),
              "launching the kernel");
        return nullptr;
    } catch (const std::exception& error) {
        return Failure(contract::kGatherScatter, error, ORT_FAIL);
    }
}

}  // namespace vq::ort
