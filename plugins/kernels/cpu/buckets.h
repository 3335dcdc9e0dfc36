// One codebook: tokens of the same code have the same score, so the codes in use stand for all tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace vq::cpu {

// The tokens of every code in use; there are U such codes.
struct Buckets {
    enum class Order { kById, kByBias };  // kByBias: falling, equal ones by rising id

    std::vector<int32_t> code;      // [U], rising
    std::vector<int32_t> start;     // [U + 1]: where a bucket begins in tokens
    std::vector<int32_t> tokens;    // ids [V], bucket by bucket, in the order asked for
    std::vector<float> bias;        // [V], of `tokens`; or empty
    std::vector<float> first_bias;  // [U], of each bucket's first token; or empty

    // codes int32 [V, 1] and bias float32 [V] or null are copied. V is below 2^31.
    Buckets(const int32_t* codes, const float* bias, int64_t vocab_size, Order order);

    int64_t Count() const { return static_cast<int64_t>(code.size()); }
    int64_t Size(int64_t bucket) const { return start[bucket + 1] - start[bucket]; }

    // What a bucket's tokens weigh together, in the units of their scores: log(sum of exp(scale * bias)) / scale, [U].
    std::vector<float> Masses(const Decode& decode, float scale) const;

    // A row's scores [K] -> those of the codes in use [U], copied into `scratch` [U] only where some code is not.
    const float* Used(const float* scores, float* scratch) const;
};

}  // namespace vq::cpu
