// VQTopK and VQSample on the host behind plain C calls, on the caller's thread.
//
// code_logits T [rows, M*K], codes int32 [V, M], bias float32 [V] or null. type: 0 float32, 1 float16, 2 bfloat16. isa:
// 0 portable, 1 NEON, 2 AVX2, 3 AVX-512, 4 AVX-512 VBMI, -1 the best of this processor. parts: into how many parts the
// work is cut.
//
// Returns: null, or one sentence that says what was wrong, valid until the thread's next call.
#pragma once

#include <stdint.h>

#include "capi/capi.h"

#ifdef __cplusplus
extern "C" {
#endif

// values float32 [rows, k], ids int64 [rows, k], logsumexp float32 [rows]; 1 <= k <= V.
VQ_EXPORT const char* vq_top_k_cpu(const void* code_logits, const int32_t* codes, const float* bias, float* values,
                                   int64_t* ids, float* logsumexp, int64_t rows, int64_t num_codebooks,
                                   int64_t num_codes, int64_t vocab_size, int64_t k, int32_t type, int32_t isa,
                                   int64_t parts);

// uniform float32 [rows] in [0, 1), ids int64 [rows], logprob float32 [rows]; temperature above 0.
VQ_EXPORT const char* vq_sample_cpu(const void* code_logits, const int32_t* codes, const float* bias, float temperature,
                                    const float* uniform, int64_t* ids, float* logprob, int64_t rows,
                                    int64_t num_codebooks, int64_t num_codes, int64_t vocab_size, int32_t type,
                                    int32_t isa, int64_t parts);

#ifdef __cplusplus
}
#endif
