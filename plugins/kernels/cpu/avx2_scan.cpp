// AVX2: product heads in fixed point (fixed_point.inl), bytes looked up by shuffles.
//
// A shuffle looks the lower four bits of thirty-two ids up in one of the sixteen parts of a table, and gives 0 where
// the top bit of an id is set. So that all of them together give the one entry that is meant:
//
// - Taking 32, 64, 96 off the ids of 0 to 127 sets the top bit of those that are below. The parts hold what is to be
//   added (by exclusive or) to the entry 32 codes before, so that a look-up is the sum of all parts up to its own.
// - Ids of 128 and more have the top bit set, and the taking off is saturated, so that it stays; with the top bit
//   turned over they become the ones that answer, in the upper eight parts.
// - Neighbouring parts are looked up with the same ids, and bit 4 chooses between their sums.
//
// For K = 256 that makes 40 instructions for 32 look-ups, 16 of them shuffles; with K = 16 there is only the shuffle.
#include "cpu/avx2_scan.h"

#include <immintrin.h>

#define VQ_INLINE __attribute__((always_inline)) inline

namespace vq::cpu::avx2 {
namespace {

#include "cpu/fixed_point.inl"

constexpr int64_t kPart = 16;                 // entries of a table that one shuffle looks up
constexpr int64_t kApart = 2 * kPart;         // entries between those that differences are of
constexpr int64_t kHalf = 128;                // entries of a table whose ids have the same top bit
constexpr int64_t kGroups = kBlock / kGroup;  // groups of a block
constexpr int kPartsAtOnce = 8;               // that registers hold

using UnsignedLanes = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));

// The upper 16 bits first: they leave a rest that float32 holds exactly.
inline void Round(const Lanes& x, IntLanes& out) {
    const IntLanes upper = __builtin_convertvector(x * 0x1p-16f, IntLanes);
    // Adding 1.5 * 2^23 rounds to a whole number, which is then in the last bits.
    const Lanes rest = (x - __builtin_convertvector(upper, Lanes) * 0x1p16f) + 0x1.8p23f;
    // Unsigned: the fourth byte is used, and a sum that passes 2^31 must wrap.
    const UnsignedLanes whole = (reinterpret_cast<const UnsignedLanes&>(upper) << 16) +
                                (reinterpret_cast<const UnsignedLanes&>(rest) - 0x4b400000u);
    out = reinterpret_cast<const IntLanes&>(whole);
}

__m256i Load(const void* memory) { return _mm256_loadu_si256(static_cast<const __m256i*>(memory)); }
void Store(void* memory, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(memory), value); }

// table [kTable] -> differences to the entries kApart before, in each half; those before the first K are enough.
void Subtract(uint8_t* table, int64_t num_codes) {
    for (int64_t first = (num_codes - 1) / kApart * kApart; first > 0; first -= kApart) {
        if (first == kHalf) continue;
        Store(table + first, _mm256_xor_si256(Load(table + first), Load(table + first - kApart)));
    }
}

// A group's ids, or what is looked up for them. Not an array, which the compiler would keep in memory.
struct Group {
    __m256i first, second;
};

// At once: left alone, the compiler looks everything up first, keeps it in memory for want of registers, and adds then,
// which takes a fifth more time (K = 256).
VQ_INLINE void AddTo(__m256i& sum, __m256i term) {
    sum = _mm256_xor_si256(sum, term);
    __asm__("" : "+x"(sum));
}

// Look-ups of a group in a table of kParts. Two vectors at a time, so that a part is loaded once for both.
template <int kParts>
VQ_INLINE Group LookUp(const __m256i* part, Group ids) {
    if constexpr (kParts == 1) {
        return {_mm256_shuffle_epi8(part[0], ids.first), _mm256_shuffle_epi8(part[0], ids.second)};
    } else {
        const __m256i apart = _mm256_set1_epi8(kApart), top = _mm256_set1_epi8(-128);
        Group at = ids, even{}, odd{};
#pragma GCC unroll 8
        for (int pair = 0; pair < kParts / 2; ++pair) {
            if (pair == kHalf / kApart) {
                at = {_mm256_xor_si256(ids.first, top), _mm256_xor_si256(ids.second, top)};
            } else if (pair > 0) {
                at = {_mm256_subs_epi8(at.first, apart), _mm256_subs_epi8(at.second, apart)};
            }
            const __m256i lower = part[2 * pair], upper = part[2 * pair + 1];
            AddTo(even.first, _mm256_shuffle_epi8(lower, at.first));
            AddTo(even.second, _mm256_shuffle_epi8(lower, at.second));
            AddTo(odd.first, _mm256_shuffle_epi8(upper, at.first));
            AddTo(odd.second, _mm256_shuffle_epi8(upper, at.second));
        }
        // Bit 4 to the top.
        return {_mm256_blendv_epi8(even.first, odd.first, _mm256_slli_epi16(ids.first, 3)),
                _mm256_blendv_epi8(even.second, odd.second, _mm256_slli_epi16(ids.second, 3))};
    }
}

