// AVX-512 VBMI (Ice Lake, Zen 4 and later): product heads in fixed point, 256 look-ups of a byte in a few instructions.
//
// A row's scores become integers of one unit, cut into planes of bytes. Sixty-four tokens are looked up at once, plane
// by plane, and the sums are exact integers: M is at most 256, so that a plane's sum fits 16 bits. Most codebooks fit
// three planes; the few whose scores span far more than the others' (after a rotation some always do) have a fourth
// one, so that they do not coarsen the unit of all.
#include <immintrin.h>

#include "cpu/isa.h"

namespace vq::cpu {
namespace {

constexpr int64_t kTable = 256;                   // entries of a plane's table
constexpr int64_t kGroups = kBlock / kGroup;      // vectors of ids a block
constexpr int64_t kSums = 2 * kGroups;            // vectors of 16-bit sums a plane: even and odd tokens of each group
constexpr float kLargest = 16777215.0f - 255.0f;  // of three planes; a little less than 2^24 leaves room for rounding
constexpr int64_t kWideShare = 6;                 // at most M / kWideShare codebooks have the fourth plane
constexpr float kWidest = 250.0f;                 // how much wider than the unit's codebooks the fourth plane reaches

struct Range {
    float low, high;
};

__mmask16 Inside(int64_t left) { return static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1); }

Range RangeOf(const float* scores, int64_t count) {
    __m512 low = _mm512_set1_ps(__builtin_inff()), high = _mm512_set1_ps(-__builtin_inff());
    for (int64_t k = 0; k < count; k += 16) {
        const __mmask16 inside = Inside(count - k);
        const __m512 part = _mm512_maskz_loadu_ps(inside, scores + k);
        // With the running value second, a NaN in the scores is passed on only once; so it is looked for.
        if (_mm512_mask_cmp_ps_mask(inside, part, part, _CMP_UNORD_Q) != 0) return {0.0f, __builtin_inff()};
        low = _mm512_mask_min_ps(low, inside, part, low);
        high = _mm512_mask_max_ps(high, inside, part, high);
    }
    return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)};
}

// The span that three planes cover: the smallest of a falling series that leaves few enough codebooks above it.
float CoveredSpan(const float* spans, int64_t count) {
    float widest = 0.0f;
    for (int64_t m = 0; m < count; ++m) widest = spans[m] > widest ? spans[m] : widest;
    float covered = widest;
    for (float next = widest; next * kWidest > widest; next *= 0.875f) {
        int64_t above = 0;
        for (int64_t m = 0; m < count; ++m) above += spans[m] > next;
        if (above > count / kWideShare) break;
        covered = next;
    }
    return covered;
}

// What the lower bytes of a codebook's integers are, summed over its K codes.
struct LowerBytes {
    double both, upper, squares;  // of two bytes, of the upper one in units of 256, of two bytes squared
};

// scores [K] -> planes: round((score - low) / unit), byte by byte; plane p of a codebook stands p * stride further on.
LowerBytes CutPlanes(const float* scores, int64_t count, float low, float per_unit, int64_t planes, int64_t stride,
                     uint8_t* out) {
    __m512 both = _mm512_setzero_ps(), upper = both, squares = both;
    for (int64_t k = 0; k < count; k += 16) {
        const __mmask16 inside = Inside(count - k);
        const __m512 above =
            _mm512_maskz_sub_ps(inside, _mm512_maskz_loadu_ps(inside, scores + k), _mm512_set1_ps(low));
        __m512i whole = _mm512_cvtps_epu32(_mm512_mul_ps(above, _mm512_set1_ps(per_unit)));
        const __m512 rest = _mm512_cvtepi32_ps(_mm512_and_si512(whole, _mm512_set1_epi32(0xffff)));
        both = _mm512_add_ps(both, rest);
        squares = _mm512_fmadd_ps(rest, rest, squares);
        upper = _mm512_add_ps(
            upper, _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(whole, 8), _mm512_set1_epi32(0xff))));
        for (int64_t p = 0; p < planes; ++p) {
            _mm512_mask_cvtepi32_storeu_epi8(out + p * stride + k, inside, whole);
            whole = _mm512_srli_epi32(whole, 8);
        }
    }
    return {_mm512_reduce_add_ps(both), _mm512_reduce_add_ps(upper), _mm512_reduce_add_ps(squares)};
}

bool ToFixedPoint(const float* tables, int64_t num_codebooks, int64_t num_codes, FixedPoint* fixed) {
    float lows[kMaxFixedCodebooks], spans[kMaxFixedCodebooks];
    double lowest = 0.0, all = 0.0;
    for (int64_t m = 0; m < num_codebooks; ++m) {
        const Range range = RangeOf(tables + m * num_codes, num_codes);
        lows[m] = range.low;
        spans[m] = range.high - range.low;
        if (!(spans[m] < __builtin_inff())) return false;
        lowest += range.low;
        all += spans[m];
    }
    const float covered = CoveredSpan(spans, num_codebooks);
    // Without any span all integers are 0, whatever the unit.
    const float per_unit = kLargest / (covered > 0.0f ? covered : 0x1p-40f);
    if (!(per_unit < __builtin_inff())) return false;
    fixed->num_wide = 0;
    const int64_t stride = num_codebooks * kTable;
    double rest = 0.0, upper = 0.0, variance = 0.0, error = 0.0;
    for (int64_t m = 0; m < num_codebooks; ++m) {
        const bool wide = spans[m] > covered;
        const LowerBytes bytes = CutPlanes(tables + m * num_codes, num_codes, lows[m], per_unit, wide ? 4 : 3, stride,
                                           fixed->planes + m * kTable);
        if (wide) fixed->wide[fixed->num_wide++] = static_cast<int16_t>(m);
        const double mean = bytes.both / static_cast<double>(num_codes);
        rest += mean;
        upper += 256.0 * bytes.upper / static_cast<double>(num_codes);
        variance += bytes.squares / static_cast<double>(num_codes) - mean * mean;
        error += mean > 32768.0 ? mean : 65536.0 - mean;
    }
    const double unit = 1.0 / static_cast<double>(per_unit), step = 65536.0 * unit;
    fixed->unit = static_cast<float>(unit);
    fixed->step = static_cast<float>(step);
    fixed->middle = static_cast<int32_t>(0.5 * all / step);
    fixed->offset = static_cast<float>(lowest + fixed->middle * step);
    fixed->rest = static_cast<float>(rest * unit);
    fixed->upper_rest = static_cast<float>(upper * unit);
    fixed->deviation = static_cast<float>(__builtin_sqrt(variance > 0.0 ? variance : 0.0) * unit);
    fixed->error = static_cast<float>(error * unit);
    return true;
}

