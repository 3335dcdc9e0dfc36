// AVX-512 VBMI (Ice Lake, Zen 4 and later): product heads in fixed point, 256 look-ups of a byte in two instructions.
//
// A row's scores become 24-bit integers of one step, cut into three planes of bytes. Sixty-four tokens are looked up at
// once, plane by plane, and the sums are exact integers: M is at most 257, so that a plane's sum fits 16 bits.
#include <immintrin.h>

#include "cpu/isa.h"

namespace vq::cpu {
namespace {

constexpr int64_t kPlanes = 3;
constexpr int64_t kTable = 256;         // entries of a plane's table
constexpr uint32_t kMiddle = 1 << 23;   // integers are centred there: 0 to 2^24 - 1
constexpr int64_t kGroup = 64;          // tokens of one vector of ids
constexpr int64_t kSums = 2 * kPlanes;  // vectors of 16-bit sums a group: even and odd tokens of each plane

struct Range {
    float low, high;
};

Range RangeOf(const float* scores, int64_t count) {
    __m512 low = _mm512_set1_ps(__builtin_inff()), high = _mm512_set1_ps(-__builtin_inff());
    for (int64_t k = 0; k < count; k += 16) {
        const auto inside = static_cast<__mmask16>(count - k >= 16 ? 0xffff : (1 << (count - k)) - 1);
        const __m512 part = _mm512_maskz_loadu_ps(inside, scores + k);
        // With the running value second, a NaN in the scores is passed on only once; so it is looked for.
        if (_mm512_mask_cmp_ps_mask(inside, part, part, _CMP_UNORD_Q) != 0) return {0.0f, __builtin_inff()};
        low = _mm512_mask_min_ps(low, inside, part, low);
        high = _mm512_mask_max_ps(high, inside, part, high);
    }
    return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)};
}

// scores [K] -> planes [kPlanes, kTable]: round((score - middle) * per_unit) + kMiddle, byte by byte.
void CutPlanes(const float* scores, int64_t count, float middle, float per_unit, uint8_t* planes) {
    for (int64_t k = 0; k < count; k += 16) {
        const auto inside = static_cast<__mmask16>(count - k >= 16 ? 0xffff : (1 << (count - k)) - 1);
        const __m512 centred = _mm512_sub_ps(_mm512_maskz_loadu_ps(inside, scores + k), _mm512_set1_ps(middle));
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(centred, _mm512_set1_ps(per_unit)));
        whole = _mm512_add_epi32(whole, _mm512_set1_epi32(kMiddle));
        for (int64_t p = 0; p < kPlanes; ++p) {
            _mm512_mask_cvtepi32_storeu_epi8(planes + p * kTable + k, inside, whole);
            whole = _mm512_srli_epi32(whole, 8);
        }
    }
}

bool ToFixedPoint(const float* tables, int64_t num_codebooks, int64_t num_codes, FixedPoint* fixed) {
    float middles[kMaxFixedCodebooks];
    float widest = 0.0f;  // half of the widest codebook's span
    double all = 0.0, offset = 0.0;
    for (int64_t m = 0; m < num_codebooks; ++m) {
        const Range range = RangeOf(tables + m * num_codes, num_codes);
        const float middle = 0.5f * range.low + 0.5f * range.high;
        const float up = range.high - middle, down = middle - range.low, half = up > down ? up : down;
        if (!(half < __builtin_inff())) return false;
        middles[m] = middle;
        offset += middle;
        widest = half > widest ? half : widest;
        all += half;
    }
    // One step serves all codebooks. Where one of them spans far more than the others, their scores would lose digits
    // that float32 keeps.
    if (widest * static_cast<double>(num_codebooks) > 4.0 * all) return false;
    // A few integers short of 2^23 leave room for the roundings of the product.
    const float per_unit = widest > 0.0f ? static_cast<float>(kMiddle - 8) / widest : 1.0f;
    if (!(per_unit < __builtin_inff())) return false;
    for (int64_t m = 0; m < num_codebooks; ++m) {
        CutPlanes(tables + m * num_codes, num_codes, middles[m], per_unit, fixed->planes + m * kPlanes * kTable);
    }
    fixed->step = static_cast<float>(1.0 / static_cast<double>(per_unit));
    fixed->offset = static_cast<float>(offset);
    return true;
}

