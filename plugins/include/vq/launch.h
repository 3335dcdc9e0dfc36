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

// Tables of a head with one codebook on the device, as buckets.h builds them on the host.
struct DeviceBuckets {
    const int32_t* starts;   // [codes + 1]
    const int32_t* by_id;    // [V]
    const int32_t* by_rank;  // [V]
    const float* rank_bias;  // [V], or null without bias
    const int32_t* head;     // [codes]
    const float* head_bias;  // [codes]
    const float* next_bias;  // [codes]
    const float* mass;       // [codes]
    int64_t codes;           // of the tables, num_codes at most; 0: there are none
};

// One VQTopK over device memory. Pointers are 16-byte aligned. With buckets a row costs O(K + k), else one pass over
// the codes; V logits are never written.
struct TopKArgs {
    const void* code_logits;  // T [rows, M*K]
    const void* codes;        // packed ids, as above
    const void* bias;         // T [V], or null
    float* values;            // [rows, k], falling, equal ones by rising id; NaN counts as the largest
    int64_t* ids;             // [rows, k]
    float* logsumexp;         // [rows]
    void* workspace;          // TopKWorkspaceBytes
    GatherScatterShape shape;
    int64_t k;          // 1 to contract::kMaxBest, at most V
    int32_t code_bits;  // 8 or 16
    Type type;
    DeviceBuckets buckets;  // of one codebook only, and of the same codes and bias
};

// Bytes of workspace that are enough for this shape and for any with fewer rows, on every GPU.
int64_t TopKWorkspaceBytes(const GatherScatterShape& shape, int64_t k);

// As LaunchVQGatherScatter. Returns also cudaErrorInvalidValue for a k out of range.
cudaError_t LaunchVQTopK(const TopKArgs& args, cudaStream_t stream);

// One VQSample over device memory. Pointers are 16-byte aligned, except temperature and uniform.
struct SampleArgs {
    const void* code_logits;   // T [rows, M*K]
    const void* codes;         // packed ids, as above
    const void* bias;          // T [V], or null
    const float* temperature;  // [1]
    const float* uniform;      // [rows]
    int64_t* ids;              // [rows]
    float* logprob;            // [rows]
    void* workspace;           // SampleWorkspaceBytes
    GatherScatterShape shape;
    int32_t code_bits;  // 8 or 16
    Type type;
    DeviceBuckets buckets;  // as above
};

// Bytes of workspace that are enough for this shape and for any with fewer rows, on every GPU.
int64_t SampleWorkspaceBytes(const GatherScatterShape& shape);

// As LaunchVQGatherScatter.
cudaError_t LaunchVQSample(const SampleArgs& args, cudaStream_t stream);

}  // namespace vq