struct Table {
    __m512i part[4];

    explicit Table(const uint8_t* entries) {
        for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(entries + 64 * i);
    }

    // Six bits of an id choose within a register, the upper two the register.
    __m512i LookUp(__m512i ids) const {
        const __mmask64 bit7 = _mm512_movepi8_mask(ids), bit6 = _mm512_movepi8_mask(_mm512_add_epi8(ids, ids));
        __m512i lower = _mm512_permutexvar_epi8(ids, part[0]), upper = _mm512_permutexvar_epi8(ids, part[2]);
        lower = _mm512_mask_permutexvar_epi8(lower, bit6, ids, part[1]);
        upper = _mm512_mask_permutexvar_epi8(upper, bit6, ids, part[3]);
        return _mm512_mask_blend_epi8(bit7, lower, upper);
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
            // The next block's ids come from far away, and hardware prefetching starts anew at every page.
            _mm_prefetch(reinterpret_cast<const char*>(codes + kGroups * stride), _MM_HINT_T1);
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

void Refine(const FixedPoint& fixed, int64_t num_codebooks, const uint8_t* const* codes, float* const* sums) {
    const uint8_t* plane = fixed.planes + num_codebooks * kTable;
    __m512i words[kRefined], odds[kRefined];
    for (int64_t i = 0; i < kRefined; ++i) words[i] = odds[i] = _mm512_setzero_si512();
    for (int64_t m = 0; m < num_codebooks; ++m) {
        const Table table(plane + m * kTable);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kRefined; ++i) {
            const __m512i found = table.LookUp(_mm512_loadu_si512(codes[i] + m * kGroup));
            words[i] = _mm512_add_epi16(words[i], found);
            odds[i] = _mm512_add_epi16(odds[i], _mm512_srli_epi16(found, 8));
        }
    }
    const __m512 unit = _mm512_set1_ps(256.0f * fixed.unit), mean = _mm512_set1_ps(fixed.upper_rest);
    for (int64_t i = 0; i < kRefined; ++i) {
        const __m512i evens = _mm512_sub_epi16(words[i], _mm512_slli_epi16(odds[i], 8));
        for (int half = 0; half < 2; ++half) {
            float rest[32];
            Weave(_mm512_fmsub_ps(_mm512_cvtepi32_ps(Half(evens, half)), unit, mean),
                  _mm512_fmsub_ps(_mm512_cvtepi32_ps(Half(odds[i], half)), unit, mean), rest);
            for (int64_t t = 0; t < 32; t += 16) {
                float* out = sums[i] + 32 * half + t;
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(rest + t), _mm512_loadu_ps(out)));
            }
        }
    }
}

// exp(x - peak) for x - peak from -infinity to 1: 2^n 2^f, f at most a half, by six terms of its series, which leave
// out less than 2^-18.
__m512 Exponential(__m512 x, __m512 peak) {
    const __m512 log2e = _mm512_set1_ps(1.44269504f);
    const __m512 power = _mm512_max_ps(_mm512_mul_ps(_mm512_sub_ps(x, peak), log2e), _mm512_set1_ps(-1000.0f));
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(power, whole);
    __m512 sum = _mm512_set1_ps(1.33335581e-3f);  // ln(2)^n / n!
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(9.61812911e-3f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(5.55041087e-2f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(2.40226507e-1f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(6.93147181e-1f));
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

void Weigh(const float* x, int64_t groups, float peak, float* masses, float* squares) {
    const __m512 top = _mm512_set1_ps(peak);
    for (int64_t g = 0; g < groups; ++g) {
        __m512 mass = _mm512_setzero_ps(), square = _mm512_setzero_ps();
        for (int64_t i = 0; i < kGroup; i += 16) {
            const __m512 part = Exponential(_mm512_loadu_ps(x + g * kGroup + i), top);
            mass = _mm512_add_ps(mass, part);
            square = _mm512_fmadd_ps(part, part, square);
        }
        masses[g] = _mm512_reduce_add_ps(mass);
        squares[g] = _mm512_reduce_add_ps(square);
    }
}

}  // namespace

const Kernels& Avx512VbmiKernels() {
    static const Kernels kernels = [] {
        Kernels all = Avx512Kernels();
        all.to_fixed_point = ToFixedPoint;
        all.one_row_fixed = OneRowFixed;
        all.scan = Scan;
        all.refine = Refine;
        all.weigh = Weigh;
        return all;
    }();
    return kernels;
}

}  // namespace vq::cpu
