// VQGatherScatter as an ONNX Runtime custom op: the CPU kernel.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/gather_scatter.h"
#include "vq/contract.h"

namespace vq::ort {

// The lowest API version that has all that is used here: ONNX Runtime 1.22.
inline constexpr uint32_t kApiVersion = 22;

// What went wrong, named after the op, in the form that ONNX Runtime takes.
inline OrtStatusPtr Failure(const std::exception& error, OrtErrorCode code) {
    return Ort::Status((std::string(contract::kGatherScatter) + ": " + error.what()).c_str(), code).release();
}

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

    // code_logits [.., M*K] -> the sizes of this run and the shape of the logits [.., V]. Throws when the last
    // dimension does not fit the codes. A graph may compute it, so K is known here and not before.
    std::pair<GatherScatterShape, std::vector<int64_t>> Sizes(const std::vector<int64_t>& code_logits) const;

private:
    int64_t vocab_size_, num_codebooks_;
    int32_t max_code_ = 0;
    Type type_;
    Ort::ConstValue codes_, bias_{nullptr};
};

class GatherScatterKernel {
public:
    explicit GatherScatterKernel(const OrtKernelInfo* info);
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    Constants constants_;
    std::unique_ptr<cpu::GatherScatter> kernel_;
};

// What every provider's op shares: names, types, shapes. One object per element type; ONNX Runtime merges them.
template <typename Op, typename Kernel>
struct GatherScatterOpBase : Ort::CustomOpBase<Op, Kernel, true> {
    explicit GatherScatterOpBase(ONNXTensorElementDataType element) : element_(element) {
        this->version = kApiVersion;
        this->start_ver_ = contract::kVersion;
    }

    const char* GetName() const { return contract::kGatherScatter; }
    size_t GetInputTypeCount() const { return std::size(contract::kGatherScatterInputs); }
    ONNXTensorElementDataType GetInputType(size_t index) const {
        return index == contract::kCodes ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : element_;
    }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
        return index == contract::kBias ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
    size_t GetOutputTypeCount() const { return std::size(contract::kGatherScatterOutputs); }
    ONNXTensorElementDataType GetOutputType(size_t) const { return element_; }

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
        try {
            *kernel = new Kernel(info);
            return nullptr;
        } catch (const std::exception& error) {
            return Failure(error, ORT_INVALID_GRAPH);
        }
    }

private:
    ONNXTensorElementDataType element_;
};

struct GatherScatterOp : GatherScatterOpBase<GatherScatterOp, GatherScatterKernel> {
    using GatherScatterOpBase::GatherScatterOpBase;
};

}  // namespace vq::ort
