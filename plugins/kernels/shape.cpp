#include "vq/shape.h"

#include <cstring>
#include <limits>

namespace vq {

std::string CheckShape(const GatherScatterShape& shape) {
    const auto bad = [](const char* name, int64_t found, const std::string& expected) {
        return std::string(name) + " is " + std::to_string(found) + ", expected " + expected;
    };
    if (shape.rows < 0) return bad("the number of rows", shape.rows, "0 or more");
    if (shape.num_codebooks < 1) return bad("num_codebooks", shape.num_codebooks, "1 or more");
    if (shape.num_codes < 1) return bad("num_codes", shape.num_codes, "1 or more");
    if (CodeBits(shape.num_codes) == 0) return bad("num_codes", shape.num_codes, "65536 at most");
    if (shape.vocab_size < 1) return bad("vocab_size", shape.vocab_size, "1 or more");
    // Element counts are int64; what this guards is their product with a few bytes each.
    constexpr int64_t kMax = int64_t{1} << 40;
    if (shape.vocab_size > kMax / shape.num_codebooks) return bad("vocab_size", shape.vocab_size, "far fewer");
    if (shape.rows > kMax / shape.vocab_size) return bad("the number of rows", shape.rows, "far fewer");
    return {};
}

std::string CheckCodes(const int32_t* codes, const GatherScatterShape& shape) {
    for (int64_t v = 0; v < shape.vocab_size; ++v) {
        for (int64_t m = 0; m < shape.num_codebooks; ++m) {
            const int32_t id = codes[v * shape.num_codebooks + m];
            if (id < 0 || id >= shape.num_codes) {
                return "codes[" + std::to_string(v) + ", " + std::to_string(m) + "] is " + std::to_string(id) +
                       ", expected 0 to " + std::to_string(shape.num_codes - 1);
            }
        }
    }
    return {};
}

std::string CheckTemperature(float temperature) {
    if (temperature > 0.0f && temperature <= std::numeric_limits<float>::max()) return {};
    return "temperature is " + std::to_string(temperature) +
           ", expected above 0 and finite (the most likely token is VQTopK's with k = 1)";
}

void PackCodes(const int32_t* codes, int64_t vocab_size, int64_t num_codebooks, int32_t code_bits, uint32_t* words) {
    const int64_t row_words = WordsPerCodebook(vocab_size, code_bits);
    std::memset(words, 0, static_cast<size_t>(num_codebooks * row_words) * sizeof(uint32_t));
    const int64_t per_word = 32 / code_bits;
    for (int64_t m = 0; m < num_codebooks; ++m) {
        for (int64_t v = 0; v < vocab_size; ++v) {
            const auto id = static_cast<uint32_t>(codes[v * num_codebooks + m]);
            words[m * row_words + v / per_word] |= id << (v % per_word * code_bits);
        }
    }
}

}  // namespace vq
