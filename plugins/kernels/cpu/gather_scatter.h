// The CPU kernels of VQGatherScatter: code ids packed once, the instruction set picked at run time.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/dispatch.h"
#include "vq/shape.h"

namespace vq::cpu {

// A head's constants in the layout that the kernels like. Immutable, so any number of threads may Run it at once.
class GatherScatter {
public:
    // codes int32 [V, M] and bias float32 [V] or null are copied. Ids are trusted to be 0 to 65535 (CheckCodes).
    GatherScatter(const int32_t* codes, const float* bias, int64_t vocab_size, int64_t num_codebooks,
                  Isa isa = BestIsa());
    ~GatherScatter();
    GatherScatter(const GatherScatter&) = delete;
    GatherScatter& operator=(const GatherScatter&) = delete;

    // code_logits T [rows, M*K] -> logits T [rows, V]. Sums accumulate in float32, or in fixed point of 24 bits where
    // that is as exact (isa.h), and are rounded to T once. K is trusted to be above every code id. `threads`: into how
    // many parts to cut the work at most.
    void Run(const void* code_logits, void* logits, int64_t rows, int64_t num_codes, Type type,
             const ParallelFor& parallel, int64_t threads) const;

private:
    struct Packed;
    struct Job;
    std::unique_ptr<Packed> packed_;
};

}  // namespace vq::cpu
