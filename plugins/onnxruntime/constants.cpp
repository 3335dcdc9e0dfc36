#include "constants.h"

#include <algorithm>

#include "cpu/dispatch.h"

namespace vq::ort {
namespace {

Type TypeOf(ONNXTensorElementDataType element) {
    switch (element) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
            return Type::kFloat32;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
            return Type::kFloat16;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
            return Type::kBFloat16;
        default:
            Refuse("code_logits has ONNX element type " + std::to_string(element) +
                   ", expected float, float16 or bfloat16");
    }
}

Ort::ConstValue Constant(const Ort::ConstKernelInfo& info, size_t index) {
    int is_constant = 0;
    auto value = info.GetTensorConstantInput(index, &is_constant);
    if (!is_constant) {
        Refuse(std::string(contract::kGatherScatterInputs[index]) +
               " is computed in the graph, expected a constant (an initializer)");
    }
    return value;
}

}  // namespace

void Refuse(const std::string& what) { throw Ort::Exception(what, ORT_INVALID_GRAPH); }

std::string Written(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    return text + "]";
}

Constants::Constants(const OrtKernelInfo* raw) {
    const Ort::ConstKernelInfo info{raw};
    const auto score_info = info.GetInputTypeInfo(contract::kCodeLogits);
    const auto scores = score_info.GetTensorTypeAndShapeInfo();
    type_ = TypeOf(scores.GetElementType());
    num_codebooks_ = info.GetAttribute<int64_t>(contract::kNumCodebooks);

    codes_ = Constant(info, contract::kCodes);
    const auto codes_shape = codes_.GetTensorTypeAndShapeInfo().GetShape();
    if (codes_shape.size() != 2 || codes_shape[1] != num_codebooks_) {
        Refuse("codes has shape " + Written(codes_shape) + ", expected [vocab_size, " + std::to_string(num_codebooks_) +
               "]: one id a codebook");
    }
    vocab_size_ = codes_shape[0];
    const GatherScatterShape largest{0, num_codebooks_, 65536, vocab_size_};
    if (const auto error = CheckShape(largest); !error.empty()) Refuse(error);
    if (const auto error = CheckCodes(codes(), largest); !error.empty()) Refuse(error);
    max_code_ = *std::max_element(codes(), codes() + vocab_size_ * num_codebooks_);

    if (info.GetInputCount() > contract::kBias && !info.GetInputName(contract::kBias).empty()) {
        bias_ = Constant(info, contract::kBias);
        const auto bias_shape = bias_.GetTensorTypeAndShapeInfo().GetShape();
        if (bias_shape != std::vector<int64_t>{vocab_size_}) {
            Refuse("bias has shape " + Written(bias_shape) + ", expected " + Written({vocab_size_}));
        }
    }
    // Most graphs say the last dimension; then a wrong one is found now and not at the first run.
    const auto scores_shape = scores.GetShape();
    if (!scores_shape.empty() && scores_shape.back() >= 0) Sizes({scores_shape.back()});
}

std::vector<float> Constants::WideBias() const {
    std::vector<float> wide(bias_ ? static_cast<size_t>(vocab_size_) : 0);
    if (bias_) cpu::Widen(bias(), type_, vocab_size_, wide.data());
    return wide;
}

std::pair<GatherScatterShape, std::vector<int64_t>> Constants::Sizes(const std::vector<int64_t>& code_logits) const {
    if (code_logits.empty() || code_logits.back() % num_codebooks_ != 0) {
        Refuse("code_logits has shape " + Written(code_logits) + ", expected a last dimension that is a multiple of " +
               "num_codebooks = " + std::to_string(num_codebooks_));
    }
    GatherScatterShape shape{1, num_codebooks_, code_logits.back() / num_codebooks_, vocab_size_};
    if (shape.num_codes <= max_code_) {
        Refuse("codes go up to " + std::to_string(max_code_) + ", but code_logits has shape " + Written(code_logits) +
               ", which is " + std::to_string(shape.num_codes) + " codes for each of " +
               std::to_string(num_codebooks_) + " codebooks");
    }
    for (size_t i = 0; i + 1 < code_logits.size(); ++i) shape.rows *= code_logits[i];
    auto logits = code_logits;
    logits.back() = vocab_size_;
    return {shape, logits};
}

int64_t NumBest(const OrtKernelInfo* info, const Constants& constants) {
    const auto k = Ort::ConstKernelInfo{info}.GetAttribute<int64_t>(contract::kNumBest);
    const int64_t most = std::min<int64_t>(contract::kMaxBest, constants.vocab_size());
    if (k < 1 || k > most) Refuse("k is " + std::to_string(k) + ", expected 1 to " + std::to_string(most));
    return k;
}

}  // namespace vq::ort
