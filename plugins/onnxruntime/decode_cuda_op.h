// VQTopK and VQSample as ONNX Runtime custom ops: the CUDA kernels.
#pragma once

#include "device_buckets.h"
#include "device_head.h"
#include "op_base.h"

namespace vq::ort {

// A head with what answers in code space need, and where workspace comes from.
struct DecodeHead : DeviceHead {
    explicit DecodeHead(const OrtKernelInfo* info);

    OwnedBuckets buckets;    // none with more than one codebook
    Ort::MemoryInfo memory;  // of the GPU that the kernel was made for
};

class TopKCudaKernel {
public:
    explicit TopKCudaKernel(const OrtKernelInfo* info) : head_(info), k_(NumBest(info, head_.constants)) {}
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    DecodeHead head_;
    int64_t k_;
};

class SampleCudaKernel {
public:
    explicit SampleCudaKernel(const OrtKernelInfo* info) : head_(info) {}
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    DecodeHead head_;
};

// The constants are packed and sorted on the host before they go to the device.
inline OrtMemType DecodeMemoryType(size_t index) {
    return index == contract::kCodes || index == contract::kBias ? OrtMemTypeCPUInput : OrtMemTypeDefault;
}

struct TopKCudaOp : TopKOpBase<TopKCudaOp, TopKCudaKernel> {
    using TopKOpBase::TopKOpBase;
    const char* GetExecutionProviderType() const { return "CUDAExecutionProvider"; }
    OrtMemType GetInputMemoryType(size_t index) const { return DecodeMemoryType(index); }
};

struct SampleCudaOp : SampleOpBase<SampleCudaOp, SampleCudaKernel> {
    using SampleOpBase::SampleOpBase;
    const char* GetExecutionProviderType() const { return "CUDAExecutionProvider"; }
    OrtMemType GetInputMemoryType(size_t index) const { return DecodeMemoryType(index); }
};

}  // namespace vq::ort
