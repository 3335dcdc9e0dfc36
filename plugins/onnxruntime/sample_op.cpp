#include "sample_op.h"

#include "cpu_threads.h"

namespace vq::ort {
namespace {

float Temperature(const Ort::ConstValue& value) {
    const auto shape = value.GetTensorTypeAndShapeInfo().GetShape();
    if (shape != std::vector<int64_t>{1}) Refuse("temperature has shape " + Written(shape) + ", expected [1]");
    const float temperature = *value.GetTensorData<float>();
    if (const auto error = CheckTemperature(temperature); !error.empty()) Refuse(error);
    return temperature;
}

}  // namespace

SampleKernel::SampleKernel(const OrtKernelInfo* info) : constants_(info) {
    const auto bias = constants_.WideBias();
    kernel_ = std::make_unique<cpu::Sample>(constants_.codes(), bias.empty() ? nullptr : bias.data(),
                                            constants_.vocab_size(), constants_.num_codebooks());
}

OrtStatusPtr SampleKernel::ComputeV2(OrtKernelContext* raw) noexcept {
    try {
        Ort::KernelContext context{raw};
        const auto scores = context.GetInput(contract::kCodeLogits);
        const auto uniform = context.GetInput(contract::kUniform);
        auto [shape, drawn_shape] = constants_.Sizes(scores.GetTensorTypeAndShapeInfo().GetShape());
        drawn_shape.pop_back();
        CheckUniform(uniform.GetTensorTypeAndShapeInfo().GetShape(), drawn_shape);
        const float temperature = Temperature(context.GetInput(contract::kTemperature));
        auto ids = context.GetOutput(0, drawn_shape);
        auto logprob = context.GetOutput(1, drawn_shape);
        kernel_->Run(scores.GetTensorRawData(), temperature, uniform.GetTensorData<float>(),
                     ids.GetTensorMutableData<int64_t>(), logprob.GetTensorMutableData<float>(), shape.rows,
                     shape.num_codes, constants_.type(), SessionThreads(context), Cores());
        return nullptr;
    } catch (const std::exception& error) {
        return Failure(contract::kSample, error, ORT_FAIL);
    }
}

}  // namespace vq::ort
