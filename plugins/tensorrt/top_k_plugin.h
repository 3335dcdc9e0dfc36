// The TensorRT plugin of VQTopK.
#pragma once

#include "decode_plugin.h"

namespace vq::trt {

// outputs: values float32 [.., k], ids int64 [.., k], logsumexp float32 [..]
class VQTopKPlugin final : public DecodePlugin {
public:
    explicit VQTopKPlugin(const TopKFields& fields);

protected:
    const GatherScatterFields& Head() const override { return fields_; }
    std::vector<Expected> OtherInputs(const nvinfer1::Dims&) const override { return {}; }
    std::vector<Expected> Outputs(const nvinfer1::Dims& rows) const override;
    int64_t WorkspaceBytes(const GatherScatterShape& shape) const override;
    cudaError_t Launch(const Addresses& at, const GatherScatterShape& shape, Type type,
                       cudaStream_t stream) const override;
    DecodePlugin* Copy() const override { return new VQTopKPlugin(fields_); }

private:
    const TopKFields fields_;
};

}  // namespace vq::trt
