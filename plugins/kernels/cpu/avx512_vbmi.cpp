// AVX-512 VBMI (Ice Lake, Zen 4 and later): product heads in fixed point, 256 look-ups of a byte in a few instructions.
#include <immintrin.h>

#include "cpu/isa.h"

namespace vq::cpu {
namespace {

#include "cpu/fixed_point.inl"

constexpr int64_t kGroups = kBlock / kGroup;  // vectors of ids a block
constexpr int64_t kSums = 2 * kGroups;        // vectors of 16-bit sums a plane: even and odd tokens of each group

inline void Round(const Lanes& x, IntLanes& out) { _mm512_storeu_si512(&out, _mm512_cvtps_epu32(_mm512_loadu_ps(&x))); }

struct Table {
    __m512i part[4];

    explicit Table(const uint8_t* entries) {
        for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(entries + 64 * i);
    }

    // Seven bits of an id choose within two registers, the top bit the pair.
    __m512i LookUp(__m512i ids) const {
        const __m512i lower = _mm512_permutex2var_epi8(part[0], ids, part[1]);
        const __m512i upper = _mm512_permutex2var_epi8(part[2], ids, part[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(ids), lower, upper);
    }
};

// One plane's sums over `count` codebooks, `which` of them (null: all): kSums vectors, of whole words and of their
// upper bytes, which are odd tokens. A word's sum less 256 times its odd token's is the even token's, modulo 2^16.
void SumPlane(const uint8_t* plane, const Block& block, const int16_t* which, int64_t count, __m512i* sums) {
    __m512i words[kGroups], odds[kGroups];
    for (int64_t g = 0; g < kGroups; ++g) words[g] = odds[g] = _mm512_setzero_si512();
    const auto* ids = static_cast<const uint8_t*>(block.codes);
    const int64_t stride = block.num_codebooks * kGroup;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t m = which == nullptr ? i : which[i];
        const Table table(plane + m * kTable);
        const uint8_t* codes = ids + m * kGroup;
#pragma GCC unroll 8
        for (int64_t g = 0; g < kGroups; ++g, codes += stride) {
            // The next block's ids come from far away, and hardware prefetching starts anew at every page. Eight
            // streams at a time are more than it brings to the first cache.
            _mm_prefetch(reinterpret_cast<const char*>(codes + kGroups * stride), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(codes + 8 * kGroup), _MM_HINT_T0);
            const __m512i found = table.LookUp(_mm512_loadu_si512(codes));
            words[g] = _mm512_add_epi16(words[g], found);
            odds[g] = _mm512_add_epi16(odds[g], _mm512_srli_epi16(found, 8));
        }
    }
    for (int64_t g = 0; g < kGroups; ++g) {
        sums[2 * g] = _mm512_sub_epi16(words[g], _mm512_slli_epi16(odds[g], 8));
        sums[2 * g + 1] = odds[g];
    }
}

__m512i Half(__m512i sums, int half) {
    return _mm512_cvtepu16_epi32(half == 0 ? _mm512_castsi512_si256(sums) : _mm512_extracti64x4_epi64(sums, 1));
}

// Sixteen even and sixteen odd tokens -> thirty-two in order.
void Weave(__m512 even, __m512 odd, float* out) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, first, odd));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, second, odd));
}

// A row's sums over a block in steps, less the middle: the upper one or two planes, exact in float32.
void UpperSums(const FixedPoint& fixed, const Block& block, __m512i* upper, __m512i* wide) {
    const int64_t stride = block.num_codebooks * kTable;
    SumPlane(fixed.planes + 2 * stride, block, nullptr, block.num_codebooks, upper);
    SumPlane(fixed.planes + 3 * stride, block, fixed.wide, fixed.num_wide, wide);
}

__m512 Steps(const FixedPoint& fixed, __m512i upper, __m512i wide, int half) {
    const __m512i steps = _mm512_add_epi32(Half(upper, half), _mm512_slli_epi32(Half(wide, half), 8));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(steps, _mm512_set1_epi32(fixed.middle)));
}

