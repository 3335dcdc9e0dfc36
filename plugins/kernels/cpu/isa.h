// What one instruction set provides. Every instruction set is a translation unit of its own, compiled with its own
// flags; those files use no inline function of any library, which the linker could keep for processors that lack the
// flags.
#pragma once

#include <cstdint>

#include "vq/shape.h"

namespace vq::cpu {

// Tokens taken together: their sums (2 KiB a row) stay in the first cache while the codebooks pass by.
inline constexpr int64_t kBlock = 512;

// Rows taken together where it pays: one look-up then serves eight rows.
inline constexpr int64_t kRows = 8;

// Tokens whose ids lie together, codebook by codebook: as many as one vector of 8-bit ids holds. Passing over a block
// reads eight streams at once; from cold caches one stream, a block's ids of each codebook together, came a tenth
// later.
inline constexpr int64_t kGroup = 64;

// The constants of kBlock tokens, padded with code 0 behind the last.
struct Block {
    const void* codes;  // uint8 or uint16 [kBlock / kGroup, M, kGroup]
    const float* bias;  // [kBlock], or null
    int64_t num_codebooks;
    int64_t num_codes;
    int32_t code_bits;  // 8 or 16
};

// Entries of a table in fixed point, and the K up to which it serves.
inline constexpr int64_t kTable = 256;

// Codebooks that fixed point serves: fewer are quick enough without, more could overflow its sums.
inline constexpr int64_t kMinFixedCodebooks = 8;
inline constexpr int64_t kMaxFixedCodebooks = 256;

// A row's tables in fixed point, for instruction sets that look bytes up (avx2_scan.cpp, avx512_vbmi.cpp).
struct FixedPoint {
    static constexpr int64_t kPlanes = 4;

    uint8_t* planes;    // [kPlanes, M, kTable], the lowest bytes first, as the instruction set looks them up
    int64_t num_codes;  // K
    int64_t num_wide;
    int16_t wide[kMaxFixedCodebooks];  // the codebooks that use the fourth plane, num_wide of them
    int32_t middle;                    // in steps: taken off the sums of the upper planes, so that float32 holds them
    float unit;                        // of the lowest plane
    float step;                        // of the third plane: 2^16 units
    float offset;                      // what the integers 0 and the middle stand for

    // What the two lower planes add to a token's sum, in logits: its mean over the tokens; its standard deviation, as
    // if codebooks were independent; that of the mean over very many tokens, each with its share of the softmax (these
    // are not like all tokens: high scores have more of it); and how far from their mean they are at most.
    float rest, deviation, common_deviation, error;
};

// What top-k, normaliser and sampling are made of.
struct Decode {
    // out = a + b, each [count]; out may be either.
    void (*add)(const float* a, const float* b, int64_t count, float* out);
    // most = the larger of most and x, each [count]; NaN in x is passed over.
    void (*raise)(const float* x, int64_t count, float* most);
    // The largest of x [count], NaN passed over; -infinity where there is none.
    float (*largest)(const float* x, int64_t count);
    // x [count] becomes exp((x - peak) * scale), where (x - peak) * scale is 0 at most; returns the sum. Every number
    // is off by less than 2^-22 of it, and by what rounding its exponent to float32 does; below 2^-126 it is 0. NaN
    // stays.
    float (*exponentials)(float* x, int64_t count, float peak, float scale);
    // The places of x [count] that hold `least` or more, rising; returns how many. picks [count]. NaN is no pick.
    int64_t (*select)(const float* x, int64_t count, float least, int32_t* picks);
};

struct Kernels {
    // tables [M, K] of one row -> sums [kBlock], bias included.
    void (*one_row)(const float* tables, const Block& block, float* sums);
    // tables [M, K, kRows] -> sums [kRows, kBlock], bias included.
    void (*eight_rows)(const float* tables, const Block& block, float* sums);
    // rows [kRows, count], `stride` apart -> out [count, kRows].
    void (*interleave)(const float* rows, int64_t stride, int64_t count, float* out);
    // count numbers of a half type to float32, and back, rounded to nearest even.
    void (*widen)(const void* in, Type type, int64_t count, float* out);
    void (*narrow)(const float* in, Type type, int64_t count, void* out);
    Decode decode;

    // What follows is in fixed point; null, and 0 here, where the instruction set has nothing of the kind. The largest
    // K, at most 256, for which one_row_fixed is quicker than one_row; for which scan is; and for which scan, row by
    // row, is quicker than eight_rows where these serve (row_tables.h).
    int64_t max_fixed_codes = 0;
    int64_t max_scan_codes = 0;
    int64_t max_scan_codes_of_many = 0;
    // tables [M, K] of one row, K at most kTable, and the shares of PackedCodes -> fixed point; planes are given, the
    // rest is set. Returns false for a row that must stay in float32: infinities or NaN. A look-up is then off by half
    // a unit at most, which is 2^-25 of a span that no more than a tenth of the codebooks, rounded up, exceed.
    bool (*to_fixed_point)(const float* tables, const float* shares, int64_t num_codebooks, int64_t num_codes,
                           FixedPoint* fixed) = nullptr;
    // 8-bit ids -> sums [kBlock], bias included.
    void (*one_row_fixed)(const FixedPoint& fixed, const Block& block, float* sums) = nullptr;
    // The same from the upper planes alone and the mean of the others, in a third of the time: off by fixed.error and
    // the roundings of float32 at most.
    void (*scan)(const FixedPoint& fixed, const Block& block, float* sums) = nullptr;
    // The sum of exp(x - peak) over x [count], count a multiple of 16 and x - peak at most 1; off by 2^-16 of it at
    // most; what is below 2^-126 may be 0. NaN weighs nothing.
    float (*weigh)(const float* x, int64_t count, float peak) = nullptr;
};

const Kernels& PortableKernels();
const Kernels& NeonKernels();
const Kernels& Avx2Kernels();
const Kernels& Avx512Kernels();
const Kernels& Avx512VbmiKernels();

}  // namespace vq::cpu
