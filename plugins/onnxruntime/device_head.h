// The constants of a head on the GPU, as every CUDA op of ONNX Runtime keeps them.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "constants.h"

namespace vq::ort {

// Throws Ort::Exception with CUDA's words when something failed.
void Check(cudaError_t status, const char* doing);

struct DeviceHead {
    explicit DeviceHead(const OrtKernelInfo* info);

    struct CudaFree {
        void operator()(void* memory) const noexcept;
    };
    using Memory = std::unique_ptr<void, CudaFree>;

    Constants constants;
    int32_t code_bits;
    Memory codes;  // packed, shape.h
    Memory bias;   // T [V], or null
};

}  // namespace vq::ort
