// The TensorRT plugin of VQSample.
#pragma once

#include "decode_plugin.h"

namespace vq::trt {

// more inputs: temperature float32 [1], uniform float32 [..]; outputs: ids int64 [..], logprob float32 [..]
class VQSamplePlugin final : public DecodePlugin {
public:
    explicit VQSamplePlugin(const GatherScatterFields& fields);

protected:
    const GatherScatterFields& Head() const override { return fields_; }
    std::vector<Expected> OtherInputs(const nvinfer1::Dims& rows) const override;
    std::vector<Expected> Outputs(const nvinfer1::Dims& rows) const override;
    int64_t WorkspaceBytes(const GatherScatterShape& shape) const override;
    cudaError_t Launch(const Addresses& at, const GatherScatterShape& shape, Type type,
                       cudaStream_t stream) const override;
    DecodePlugin* Copy() const override { return new VQSamplePlugin(fields_); }

private:
    const GatherScatterFields fields_;
};

}  // namespace vq::trt
