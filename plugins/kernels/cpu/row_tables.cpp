#include "cpu/row_tables.h"

#include <algorithm>

namespace vq::cpu {

RowTables::RowTables(const PackedCodes& codes, const Kernels& kernels, const float* scores, int64_t rows,
                     int64_t num_codes)
    : kernels_(kernels), scores_(scores), width_(codes.num_codebooks * num_codes) {
    const int64_t m_count = codes.num_codebooks;
    const bool has_fixed = num_codes <= kernels.max_fixed_codes && codes.code_bits == 8 &&
                           m_count >= kMinFixedCodebooks && m_count <= kMaxFixedCodebooks;
    if (!has_fixed) return;
    const int64_t bytes = m_count * FixedPoint::kPlanes * kTable;
    planes_.resize(static_cast<size_t>(rows * bytes));
    tables_.resize(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) {
        FixedPoint& table = tables_[static_cast<size_t>(r)];
        table.planes = planes_.data() + r * bytes;
        const bool fits = kernels.to_fixed_point(scores + r * width_, codes.shares.data(), m_count, num_codes, &table);
        fixed_.push_back(fits ? &table : nullptr);
    }
}

std::vector<float> Interleaved(const Kernels& kernels, const float* scores, int64_t count, int64_t width) {
    std::vector<float> tables(static_cast<size_t>(width * kRows)), padded;
    if (count < kRows) {
        padded.assign(static_cast<size_t>(kRows * width), 0.0f);
        std::copy(scores, scores + count * width, padded.begin());
        scores = padded.data();
    }
    kernels.interleave(scores, width, width, tables.data());
    return tables;
}

}  // namespace vq::cpu
