// VQGatherScatter as an ONNX Runtime custom op: the CUDA kernel.
#pragma once

#include <memory>

#include "op_base.h"

namespace vq::ort {

class GatherScatterCudaKernel {
public:
    explicit GatherScatterCudaKernel(const OrtKernelInfo* info);
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    struct CudaFree {
        void operator()(void* memory) const noexcept;
    };
    using DeviceMemory = std::unique_ptr<void, CudaFree>;
    static DeviceMemory OnDevice(const void* host, size_t bytes);

    Constants constants_;
    int32_t code_bits_;
    DeviceMemory codes_;  // packed, shape.h
    DeviceMemory bias_;   // T [V], or null
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
