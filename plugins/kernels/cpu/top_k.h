// The CPU kernels of VQTopK: the best tokens and the normaliser of the softmax, without V logits.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/dispatch.h"
#include "vq/shape.h"

namespace vq::cpu {

// A head's constants in the layout that the kernels like. Immutable, so any number of threads may Run it at once.
class TopK {
public:
    // codes int32 [V, M] and bias float32 [V] or null are copied; V is below 2^31. Ids are trusted to be 0 to 65535
    // (CheckCodes).
    TopK(const int32_t* codes, const float* bias, int64_t vocab_size, int64_t num_codebooks, Isa isa = BestIsa());
    ~TopK();
    TopK(const TopK&) = delete;
    TopK& operator=(const TopK&) = delete;

    // code_logits T [rows, M*K] -> values [rows, k] falling, equal ones by rising id, ids [rows, k], logsumexp [rows]
    // over all V. Sums accumulate in float32, or in fixed point of 24 bits where that is as exact (isa.h); where most
    // tokens are looked up in eight bits (fast_scan.h), logsumexp is off by 2^-11 at four standard deviations. The
    // results do not depend on `threads`, the number of parts that the work is cut into at most.
    //
    // K is trusted to be above every code id, k to be 1 to V. Tokens with a logit of NaN come last and make logsumexp
    // NaN; ids are always different tokens.
    void Run(const void* code_logits, float* values, int64_t* ids, float* logsumexp, int64_t rows, int64_t num_codes,
             int64_t k, Type type, const ParallelFor& parallel, int64_t threads) const;

private:
    struct Packed;
    struct Job;
    std::unique_ptr<Packed> packed_;
};

}  // namespace vq::cpu
