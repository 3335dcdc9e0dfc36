// Sizes of the op, their validation, and packed code ids. Host only, no CUDA, no framework.
#pragma once

#include <cstdint>
#include <string>

namespace vq {

enum class Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline constexpr int64_t SizeOf(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// Sizes of one VQGatherScatter: code_logits T [rows, M*K], codes [V, M], bias T [V], logits T [rows, V].
struct GatherScatterShape {
    int64_t rows = 0;
    int64_t num_codebooks = 0;  // M
    int64_t num_codes = 0;      // K
    int64_t vocab_size = 0;     // V
};

// Width in bits of a packed code id: 8 up to 256 codes, 16 up to 65,536, else 0 (cannot be packed).
inline constexpr int32_t CodeBits(int64_t num_codes) {
    return num_codes <= (int64_t{1} << 8) ? 8 : num_codes <= (int64_t{1} << 16) ? 16 : 0;
}

// Packed code ids: codebook by codebook, each codebook's V ids of `code_bits` bits in a row of 32-bit words, little
// endian, padded with zeros to a multiple of 16 bytes. Neighbouring tokens lie together, so that neighbouring threads
// read neighbouring bytes, and every codebook starts where a 16-byte load may. forms.py packs the same way.
inline constexpr int64_t WordsPerCodebook(int64_t vocab_size, int32_t code_bits) {
    return (vocab_size * code_bits + 127) / 128 * 4;
}

// Refuses sizes that cannot be a head. Empty string: fine; else one sentence with what was found and expected.
std::string CheckShape(const GatherScatterShape& shape);

// Refuses code ids outside [0, K). codes [V, M] row by row.
std::string CheckCodes(const int32_t* codes, const GatherScatterShape& shape);

// Refuses a temperature of VQSample that is not above 0 and finite.
std::string CheckTemperature(float temperature);

// codes [V, M] row by row -> words [M, WordsPerCodebook]. code_bits 8 or 16; ids are trusted (CheckCodes).
void PackCodes(const int32_t* codes, int64_t vocab_size, int64_t num_codebooks, int32_t code_bits, uint32_t* words);

}  // namespace vq
