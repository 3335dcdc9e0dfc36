// The kernels behind plain C calls, for ctypes and other foreign callers.
#pragma once

#include <stdint.h>

#define VQ_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// A head's constants as the host's VQGatherScatter likes them, packed once for any number of calls.
//
// codes int32 [V, M], ids 0 to 65535, and bias float32 [V] or null are copied. isa: 0 portable, 1 NEON, 2 AVX2,
// 3 AVX-512, 4 AVX-512 VBMI, -1 the best of this processor. Returns through `made` what the call below takes as `head`
// and vq_free_gather_scatter_cpu takes back.
//
// Returns: null, or one sentence that says what was wrong, valid until the thread's next call.
VQ_EXPORT const char* vq_make_gather_scatter_cpu(const int32_t* codes, const float* bias, int64_t num_codebooks,
                                                 int64_t vocab_size, int32_t isa, void** made);
VQ_EXPORT void vq_free_gather_scatter_cpu(void* head);

// VQGatherScatter on the host, on the caller's thread; any number of threads may share a head.
//
// code_logits T [rows, M*K], K above every code id; logits T [rows, V]. type: 0 float32, 1 float16, 2 bfloat16.
//
// Returns: as above.
VQ_EXPORT const char* vq_gather_scatter_cpu(const void* head, const void* code_logits, void* logits, int64_t rows,
                                            int64_t num_codes, int32_t type);

// VQGatherScatter on the current CUDA device; all pointers are device pointers, codes are packed (vq/shape.h).
//
// Returns: the cudaError_t of the launch; 801 (cudaErrorNotSupported) in a library built without CUDA.
VQ_EXPORT int vq_gather_scatter_cuda(const void* code_logits, const void* codes, const void* bias, void* logits,
                                     int64_t rows, int64_t num_codebooks, int64_t num_codes, int64_t vocab_size,
                                     int32_t code_bits, int32_t type, void* stream);

// codes int32 [V, M] -> words uint32 [M, words per codebook], of code_bits 8 or 16.
VQ_EXPORT void vq_pack_codes(const int32_t* codes, int64_t vocab_size, int64_t num_codebooks, int32_t code_bits,
                             uint32_t* words);

#ifdef __cplusplus
}
#endif
