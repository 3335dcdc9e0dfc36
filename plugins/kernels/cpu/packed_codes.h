// A head's code ids and bias, packed block by block in the layout that the kernels like.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace vq::cpu {

// Memory that begins on a cache line: vectors of ids and of tables then never lie across two. Much of it is asked for
// in large pages, of which the processor has to look up fewer.
void* AllocateLines(size_t bytes);
void FreeLines(void* memory, size_t bytes);

template <typename T>
struct OnCacheLines {
    using value_type = T;

    OnCacheLines() = default;
    template <typename U>
    OnCacheLines(const OnCacheLines<U>&) {}
    T* allocate(size_t count) { return static_cast<T*>(AllocateLines(count * sizeof(T))); }
    void deallocate(T* memory, size_t count) { FreeLines(memory, count * sizeof(T)); }
    bool operator==(const OnCacheLines&) const { return true; }
    bool operator!=(const OnCacheLines&) const { return false; }
};
using Bytes = std::vector<uint8_t, OnCacheLines<uint8_t>>;

struct PackedCodes {
    int64_t vocab_size;
    int64_t num_codebooks;
    int32_t code_bits;  // 8 or 16
    int64_t blocks;
    Bytes codes;              // ids [blocks * kBlock / kGroup, M, kGroup] of code_bits
    std::vector<float> bias;  // [blocks * kBlock], or empty
    // Which part of the tokens has a code: [M, kTable] for ids of 8 bits, else empty.
    std::vector<float> shares;
    bool numbers = true;  // no bias is NaN
    Bytes by_token;       // ids of 8 bits again, [V, M], or empty: for kernels that sum single tokens

    // codes int32 [V, M] and bias float32 [V] or null are copied. Ids are trusted to be 0 to 65535 (CheckCodes).
    PackedCodes(const int32_t* codes, const float* bias, int64_t vocab_size, int64_t num_codebooks);

    Block At(int64_t block, int64_t num_codes) const {
        return {codes.data() + block * BlockBytes(), bias.empty() ? nullptr : bias.data() + block * kBlock,
                num_codebooks, num_codes, code_bits};
    }

    // Asks for memory that will be read a few blocks after this one.
    void PrefetchAfter(int64_t block) const;

    void KeepByToken();
    // Asks for a token's ids of `count` codebooks from the one at m on.
    void PrefetchToken(int64_t token, int64_t m, int64_t count) const {
        const uint8_t* ids = by_token.data() + token * num_codebooks + m;
        __builtin_prefetch(ids);
        __builtin_prefetch(ids + count - 1);
    }

private:
    // Of a token's id in `codes`.
    int64_t PlaceOf(int64_t v, int64_t m) const { return (v / kGroup * num_codebooks + m) * kGroup + v % kGroup; }
    int64_t BlockBytes() const { return num_codebooks * kBlock * code_bits / 8; }
};

// How many blocks ahead memory is asked for. After a decode step's backbone nothing of the head is in the caches, and
// the hardware's own prefetching starts anew at every page: the first lines of a page are enough to start it.
inline constexpr int64_t kBlocksAhead = 4;

// Asks for the page that begins in the `step` bytes up to `memory`, if one does.
template <int kWrite>
void PrefetchPage(const void* memory, int64_t step) {
    constexpr int64_t kLinesAhead = 4;
    constexpr uintptr_t kPage = 4096;
    const auto at = reinterpret_cast<uintptr_t>(memory);
    if (at % kPage >= static_cast<uintptr_t>(step)) return;
    const char* page = static_cast<const char*>(memory) - at % kPage;
    for (int64_t i = 0; i < kLinesAhead; ++i) __builtin_prefetch(page + 64 * i, kWrite, 3);
}

}  // namespace vq::cpu