// A vector's sums: of whole words of look-ups, and of their upper bytes, which are odd tokens. A word's sum less 256
// times its odd token's is the even token's, modulo 2^16.
struct Sums {
    __m256i words, odds;

    VQ_INLINE void Add(__m256i found) {
        words = _mm256_add_epi16(words, found);
        odds = _mm256_add_epi16(odds, _mm256_srli_epi16(found, 8));
    }

    // -> uint16 [32] in the order of tokens.
    void Write(uint16_t* out) const {
        const __m256i evens = _mm256_sub_epi16(words, _mm256_slli_epi16(odds, 8));
        const __m256i lower = _mm256_unpacklo_epi16(evens, odds);  // tokens 0 to 7 and 16 to 23
        const __m256i upper = _mm256_unpackhi_epi16(evens, odds);
        Store(out, _mm256_permute2x128_si256(lower, upper, 0x20));
        Store(out + 16, _mm256_permute2x128_si256(lower, upper, 0x31));
    }
};

// Adds kBooks codebooks from the one at `first` on, of those in `which` (null: of all).
template <int kParts, int kBooks>
void AddBooks(const uint8_t* plane, const Block& block, const int16_t* which, int64_t first, Sums* sums) {
    __m256i part[kBooks][kParts];
    int64_t offsets[kBooks];
    for (int b = 0; b < kBooks; ++b) {
        const int64_t m = which == nullptr ? first + b : which[first + b];
        offsets[b] = m * kGroup;
        for (int p = 0; p < kParts; ++p) {
            const auto* entries = reinterpret_cast<const __m128i*>(plane + m * kTable + p * kPart);
            part[b][p] = _mm256_broadcastsi128_si256(_mm_loadu_si128(entries));
        }
    }
    const int64_t stride = block.num_codebooks * kGroup;
    const auto* ids = static_cast<const uint8_t*>(block.codes);
    for (int64_t g = 0; g < kGroups; ++g, ids += stride) {
        Sums first = sums[2 * g], second = sums[2 * g + 1];
#pragma GCC unroll 8
        for (int b = 0; b < kBooks; ++b) {
            const uint8_t* codes = ids + offsets[b];
            // What comes next lies far away, and hardware prefetching starts anew at every page.
            _mm_prefetch(reinterpret_cast<const char*>(codes + kGroups * stride), _MM_HINT_T1);
            const Group found = LookUp<kParts>(part[b], {Load(codes), Load(codes + 32)});
            first.Add(found.first);
            second.Add(found.second);
        }
        sums[2 * g] = first;
        sums[2 * g + 1] = second;
    }
}

// The sums of a block's plane, uint16 [kBlock]: over all codebooks, or for the last plane those that are wide.
template <int kParts>
void SumPlane(const FixedPoint& fixed, const Block& block, int64_t plane, uint16_t* out) {
    constexpr int kBooks = kParts < kPartsAtOnce ? kPartsAtOnce / kParts : 1;
    const bool last = plane + 1 == FixedPoint::kPlanes;
    const int16_t* which = last ? fixed.wide : nullptr;
    const int64_t count = last ? fixed.num_wide : block.num_codebooks;
    const uint8_t* tables = fixed.planes + plane * block.num_codebooks * kTable;
    Sums sums[2 * kGroups]{};
    int64_t i = 0;
    for (; i + kBooks <= count; i += kBooks) AddBooks<kParts, kBooks>(tables, block, which, i, sums);
    for (; i < count; ++i) AddBooks<kParts, 1>(tables, block, which, i, sums);
    for (int64_t v = 0; v < 2 * kGroups; ++v) sums[v].Write(out + 32 * v);
}

