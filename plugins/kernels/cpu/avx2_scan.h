// The part of AVX2's kernels that is in fixed point (isa.h).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace vq::cpu::avx2 {

bool ToDifferences(const float* tables, const float* shares, int64_t num_codebooks, int64_t num_codes,
                   FixedPoint* fixed);
void OneRowFixed(const FixedPoint& fixed, const Block& block, float* sums);
void Scan(const FixedPoint& fixed, const Block& block, float* sums);
void Refine(const FixedPoint& fixed, int64_t num_codebooks, const uint8_t* const* codes, float* const* sums);
void Weigh(const float* x, int64_t groups, float peak, float* masses, float* squares);

}  // namespace vq::cpu::avx2
