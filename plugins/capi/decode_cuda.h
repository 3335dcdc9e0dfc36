// VQTopK and VQSample on the GPU behind plain C calls, for ctypes. Where a function returns int, it is a cudaError_t:
// 801 (cudaErrorNotSupported) in a library built without CUDA.
#pragma once

#include <stdint.h>

#include "capi/capi.h"

#ifdef __cplusplus
extern "C" {
#endif

// The tables of a head with one codebook, on the current device.
//
// Args: codes int32 [V] and bias float32 [V] or null, on the host; ids 0 to 65535. Returns through `made` what the
// calls below take as `buckets` and vq_free_buckets_cuda takes back.
VQ_EXPORT int vq_make_buckets_cuda(const int32_t* codes, const float* bias, int64_t vocab_size, void** made);
VQ_EXPORT void vq_free_buckets_cuda(void* buckets);

// Bytes of device memory that a call needs as workspace; 0 in a library built without CUDA.
VQ_EXPORT int64_t vq_top_k_workspace_cuda(int64_t rows, int64_t num_codebooks, int64_t num_codes, int64_t vocab_size,
                                          int64_t k);
VQ_EXPORT int64_t vq_sample_workspace_cuda(int64_t rows, int64_t num_codebooks, int64_t num_codes, int64_t vocab_size);

// Device pointers as in vq/launch.h; type as in capi.h; buckets may be null.
VQ_EXPORT int vq_top_k_cuda(const void* code_logits, const void* codes, const void* bias, float* values, int64_t* ids,
                            float* logsumexp, void* workspace, int64_t rows, int64_t num_codebooks, int64_t num_codes,
                            int64_t vocab_size, int64_t k, int32_t code_bits, int32_t type, const void* buckets,
                            void* stream);
VQ_EXPORT int vq_sample_cuda(const void* code_logits, const void* codes, const void* bias, const float* temperature,
                             const float* uniform, int64_t* ids, float* logprob, void* workspace, int64_t rows,
                             int64_t num_codebooks, int64_t num_codes, int64_t vocab_size, int32_t code_bits,
                             int32_t type, const void* buckets, void* stream);

#ifdef __cplusplus
}
#endif