// The kernels for tables of kParts parts.
template <int kParts>
struct InParts {
    static void OneRowFixed(const FixedPoint& fixed, const Block& block, float* out) {
        uint16_t sums[FixedPoint::kPlanes][kBlock];
        for (int64_t p = 0; p < FixedPoint::kPlanes; ++p) SumPlane<kParts>(fixed, block, p, sums[p]);
        for (int64_t t = 0; t < kBlock; ++t) {
            const int32_t steps = sums[2][t] + (sums[3][t] << 8) - fixed.middle, rest = sums[0][t] + (sums[1][t] << 8);
            const float units = static_cast<float>(rest) * fixed.unit + fixed.offset;
            out[t] = static_cast<float>(steps) * fixed.step + units;
        }
        AddBias(block.bias, out);
    }

    static void Scan(const FixedPoint& fixed, const Block& block, float* out) {
        uint16_t upper[kBlock], wide[kBlock];
        SumPlane<kParts>(fixed, block, 2, upper);
        SumPlane<kParts>(fixed, block, 3, wide);
        const float offset = fixed.offset + fixed.rest;
        for (int64_t t = 0; t < kBlock; ++t) {
            const int32_t steps = upper[t] + (wide[t] << 8) - fixed.middle;
            out[t] = static_cast<float>(steps) * fixed.step + offset;
        }
        AddBias(block.bias, out);
    }

    static void AddBias(const float* bias, float* out) {
        if (bias == nullptr) return;
        for (int64_t t = 0; t < kBlock; ++t) out[t] += bias[t];
    }
};

// body(the kernels for tables of num_codes entries).
template <typename Body>
void WithParts(int64_t num_codes, const Body& body) {
    if (num_codes <= kPart) return body(InParts<1>());
    if (num_codes <= 2 * kPart) return body(InParts<2>());
    if (num_codes <= 4 * kPart) return body(InParts<4>());
    if (num_codes <= 8 * kPart) return body(InParts<8>());
    body(InParts<16>());
}

// exp(x - peak) for x - peak from -infinity to 1: 2^n 2^f with n whole, -127 at least, which makes 0.
__m256 Exponential(__m256 x, __m256 peak) {
    const __m256 log2e = _mm256_set1_ps(1.44269504f);
    const __m256 power = _mm256_max_ps(_mm256_mul_ps(_mm256_sub_ps(x, peak), log2e), _mm256_set1_ps(-127.0f));
    const __m256i n = _mm256_cvtps_epi32(power);
    const __m256 f = _mm256_sub_ps(power, _mm256_cvtepi32_ps(n));
    __m256 sum = _mm256_set1_ps(kPowerOfTwo[5]);
    for (int i = 4; i >= 0; --i) sum = _mm256_fmadd_ps(sum, f, _mm256_set1_ps(kPowerOfTwo[i]));
    return _mm256_mul_ps(sum, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)));
}

}  // namespace

// Fixed point whose planes hold the differences that LookUp adds up.
bool ToDifferences(const float* tables, const float* shares, int64_t num_codebooks, int64_t num_codes,
                   FixedPoint* fixed) {
    if (!ToFixedPoint(tables, shares, num_codebooks, num_codes, fixed)) return false;
    uint8_t* wide = fixed->planes + (FixedPoint::kPlanes - 1) * num_codebooks * kTable;
    for (uint8_t* table = fixed->planes; table < wide; table += kTable) Subtract(table, num_codes);
    for (int64_t i = 0; i < fixed->num_wide; ++i) Subtract(wide + fixed->wide[i] * kTable, num_codes);
    return true;
}

void OneRowFixed(const FixedPoint& fixed, const Block& block, float* sums) {
    WithParts(fixed.num_codes, [&](auto kernels) { kernels.OneRowFixed(fixed, block, sums); });
}

void Scan(const FixedPoint& fixed, const Block& block, float* sums) {
    WithParts(fixed.num_codes, [&](auto kernels) { kernels.Scan(fixed, block, sums); });
}

float Weigh(const float* x, int64_t count, float peak) {
    const __m256 top = _mm256_set1_ps(peak);
    __m256 mass[2]{};
    for (int64_t i = 0; i < count; i += 16) {
        for (int half = 0; half < 2; ++half) {
            mass[half] = _mm256_add_ps(mass[half], Exponential(_mm256_loadu_ps(x + i + 8 * half), top));
        }
    }
    return Sum(reinterpret_cast<const Lanes&>(mass));
}

}  // namespace vq::cpu::avx2
