#include "gather_scatter_op.h"

#include "cpu_threads.h"

namespace vq::ort {

GatherScatterKernel::GatherScatterKernel(const OrtKernelInfo* info) : constants_(info) {
    const auto bias = constants_.WideBias();
    kernel_ = std::make_unique<cpu::GatherScatter>(constants_.codes(), bias.empty() ? nullptr : bias.data(),
                                                   constants_.vocab_size(), constants_.num_codebooks());
}

OrtStatusPtr GatherScatterKernel::ComputeV2(OrtKernelContext* raw) noexcept {
    try {
        Ort::KernelContext context{raw};
        const auto scores = context.GetInput(contract::kCodeLogits);
        const auto [shape, logits_shape] = constants_.Sizes(scores.GetTensorTypeAndShapeInfo().GetShape());
        auto logits = context.GetOutput(0, logits_shape);
        kernel_->Run(scores.GetTensorRawData(), logits.GetTensorMutableRawData(), shape.rows, shape.num_codes,
                     constants_.type(), SessionThreads(context), Cores());
        return nullptr;
    } catch (const std::exception& error) {
        return Failure(contract::kGatherScatter, error, ORT_FAIL);
    }
}

}  // namespace vq::ort
