#include "gather_scatter_cuda_op.h"

#include "vq/launch.h"

namespace vq::ort {

OrtStatusPtr GatherScatterCudaKernel::ComputeV2(OrtKernelContext* raw) noexcept {
    try {
        Ort::KernelContext context{raw};
        const auto scores = context.GetInput(contract::kCodeLogits);
        const auto [shape, logits_shape] = head_.constants.Sizes(scores.GetTensorTypeAndShapeInfo().GetShape());
        auto logits = context.GetOutput(0, logits_shape);
        Check(LaunchVQGatherScatter({scores.GetTensorRawData(), head_.codes.get(), head_.bias.get(),
                                     logits.GetTensorMutableRawData(), shape, head_.code_bits, head_.constants.type()},
                                    static_cast<cudaStream_t>(context.GetGPUComputeStream())),
              "launching the kernel");
        return nullptr;
    } catch (const std::exception& error) {
        return Failure(contract::kGatherScatter, error, ORT_FAIL);
    }
}

}  // namespace vq::ort
