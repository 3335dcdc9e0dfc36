// The plain host reference: the oracle of every kernel. Nothing is clever here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

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

// log(sum of exp(x)) over x [count]; -infinity where every x is, or where there is none.
inline double LogSumExpReference(const double* x, int64_t count) {
    const double none = -std::numeric_limits<double>::infinity();
    const double peak = count == 0 ? none : *std::max_element(x, x + count);
    if (peak == none) return none;
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += std::exp(x[i] - peak);
    return peak + std::log(sum);
}

// The k largest logits of every row, falling, equal ones by rising token id, and the logsumexp over all V.
//
// Args: as above, without NaN; 1 <= k <= V; values [rows, k], ids [rows, k], logsumexp [rows].
inline void TopKReference(const double* code_logits, const int32_t* codes, const double* bias, int64_t k,
                          double* values, int64_t* ids, double* logsumexp, const GatherScatterShape& shape) {
    const int64_t v_count = shape.vocab_size;
    std::vector<double> logits(static_cast<size_t>(shape.rows * v_count));
    GatherScatterReference(code_logits, codes, bias, logits.data(), shape);
    std::vector<int64_t> order(static_cast<size_t>(v_count));
    for (int64_t r = 0; r < shape.rows; ++r) {
        const double* row = logits.data() + r * v_count;
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + k, order.end(),
                          [row](int64_t a, int64_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
        for (int64_t i = 0; i < k; ++i) {
            ids[r * k + i] = order[static_cast<size_t>(i)];
            values[r * k + i] = row[ids[r * k + i]];
        }
        logsumexp[r] = LogSumExpReference(row, v_count);
    }
}

// Tokens [V] in the order in which VQSample lays its distribution out: by (code, token id) with one codebook, else by
// token id.
inline std::vector<int64_t> SampleOrderReference(const int32_t* codes, const GatherScatterShape& shape) {
    std::vector<int64_t> order(static_cast<size_t>(shape.vocab_size));
    std::iota(order.begin(), order.end(), 0);
    if (shape.num_codebooks == 1) {
        std::stable_sort(order.begin(), order.end(), [codes](int64_t a, int64_t b) { return codes[a] < codes[b]; });
    }
    return order;
}

// The token of every row whose stretch of the cumulative distribution of softmax(logits / temperature) holds `uniform`.
//
// A kernel computes in float32, so near a boundary it may draw the neighbour: `upper` says where every token's stretch
// ends and `share` how long it is, so that a test can tell a boundary from a mistake.
//
// Args: as above, without NaN; temperature above 0; uniform [rows] in [0, 1); ids [rows]; logprob [rows]; upper and
// share [rows, V], by token id.
inline void SampleReference(const double* code_logits, const int32_t* codes, const double* bias, double temperature,
                            const double* uniform, int64_t* ids, double* logprob, double* upper, double* share,
                            const GatherScatterShape& shape) {
    const int64_t v_count = shape.vocab_size;
    std::vector<double> logits(static_cast<size_t>(shape.rows * v_count));
    GatherScatterReference(code_logits, codes, bias, logits.data(), shape);
    for (double& logit : logits) logit /= temperature;
    const std::vector<int64_t> order = SampleOrderReference(codes, shape);
    for (int64_t r = 0; r < shape.rows; ++r) {
        const double* row = logits.data() + r * v_count;
        const double normaliser = LogSumExpReference(row, v_count);
        double cumulative = 0.0;
        bool drawn = false;
        for (const int64_t v : order) {
            share[r * v_count + v] = std::exp(row[v] - normaliser);
            cumulative += share[r * v_count + v];
            upper[r * v_count + v] = cumulative;
            if (drawn || share[r * v_count + v] == 0.0) continue;
            ids[r] = v;  // the last token of any weight stays where rounding leaves the sum short of uniform
            logprob[r] = row[v] - normaliser;
            drawn = cumulative > uniform[r];
        }
    }
}

}  // namespace vq
