// Launchers of the CUDA kernels: raw device pointers, sizes and a stream in, cudaError_t out. No device code here.
#pragma once

#include <cuda_runtime_api.h>

#include "vq/shape.h"

namespace vq {

// One VQGatherScatter over device memory. Pointers are 16-byte aligned (every allocator's are), except logits, which
// may be aligned to its element only.
struct GatherScatterArgs {
    const void* code_logits;  // T [rows, M*K]
    const void* codes;        // packed ids, [M, WordsPerCodebook(V, code_bits)] 32-bit words (shape.h)
    const void* bias;         // T [V], or null
    void* logits;             // T [rows, V]
    GatherScatterShape shape;
    int32_t code_bits;  // 8 or 16
    Type type;
};

// Adds the kernel to the stream: no allocation, no synchronisation, fit for graph capture, any number of streams.
// Sums accumulate in float32 and are rounded once. Rows == 0 launches nothing.
//
// Returns: the status of the launch; cudaErrorInvalidValue for a code_bits other than 8 and 16.
cudaError_t LaunchVQGatherScatter(const GatherScatterArgs& args, cudaStream_t stream);

}  // namespace vq
