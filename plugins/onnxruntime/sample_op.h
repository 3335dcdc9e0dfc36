// VQSample as an ONNX Runtime custom op: the CPU kernel.
#pragma once

#include <memory>

#include "cpu/sample.h"
#include "op_base.h"

namespace vq::ort {

class SampleKernel {
public:
    explicit SampleKernel(const OrtKernelInfo* info);
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    Constants constants_;
    std::unique_ptr<cpu::Sample> kernel_;
};

struct SampleOp : SampleOpBase<SampleOp, SampleKernel> {
    using SampleOpBase::SampleOpBase;
};

}  // namespace vq::ort
