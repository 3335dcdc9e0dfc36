#include "top_k_op.h"

#include "cpu_threads.h"

namespace vq::ort {

TopKKernel::TopKKernel(const OrtKernelInfo* info) : constants_(info), num_best_(NumBest(info, constants_)) {
    const auto bias = constants_.WideBias();
    kernel_ = std::make_unique<cpu::TopK>(constants_.codes(), bias.empty() ? nullptr : bias.data(),
                                          constants_.vocab_size(), constants_.num_codebooks());
}

OrtStatusPtr TopKKernel::ComputeV2(OrtKernelContext* raw) noexcept {
    try {
        Ort::KernelContext context{raw};
        const auto scores = context.GetInput(contract::kCodeLogits);
        auto [shape, best_shape] = constants_.Sizes(scores.GetTensorTypeAndShapeInfo().GetShape());
        best_shape.back() = num_best_;
        auto values = context.GetOutput(0, best_shape);
        auto ids = context.GetOutput(1, best_shape);
        best_shape.pop_back();
        auto logsumexp = context.GetOutput(2, best_shape);
        kernel_->Run(scores.GetTensorRawData(), values.GetTensorMutableData<float>(),
                     ids.GetTensorMutableData<int64_t>(), logsumexp.GetTensorMutableData<float>(), shape.rows,
                     shape.num_codes, num_best_, constants_.type(), SessionThreads(context), Cores());
        return nullptr;
    } catch (const std::exception& error) {
        return Failure(contract::kTopK, error, ORT_FAIL);
    }
}

}  // namespace vq::ort
