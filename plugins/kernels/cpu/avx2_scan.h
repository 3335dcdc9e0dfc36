// The part of AVX2's kernels that is in fixed point (isa.h).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace vq::cpu::avx2 {

bool ToDifferences(const float* tables, const float* shares, int64_t num_codebooks, int64_t num_codes,
                   FixedPoint* fixed);
void OneRowFixed(const FixedPoint& fixed, const Block& block, float* sums);
void Scan(const FixedPoint& fixed, const Block& block, float* sums);
float Weigh(const float* x, int64_t count, float peak);

}  // namespace vq::cpu::avx2
