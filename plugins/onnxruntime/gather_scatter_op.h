// VQGatherScatter as an ONNX Runtime custom op: the CPU kernel.
#pragma once

#include <memory>

#include "cpu/gather_scatter.h"
#include "op_base.h"

namespace vq::ort {

class GatherScatterKernel {
public:
    explicit GatherScatterKernel(const OrtKernelInfo* info);
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    Constants constants_;
    std::unique_ptr<cpu::GatherScatter> kernel_;
};

struct GatherScatterOp : GatherScatterOpBase<GatherScatterOp, GatherScatterKernel> {
    using GatherScatterOpBase::GatherScatterOpBase;
};

}  // namespace vq::ort
