// What every provider's ops share: names, types, which inputs may be left out. One object per element type; ONNX
// Runtime merges them.
#pragma once

#include "constants.h"

namespace vq::ort {

template <typename Op, typename Kernel>
struct OpBase : Ort::CustomOpBase<Op, Kernel, true> {
    explicit OpBase(ONNXTensorElementDataType element) : element_(element) {
        this->version = kApiVersion;
        this->start_ver_ = contract::kVersion;
    }

    ONNXTensorElementDataType GetInputType(size_t index) const {
        if (index == contract::kCodes) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        return index == contract::kCodeLogits || index == contract::kBias ? element_
                                                                          : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
        return index == contract::kBias ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
        try {
            *kernel = new Kernel(info);
            return nullptr;
        } catch (const std::exception& error) {
            return Failure(static_cast<const Op*>(this)->GetName(), error, ORT_INVALID_GRAPH);
        }
    }

protected:
    ONNXTensorElementDataType element_;
};

template <typename Op, typename Kernel>
struct GatherScatterOpBase : OpBase<Op, Kernel> {
    using OpBase<Op, Kernel>::OpBase;
    const char* GetName() const { return contract::kGatherScatter; }
    size_t GetInputTypeCount() const { return std::size(contract::kGatherScatterInputs); }
    size_t GetOutputTypeCount() const { return std::size(contract::kGatherScatterOutputs); }
    ONNXTensorElementDataType GetOutputType(size_t) const { return this->element_; }
};

// values, ids, logsumexp.
template <typename Op, typename Kernel>
struct TopKOpBase : OpBase<Op, Kernel> {
    using OpBase<Op, Kernel>::OpBase;
    const char* GetName() const { return contract::kTopK; }
    size_t GetInputTypeCount() const { return std::size(contract::kTopKInputs); }
    size_t GetOutputTypeCount() const { return std::size(contract::kTopKOutputs); }
    ONNXTensorElementDataType GetOutputType(size_t index) const {
        return index == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
};

// ids, logprob.
template <typename Op, typename Kernel>
struct SampleOpBase : OpBase<Op, Kernel> {
    using OpBase<Op, Kernel>::OpBase;
    const char* GetName() const { return contract::kSample; }
    size_t GetInputTypeCount() const { return std::size(contract::kSampleInputs); }
    size_t GetOutputTypeCount() const { return std::size(contract::kSampleOutputs); }
    ONNXTensorElementDataType GetOutputType(size_t index) const {
        return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
};

}  // namespace vq::ort
