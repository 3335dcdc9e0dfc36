// The plain host reference: the oracle of every kernel. Nothing is clever here.
#pragma once

#include <cstdint>

#include "vq/shape.h"

namespace vq {

// logits[r, v] = sum_m code_logits[r, m*K + codes[v, m]] + bias[v], all in double.
//
// Args: code_logits [rows, M*K], codes int32 [V, M], bias [V] or null, logits [rows, V], all on the host, row by row.
inline void GatherScatterReference(const double* code_logits, const int32_t* codes, const double* bias, double* logits,
                                   const GatherScatterShape& shape) {
    const int64_t m_count = shape.num_codebooks, k_count = shape.num_codes, v_count = shape.vocab_size;
    for (int64_t r = 0; r < shape.rows; ++r) {
        for (int64_t v = 0; v < v_count; ++v) {
            double sum = bias == nullptr ? 0.0 : bias[v];
            for (int64_t m = 0; m < m_count; ++m) {
                sum += code_logits[(r * m_count + m) * k_count + codes[v * m_count + m]];
            }
            logits[r * v_count + v] = sum;
        }
    }
}

}  // namespace vq
