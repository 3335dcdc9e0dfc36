// The CPU kernels of VQSample: a token drawn from softmax(logits / temperature), without V logits.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/dispatch.h"
#include "vq/shape.h"

namespace vq::cpu {

// A head's constants in the layout that the kernels like. Immutable, so any number of threads may Run it at once.
class Sample {
public:
    // codes int32 [V, M] and bias float32 [V] or null are copied; V is below 2^31. Ids are trusted to be 0 to 65535
    // (CheckCodes).
    Sample(const int32_t* codes, const float* bias, int64_t vocab_size, int64_t num_codebooks, Isa isa = BestIsa());
    ~Sample();
    Sample(const Sample&) = delete;
    Sample& operator=(const Sample&) = delete;

    // code_logits T [rows, M*K], uniform [rows] in [0, 1) -> ids [rows], logprob [rows]: the first token, in the order
    // of (code, id) with one codebook and of ids with more, whose cumulative share exceeds `uniform`. Sums accumulate
    // as TopK's do. The results do not depend on `threads`, the number of parts that the work is cut into at most.
    //
    // K is trusted to be above every code id, the temperature to be above 0 and finite. A token whose chance is 0 in
    // float32 is never drawn. NaN among a row's logits makes logprob NaN; the id is some token's all the same.
    void Run(const void* code_logits, float temperature, const float* uniform, int64_t* ids, float* logprob,
             int64_t rows, int64_t num_codes, Type type, const ParallelFor& parallel, int64_t threads) const;

private:
    struct Packed;
    struct Job;
    std::unique_ptr<Packed> packed_;
};

}  // namespace vq::cpu
