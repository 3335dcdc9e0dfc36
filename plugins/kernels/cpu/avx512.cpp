// AVX-512: gathers of sixteen, and permutes of tables that fit registers.
#include <immintrin.h>

#include "cpu/isa.h"

namespace vq::cpu {
namespace {

#include "cpu/decode.inl"
#include "cpu/generic.inl"

__m512i Load16(const uint8_t* ids) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(ids)));
}
__m256i Load8(const uint8_t* ids) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(ids)));
}
__m256i Load8(const uint16_t* ids) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(ids)));
}

// One codebook: sums = start + look-up. start may be null (zeros) or the sums themselves. Gathers of eight: those of
// sixteen took 23 us where these took 19 (K=512, V=50257, one core of a server of 2023).
template <typename Id>
void Gather(const float* table, const Block& block, int64_t m, const float* start, float* sums) {
    for (int64_t t = 0; t < kBlock; t += 8) {
        const Id* ids = Codes<Id>(block, t / kGroup * kGroup) + m * kGroup + t % kGroup;
        __m256 sum = _mm256_i32gather_ps(table, Load8(ids), 4);
        if (start != nullptr) sum = _mm256_add_ps(sum, _mm256_loadu_ps(start + t));
        _mm256_storeu_ps(sums + t, sum);
    }
}

// 256 floats in sixteen registers, looked up by permutes and blends.
struct Registers {
    __m512 part[16];

    explicit Registers(const float* table) {
        for (int i = 0; i < 16; ++i) part[i] = _mm512_loadu_ps(table + 16 * i);
    }

    __m512 LookUp(__m512i ids) const {
        // A two-register permute takes the low five bits of an id; bits 5 to 7 choose among the eight results.
        const __mmask16 bit5 = _mm512_test_epi32_mask(ids, _mm512_set1_epi32(32));
        const __mmask16 bit6 = _mm512_test_epi32_mask(ids, _mm512_set1_epi32(64));
        const __mmask16 bit7 = _mm512_test_epi32_mask(ids, _mm512_set1_epi32(128));
        __m512 found[8];
        for (int i = 0; i < 8; ++i) found[i] = _mm512_permutex2var_ps(part[2 * i], ids, part[2 * i + 1]);
        for (int i = 0; i < 8; i += 2) found[i] = _mm512_mask_blend_ps(bit5, found[i], found[i + 1]);
        for (int i = 0; i < 8; i += 4) found[i] = _mm512_mask_blend_ps(bit6, found[i], found[i + 2]);
        return _mm512_mask_blend_ps(bit7, found[0], found[4]);
    }
};

// Two codebooks of 256 codes at once: one by permutes, one by gathers. They keep different ports of the core busy:
// 4.3 look-ups a nanosecond together where gathers alone do 2.7 (M=64, V=49152, one core of a server of 2023).
void PermuteAndGather(const float* table, const Block& block, int64_t m, const float* start, float* sums) {
    const Registers registers(table);
    for (int64_t t = 0; t < kBlock; t += 16) {
        const uint8_t* ids = Codes<uint8_t>(block, t / kGroup * kGroup) + m * kGroup + t % kGroup;
        const __m512 gathered = _mm512_i32gather_ps(Load16(ids + kGroup), table + 256, 4);
        __m512 sum = _mm512_add_ps(registers.LookUp(Load16(ids)), gathered);
        if (start != nullptr) sum = _mm512_add_ps(sum, _mm512_loadu_ps(start + t));
        _mm512_storeu_ps(sums + t, sum);
    }
}

void OneRow(const float* tables, const Block& block, float* sums) {
    const float* start = block.bias;
    const int64_t k = block.num_codes;
    int64_t m = 0;
    if (k == 256) {
        for (; m + 2 <= block.num_codebooks; m += 2, start = sums) {
            PermuteAndGather(tables + m * k, block, m, start, sums);
        }
    }
    for (; m < block.num_codebooks; ++m, start = sums) {
        if (block.code_bits == 8) {
            Gather<uint8_t>(tables + m * k, block, m, start, sums);
        } else {
            Gather<uint16_t>(tables + m * k, block, m, start, sums);
        }
    }
}

int64_t SelectPacked(const float* x, int64_t count, float least, int32_t* picks) {
    const __m512 border = _mm512_set1_ps(least);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t found = 0, i = 0;
    for (; i + 64 <= count; i += 64) {
        __mmask16 some[4];
        for (int part = 0; part < 4; ++part) {
            some[part] = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i + 16 * part), border, _CMP_GE_OQ);
        }
        if ((some[0] | some[1] | some[2] | some[3]) == 0) continue;
        for (int part = 0; part < 4; ++part) {
            const __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(i) + 16 * part));
            // All sixteen places: there is room for them, and what is behind the picks is overwritten.
            _mm512_storeu_si512(picks + found, _mm512_maskz_compress_epi32(some[part], ids));
            found += __builtin_popcount(some[part]);
        }
    }
    for (; i < count; ++i) {
        picks[found] = static_cast<int32_t>(i);
        found += x[i] >= least;
    }
    return found;
}

}  // namespace

// Whoever has AVX-512 has AVX2, and its conversions of halves and its fixed point serve here too; but with 256 codes a
// scan is no quicker than OneRow's permutes and gathers (0.21 ns a look-up).
const Kernels& Avx512Kernels() {
    static const Kernels kernels = [] {
        Kernels all = Avx2Kernels();
        all.one_row = OneRow;
        all.eight_rows = EightRows;
        all.interleave = Interleave;
        all.decode = kDecode;
        all.decode.select = SelectPacked;
        all.max_scan_codes = 128;
        return all;
    }();
    return kernels;
}

}  // namespace vq::cpu
