#include "cpu/packed_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vq::cpu {
namespace {

constexpr size_t kLine = 64, kLargePage = size_t{1} << 21;

std::align_val_t AlignmentOf(size_t bytes) { return std::align_val_t{bytes < kLargePage ? kLine : kLargePage}; }

}  // namespace

void* AllocateLines(size_t bytes) {
    void* memory = ::operator new(bytes, AlignmentOf(bytes));
#ifdef __linux__
    // A wish: without large pages it is the same memory.
    if (bytes >= kLargePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

void FreeLines(void* memory, size_t bytes) { ::operator delete(memory, AlignmentOf(bytes)); }

PackedCodes::PackedCodes(const int32_t* ids, const float* biases, int64_t v_count, int64_t m_count)
    : vocab_size(v_count),
      num_codebooks(m_count),
      code_bits(CodeBits(int64_t{*std::max_element(ids, ids + v_count * m_count)} + 1)),
      blocks((v_count + kBlock - 1) / kBlock),
      codes(static_cast<size_t>(blocks * BlockBytes()), 0) {
    for (int64_t v = 0; v < v_count; ++v) {
        for (int64_t m = 0; m < m_count; ++m) {
            const int64_t at = PlaceOf(v, m);
            const int32_t id = ids[v * m_count + m];
            if (code_bits == 8) {
                codes[static_cast<size_t>(at)] = static_cast<uint8_t>(id);
            } else {
                const auto wide = static_cast<uint16_t>(id);
                std::memcpy(codes.data() + at * 2, &wide, sizeof wide);
            }
        }
    }
    if (code_bits == 8) {
        shares.assign(static_cast<size_t>(m_count * kTable), 0.0f);
        const double share = 1.0 / static_cast<double>(v_count);
        std::vector<int32_t> counts(shares.size(), 0);
        for (int64_t i = 0; i < v_count * m_count; ++i) ++counts[static_cast<size_t>(i % m_count * kTable + ids[i])];
        std::transform(counts.begin(), counts.end(), shares.begin(),
                       [&](int32_t count) { return static_cast<float>(share * count); });
    }
    if (biases != nullptr) {
        bias.assign(static_cast<size_t>(blocks * kBlock), 0.0f);
        std::copy(biases, biases + v_count, bias.begin());
        numbers = std::none_of(biases, biases + v_count, [](float x) { return std::isnan(x); });
    }
}

void PackedCodes::KeepByToken() {
    by_token.resize(static_cast<size_t>(vocab_size * num_codebooks));
    for (int64_t i = 0; i < vocab_size * num_codebooks; ++i) {
        by_token[static_cast<size_t>(i)] = codes[static_cast<size_t>(PlaceOf(i / num_codebooks, i % num_codebooks))];
    }
}

void PackedCodes::PrefetchAfter(int64_t block) const {
    if (block + kBlocksAhead >= blocks) return;
    PrefetchPage<0>(codes.data() + (block + kBlocksAhead) * BlockBytes(), BlockBytes());
}

}  // namespace vq::cpu