void AddBias(const float* bias, float* out) {
    if (bias == nullptr) return;
    for (int64_t t = 0; t < kBlock; t += 16) {
        _mm512_storeu_ps(out + t, _mm512_add_ps(_mm512_loadu_ps(out + t), _mm512_loadu_ps(bias + t)));
    }
}

void OneRowFixed(const FixedPoint& fixed, const Block& block, float* out) {
    __m512i upper[kSums], wide[kSums], low[2][kSums];
    UpperSums(fixed, block, upper, wide);
    for (int64_t p = 0; p < 2; ++p) {
        SumPlane(fixed.planes + p * block.num_codebooks * kTable, block, nullptr, block.num_codebooks, low[p]);
    }
    const __m512 step = _mm512_set1_ps(fixed.step), unit = _mm512_set1_ps(fixed.unit);
    const __m512 offset = _mm512_set1_ps(fixed.offset);
    for (int64_t g = 0; g < kGroups; ++g) {
        for (int half = 0; half < 2; ++half) {
            __m512 parity[2];
            for (int64_t odd = 0; odd < 2; ++odd) {
                const int64_t i = 2 * g + odd;
                const __m512i rest =
                    _mm512_add_epi32(Half(low[0][i], half), _mm512_slli_epi32(Half(low[1][i], half), 8));
                const __m512 units = _mm512_fmadd_ps(_mm512_cvtepi32_ps(rest), unit, offset);
                parity[odd] = _mm512_fmadd_ps(Steps(fixed, upper[i], wide[i], half), step, units);
            }
            Weave(parity[0], parity[1], out + g * kGroup + 32 * half);
        }
    }
    AddBias(block.bias, out);
}

void Scan(const FixedPoint& fixed, const Block& block, float* out) {
    __m512i upper[kSums], wide[kSums];
    UpperSums(fixed, block, upper, wide);
    const __m512 step = _mm512_set1_ps(fixed.step), offset = _mm512_set1_ps(fixed.offset + fixed.rest);
    for (int64_t g = 0; g < kGroups; ++g) {
        for (int half = 0; half < 2; ++half) {
            const __m512 even = _mm512_fmadd_ps(Steps(fixed, upper[2 * g], wide[2 * g], half), step, offset);
            const __m512 odd = _mm512_fmadd_ps(Steps(fixed, upper[2 * g + 1], wide[2 * g + 1], half), step, offset);
            Weave(even, odd, out + g * kGroup + 32 * half);
        }
    }
    AddBias(block.bias, out);
}

// exp(x - peak) for x - peak from -infinity to 1: 2^n 2^f with n whole. Not shared with AVX2, which lacks vscalefps:
// the common form took a fifth more time.
__m512 Exponential(__m512 x, __m512 peak) {
    const __m512 log2e = _mm512_set1_ps(1.44269504f);
    const __m512 power = _mm512_max_ps(_mm512_mul_ps(_mm512_sub_ps(x, peak), log2e), _mm512_set1_ps(-1000.0f));
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(power, whole);
    __m512 sum = _mm512_set1_ps(kPowerOfTwo[5]);
    for (int n = 4; n >= 0; --n) sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(kPowerOfTwo[n]));
    return _mm512_scalef_ps(sum, whole);
}

float Weigh(const float* x, int64_t count, float peak) {
    const __m512 top = _mm512_set1_ps(peak);
    __m512 mass = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
        mass = _mm512_add_ps(mass, Exponential(_mm512_loadu_ps(x + i), top));
    }
    return _mm512_reduce_add_ps(mass);
}

}  // namespace

const Kernels& Avx512VbmiKernels() {
    static const Kernels kernels = [] {
        Kernels all = Avx512Kernels();
        all.max_fixed_codes = all.max_scan_codes = all.max_scan_codes_of_many = kTable;
        all.to_fixed_point = ToFixedPoint;
        all.one_row_fixed = OneRowFixed;
        all.scan = Scan;
        all.weigh = Weigh;
        return all;
    }();
    return kernels;
}

}  // namespace vq::cpu
