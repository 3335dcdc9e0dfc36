// The tables of a few rows, in the form that the instruction set looks up best.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/packed_codes.h"

namespace vq::cpu {

// From so many rows on, eight rows at once beat one at a time, even with some of the eight empty: 5.5 ms for all eight
// where one took 1.2 in fixed point and 1.8 without (M=144, V=50257, one core of a server of 2023).
inline constexpr int64_t kMinRowsTogether = 5;

// Rows looked up one at a time: in fixed point where the instruction set has that and the row allows it.
class RowTables {
public:
    // scores float32 [rows, M*K] must outlive this.
    RowTables(const PackedCodes& codes, const Kernels& kernels, const float* scores, int64_t rows, int64_t num_codes);

    // A row's sums of one block, float32 [kBlock], bias included.
    void Sums(int64_t row, const Block& block, float* sums) const {
        const FixedPoint* fixed = fixed_.empty() ? nullptr : fixed_[static_cast<size_t>(row)];
        if (fixed != nullptr) return kernels_.one_row_fixed(*fixed, block, sums);
        kernels_.one_row(scores_ + row * width_, block, sums);
    }

private:
    const Kernels& kernels_;
    const float* scores_;
    int64_t width_;  // M*K
    Bytes planes_;
    std::vector<FixedPoint> tables_;
    std::vector<const FixedPoint*> fixed_;  // null for a row that has none; empty where no row has
};

// Up to kRows rows [count, M*K] side by side, [M*K, kRows], as Kernels::eight_rows takes them; zeros where rows lack.
std::vector<float> Interleaved(const Kernels& kernels, const float* scores, int64_t count, int64_t width);

}  // namespace vq::cpu
