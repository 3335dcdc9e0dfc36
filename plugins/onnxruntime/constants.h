// What the ops share: their constants, read from the node and checked, and how they fail.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <string>
#include <utility>
#include <vector>

#include "vq/contract.h"
#include "vq/shape.h"

namespace vq::ort {

// The lowest API version that has all that is used here: ONNX Runtime 1.22.
inline constexpr uint32_t kApiVersion = 22;

// What went wrong, named after the op, in the form that ONNX Runtime takes.
inline OrtStatusPtr Failure(const char* op, const std::exception& error, OrtErrorCode code) {
    return Ort::Status((std::string(op) + ": " + error.what()).c_str(), code).release();
}

// Throws Ort::Exception with one sentence: the graph, or what it is given, cannot be right.
[[noreturn]] void Refuse(const std::string& what);

// "[2, 3]".
std::string Written(const std::vector<int64_t>& shape);

// The node's constants, checked. Throws Ort::Exception with one sentence when they cannot be a head.
class Constants {
public:
    explicit Constants(const OrtKernelInfo* info);

    int64_t vocab_size() const { return vocab_size_; }
    int64_t num_codebooks() const { return num_codebooks_; }
    int32_t max_code() const { return max_code_; }
    Type type() const { return type_; }                                              // of code_logits, bias and logits
    const int32_t* codes() const { return codes_.GetTensorData<int32_t>(); }         // [V, M]
    const void* bias() const { return bias_ ? bias_.GetTensorRawData() : nullptr; }  // T [V], or null
    std::vector<float> WideBias() const;                                             // [V], or empty

    // code_logits [.., M*K] -> the sizes of this run and the shape of the logits [.., V]. Throws when the last
    // dimension does not fit the codes. A graph may compute it, so K is known here and not before.
    std::pair<GatherScatterShape, std::vector<int64_t>> Sizes(const std::vector<int64_t>& code_logits) const;

private:
    int64_t vocab_size_, num_codebooks_;
    int32_t max_code_ = 0;
    Type type_;
    Ort::ConstValue codes_, bias_{nullptr};
};

// The attribute `k` of VQTopK. Throws Ort::Exception when it is not 1 to kMaxBest, or above V.
int64_t NumBest(const OrtKernelInfo* info, const Constants& constants);

}  // namespace vq::ort