struct Table {
    __m512i part[4];

    // Seven bits of an id choose within a pair of registers, the eighth between the pairs.
    __m512i LookUp(__m512i ids, __mmask64 upper) const {
        return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(part[0], ids, part[1]),
                                      _mm512_permutex2var_epi8(part[2], ids, part[3]));
    }
};

// The 16-bit sums of a group to float32 logits, bias included.
void Finish(const __m512i* sums, int32_t start, float step, float offset, const float* bias, float* out) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int half = 0; half < 2; ++half) {
        __m512 parity[2];  // even tokens, odd tokens
        for (int odd = 0; odd < 2; ++odd) {
            __m512i total = _mm512_set1_epi32(start);
            for (int64_t p = 0; p < kPlanes; ++p) {
                const __m512i plane = sums[2 * p + odd];
                const __m256i part = half == 0 ? _mm512_castsi512_si256(plane) : _mm512_extracti64x4_epi64(plane, 1);
                total = _mm512_add_epi32(
                    total, _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), static_cast<unsigned int>(8 * p)));
            }
            parity[odd] = _mm512_cvtepi32_ps(total);
        }
        for (int part = 0; part < 2; ++part) {
            const __m512 steps = _mm512_permutex2var_ps(parity[0], part == 0 ? first : second, parity[1]);
            const int64_t t = 32 * half + 16 * part;
            __m512 base = _mm512_set1_ps(offset);
            if (bias != nullptr) base = _mm512_add_ps(base, _mm512_loadu_ps(bias + t));
            _mm512_storeu_ps(out + t, _mm512_fmadd_ps(steps, _mm512_set1_ps(step), base));
        }
    }
}

void OneRowFixed(const FixedPoint& fixed, const Block& block, float* out) {
    constexpr int64_t kGroups = kBlock / kGroup;
    __m512i sums[kGroups * kSums];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    const __m512i low_bytes = _mm512_set1_epi16(255);
    const auto* ids = static_cast<const uint8_t*>(block.codes);
    for (int64_t m = 0; m < block.num_codebooks; ++m) {
        Table tables[kPlanes];
        for (int64_t i = 0; i < kPlanes * 4; ++i) {
            tables[i / 4].part[i % 4] = _mm512_loadu_si512(fixed.planes + m * kPlanes * kTable + i * 64);
        }
        for (int64_t g = 0; g < kGroups; ++g) {
            const __m512i codes = _mm512_loadu_si512(ids + m * kBlock + g * kGroup);
            const __mmask64 upper = _mm512_movepi8_mask(codes);
            __m512i* sum = sums + g * kSums;
#pragma GCC unroll 3
            for (int64_t p = 0; p < kPlanes; ++p) {
                const __m512i found = tables[p].LookUp(codes, upper);
                sum[2 * p] = _mm512_add_epi16(sum[2 * p], _mm512_and_si512(found, low_bytes));
                sum[2 * p + 1] = _mm512_add_epi16(sum[2 * p + 1], _mm512_srli_epi16(found, 8));
            }
        }
    }
    // Every codebook brought kMiddle, which is taken off again, modulo 2^32.
    const auto start = static_cast<int32_t>(0u - static_cast<uint32_t>(block.num_codebooks) * kMiddle);
    for (int64_t g = 0; g < kGroups; ++g) {
        const float* bias = block.bias == nullptr ? nullptr : block.bias + g * kGroup;
        Finish(sums + g * kSums, start, fixed.step, fixed.offset, bias, out + g * kGroup);
    }
}

}  // namespace

const Kernels& Avx512VbmiKernels() {
    static const Kernels kernels = [] {
        Kernels all = Avx512Kernels();
        all.to_fixed_point = ToFixedPoint;
        all.one_row_fixed = OneRowFixed;
        return all;
    }();
    return kernels;
}

}  // namespace vq::cpu
