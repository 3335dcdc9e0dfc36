// Kernels that the compiler vectorises by itself, included by every instruction set's file into its own anonymous
// namespace, so that each gets a copy compiled with its own flags.

using Float8 = float __attribute__((vector_size(32), aligned(4)));  // lowered to what the instruction set has

// Ids [M, kGroup] of the group that token t begins.
template <typename Id>
const Id* Codes(const Block& block, int64_t t) {
    return static_cast<const Id*>(block.codes) + t * block.num_codebooks;
}

// Four codebooks at a time: each pass over the sums costs a load and a store a token.
template <typename Id>
void OneRowByLoads(const float* tables, const Block& block, float* sums) {
    for (int64_t t = 0; t < kBlock; ++t) sums[t] = block.bias == nullptr ? 0.0f : block.bias[t];
    const int64_t k = block.num_codes;
    int64_t m = 0;
    for (; m + 4 <= block.num_codebooks; m += 4) {
        const float* table = tables + m * k;
        for (int64_t t = 0; t < kBlock; t += kGroup) {
            const Id* ids = Codes<Id>(block, t) + m * kGroup;
            for (int64_t i = 0; i < kGroup; ++i) {
                sums[t + i] += (table[ids[i]] + table[k + ids[kGroup + i]]) +
                               (table[2 * k + ids[2 * kGroup + i]] + table[3 * k + ids[3 * kGroup + i]]);
            }
        }
    }
    for (; m < block.num_codebooks; ++m) {
        const float* table = tables + m * k;
        for (int64_t t = 0; t < kBlock; t += kGroup) {
            const Id* ids = Codes<Id>(block, t) + m * kGroup;
            for (int64_t i = 0; i < kGroup; ++i) sums[t + i] += table[ids[i]];
        }
    }
}

[[maybe_unused]] void OneRowByLoads(const float* tables, const Block& block, float* sums) {
    if (block.code_bits == 8) return OneRowByLoads<uint8_t>(tables, block, sums);
    OneRowByLoads<uint16_t>(tables, block, sums);
}

template <typename Id>
void EightRowsOf(const float* tables, const Block& block, float* sums) {
    Float8 rows[kBlock];  // [kBlock, kRows]: a token's eight sums side by side
    for (int64_t t = 0; t < kBlock; ++t) rows[t] = Float8{} + (block.bias == nullptr ? 0.0f : block.bias[t]);
    const auto* entries = reinterpret_cast<const Float8*>(tables);
    const int64_t k = block.num_codes;
    int64_t m = 0;
    for (; m + 2 <= block.num_codebooks; m += 2) {
        const Float8 *table0 = entries + m * k, *table1 = table0 + k;
        for (int64_t t = 0; t < kBlock; t += kGroup) {
            const Id* ids = Codes<Id>(block, t) + m * kGroup;
            for (int64_t i = 0; i < kGroup; ++i) rows[t + i] += table0[ids[i]] + table1[ids[kGroup + i]];
        }
    }
    if (m < block.num_codebooks) {
        for (int64_t t = 0; t < kBlock; t += kGroup) {
            const Id* ids = Codes<Id>(block, t) + m * kGroup;
            for (int64_t i = 0; i < kGroup; ++i) rows[t + i] += entries[m * k + ids[i]];
        }
    }
    for (int64_t t = 0; t < kBlock; ++t) {
        for (int64_t r = 0; r < kRows; ++r) sums[r * kBlock + t] = rows[t][r];
    }
}

void EightRows(const float* tables, const Block& block, float* sums) {
    if (block.code_bits == 8) return EightRowsOf<uint8_t>(tables, block, sums);
    EightRowsOf<uint16_t>(tables, block, sums);
}

void Interleave(const float* rows, int64_t stride, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t r = 0; r < kRows; ++r) out[i * kRows + r] = rows[r * stride + i];
    }
}

float FromBits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t ToBits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

uint16_t BFloat16FromFloat(float value) {
    const uint32_t bits = ToBits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const uint32_t quiet = (bits >> 16) | 0x40u;                            // a NaN stays one
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// Float16 by way of a float32 whose exponent makes the hardware round where float16 does.
uint16_t Float16FromFloat(float value) {
    const uint32_t bits = ToBits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude >= 0x47800000u) {  // 65536 and more, infinities, NaN
        half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal in the last bits
        half = ToBits(FromBits(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return static_cast<uint16_t>(half | sign);
}

float FloatFromFloat16(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, rest = static_cast<uint32_t>(half & 0x7fffu) << 13;
    if (rest >= 0x0f800000u) return FromBits(sign | 0x70000000u | rest);  // infinities and NaN
    const float scaled = FromBits(rest) * 0x1p112f;                       // exact, subnormals too
    return FromBits(sign | ToBits(scaled));
}

void WidenBFloat16(const uint16_t* in, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = FromBits(static_cast<uint32_t>(in[i]) << 16);
}

void NarrowBFloat16(const float* in, int64_t count, uint16_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = BFloat16FromFloat(in[i]);
}

[[maybe_unused]] void Widen(const void* in, Type type, int64_t count, float* out) {
    const auto* halves = static_cast<const uint16_t*>(in);
    if (type == Type::kBFloat16) return WidenBFloat16(halves, count, out);
    for (int64_t i = 0; i < count; ++i) out[i] = FloatFromFloat16(halves[i]);
}

[[maybe_unused]] void Narrow(const float* in, Type type, int64_t count, void* out) {
    auto* halves = static_cast<uint16_t*>(out);
    if (type == Type::kBFloat16) return NarrowBFloat16(in, count, halves);
    for (int64_t i = 0; i < count; ++i) halves[i] = Float16FromFloat(in[i]);
}
