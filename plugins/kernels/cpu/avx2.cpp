// AVX2 with FMA and F16C: gathers of eight.
#include <immintrin.h>

#include "cpu/avx2_scan.h"
#include "cpu/isa.h"

namespace vq::cpu {
namespace {

#include "cpu/decode.inl"
#include "cpu/generic.inl"

__m256i Load8(const uint8_t* ids) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(ids)));
}
__m256i Load8(const uint16_t* ids) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(ids)));
}

template <typename Id>
void OneRowOf(const float* tables, const Block& block, float* sums) {
    for (int64_t m = 0; m < block.num_codebooks; ++m) {
        const float* table = tables + m * block.num_codes;
        const float* start = m == 0 ? block.bias : sums;
        for (int64_t t = 0; t < kBlock; t += 8) {
            const Id* ids = Codes<Id>(block, t / kGroup * kGroup) + m * kGroup + t % kGroup;
            __m256 sum = _mm256_i32gather_ps(table, Load8(ids), 4);
            if (start != nullptr) sum = _mm256_add_ps(sum, _mm256_loadu_ps(start + t));
            _mm256_storeu_ps(sums + t, sum);
        }
    }
}

void OneRow(const float* tables, const Block& block, float* sums) {
    if (block.code_bits == 8) return OneRowOf<uint8_t>(tables, block, sums);
    OneRowOf<uint16_t>(tables, block, sums);
}

void WidenAvx2(const void* in, Type type, int64_t count, float* out) {
    if (type == Type::kBFloat16) return Widen(in, type, count, out);
    const auto* halves = static_cast<const uint16_t*>(in);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
    }
    for (; i < count; ++i) out[i] = FloatFromFloat16(halves[i]);
}

void NarrowAvx2(const float* in, Type type, int64_t count, void* out) {
    if (type == Type::kBFloat16) return Narrow(in, type, count, out);
    auto* halves = static_cast<uint16_t*>(out);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    for (; i < count; ++i) halves[i] = Float16FromFloat(in[i]);
}

// How far looking bytes up pays (isa.h). For 32 tokens and up to 16, 32, 64, 128, 256 codes a scan takes 4, 8, 13, 23,
// 43 instructions, three at once, and one_row_fixed three times as many; gathering 32 floats takes 20 cycles where
// gathers are quickest, and 32 and more elsewhere. Nanoseconds a look-up, a ninth of the codebooks wide (M=144, V=8192,
// one core of a server of 2023, whose gathers are of the quickest):
//
//     K                       16     32     64    128    256
//     one_row               0.25   0.26   0.27   0.27   0.28
//     one_row_fixed         0.09   0.13   0.20   0.34   0.63
//     scan                  0.03   0.05   0.07   0.12   0.23
//     eight_rows, a row     0.06   0.06   0.06   0.06   0.09
constexpr int64_t kMaxFixedCodes = 64, kMaxScanCodes = 256, kMaxScanCodesOfMany = 64;

}  // namespace

const Kernels& Avx2Kernels() {
    static constexpr Kernels kKernels{
        OneRow,         EightRows,     Interleave,          WidenAvx2,           NarrowAvx2,        kDecode,
        kMaxFixedCodes, kMaxScanCodes, kMaxScanCodesOfMany, avx2::ToDifferences, avx2::OneRowFixed, avx2::Scan,
        avx2::Weigh};
    return kKernels;
}

}  // namespace vq::cpu
