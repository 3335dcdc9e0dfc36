// A few rows over all tokens: the sums of one block after the other, while they are in the first cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/row_tables.h"

namespace vq::cpu {

class Stream {
public:
    // scores float32 [rows, M*K], rows 1 to kRows; must outlive this.
    Stream(const PackedCodes& codes, const Kernels& kernels, const float* scores, int64_t rows, int64_t num_codes)
        : codes_(codes),
          kernels_(kernels),
          rows_(rows),
          num_codes_(num_codes),
          rows_by_themselves_(codes, kernels, scores, rows < kMinRowsTogether ? rows : 0, num_codes) {
        if (rows >= kMinRowsTogether) together_ = Interleaved(kernels, scores, rows, codes.num_codebooks * num_codes);
    }

    int64_t Parts(int64_t threads) const {
        return PartsFor(codes_.blocks, codes_.blocks * kBlock * rows_ * codes_.num_codebooks, threads);
    }

    // body(part, row, block, sums): sums float32 [kBlock] with bias, -infinity behind the last token; body may
    // overwrite them. A part's blocks come in rising order.
    template <typename Body>
    void Run(int64_t parts, const ParallelFor& parallel, const Body& body) const {
        ForParts(codes_.blocks, parts, parallel, [&](int64_t begin, int64_t end, int64_t part) {
            alignas(64) float sums[kRows * kBlock];
            for (int64_t b = begin; b < end; ++b) {
                codes_.PrefetchAfter(b);
                if (!together_.empty()) kernels_.eight_rows(together_.data(), codes_.At(b, num_codes_), sums);
                for (int64_t r = 0; r < rows_; ++r) {
                    float* own = sums + r * kBlock;
                    if (together_.empty()) {
                        Sums(r, b, own);
                    } else {
                        ClosePadding(b, own);
                    }
                    body(part, r, b, own);
                }
            }
        });
    }

    // One row's sums of one block.
    void Sums(int64_t row, int64_t block, float* sums) const {
        rows_by_themselves_.Sums(row, codes_.At(block, num_codes_), sums);
        ClosePadding(block, sums);
    }

private:
    void ClosePadding(int64_t block, float* sums) const {
        const int64_t count = std::min(kBlock, codes_.vocab_size - block * kBlock);
        std::fill(sums + count, sums + kBlock, -std::numeric_limits<float>::infinity());
    }

    const PackedCodes& codes_;
    const Kernels& kernels_;
    int64_t rows_, num_codes_;
    RowTables rows_by_themselves_;
    std::vector<float> together_;  // [M*K, kRows], or empty
};

}  // namespace vq::cpu
