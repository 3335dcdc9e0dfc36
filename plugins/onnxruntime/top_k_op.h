// VQTopK as an ONNX Runtime custom op: the CPU kernel.
#pragma once

#include <memory>

#include "cpu/top_k.h"
#include "op_base.h"

namespace vq::ort {

class TopKKernel {
public:
    explicit TopKKernel(const OrtKernelInfo* info);
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    Constants constants_;
    int64_t num_best_;  // k
    std::unique_ptr<cpu::TopK> kernel_;
};

struct TopKOp : TopKOpBase<TopKOp, TopKKernel> {
    using TopKOpBase::TopKOpBase;
};

}  // namespace vq::ort
