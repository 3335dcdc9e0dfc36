// VQGatherScatter as an ONNX Runtime custom op: the CUDA kernel.
#pragma once

#include "device_head.h"
#include "op_base.h"

namespace vq::ort {

class GatherScatterCudaKernel {
public:
    explicit GatherScatterCudaKernel(const OrtKernelInfo* info) : head_(info) {}
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    DeviceHead head_;
};

struct GatherScatterCudaOp : GatherScatterOpBase<GatherScatterCudaOp, GatherScatterCudaKernel> {
    using GatherScatterOpBase::GatherScatterOpBase;
    const char* GetExecutionProviderType() const { return "CUDAExecutionProvider"; }
    // The constants are packed on the host before they go to the device.
    OrtMemType GetInputMemoryType(size_t index) const {
        return index == contract::kCodeLogits ? OrtMemTypeDefault : OrtMemTypeCPUInput;
    }
};

}  // namespace vq::ort
