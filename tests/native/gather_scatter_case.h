// One random VQGatherScatter with its oracle, for every test of the CUDA kernels: emulated on the host or on a GPU.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "half.h"
#include "vq/reference.h"
#include "vq/shape.h"

namespace gather_scatter_case {

using vq::GatherScatterShape;
using vq::Type;

inline constexpr size_t kGuard = 64;  // bytes on both sides of the logits that no kernel may touch
inline constexpr unsigned char kPoison = 0xff;

struct Case {
    GatherScatterShape shape;
    Type type;
    int32_t code_bits;
    std::vector<unsigned char> code_logits, bias;  // numbers of T; bias may be empty
    std::vector<uint32_t> words;                   // packed codes
    std::vector<double> expected, magnitude;       // [rows, V]: the sum, and the sum of the terms' absolute values

    Case(const GatherScatterShape& sizes, Type t, int32_t bits, bool with_bias, uint32_t seed)
        : shape(sizes), type(t), code_bits(bits) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.0f, 3.0f);
        const auto numbers = [&](int64_t count) {
            std::vector<float> values(static_cast<size_t>(count));
            for (auto& value : values) value = half::Rounded(normal(random), type);
            return values;
        };
        const auto scores = numbers(shape.rows * shape.num_codebooks * shape.num_codes);
        const auto biases = numbers(with_bias ? shape.vocab_size : 0);
        code_logits = Bytes(scores);
        bias = Bytes(biases);

        std::uniform_int_distribution<int32_t> id(0, static_cast<int32_t>(shape.num_codes) - 1);
        std::vector<int32_t> codes(static_cast<size_t>(shape.vocab_size * shape.num_codebooks));
        for (auto& code : codes) code = id(random);
        codes.front() = codes.back() = static_cast<int32_t>(shape.num_codes) - 1;
        words.resize(static_cast<size_t>(vq::WordsPerCodebook(shape.vocab_size, bits) * shape.num_codebooks));
        vq::PackCodes(codes.data(), shape.vocab_size, shape.num_codebooks, bits, words.data());

        expected = Reference({scores.begin(), scores.end()}, codes, {biases.begin(), biases.end()});
        std::vector<double> wide(scores.begin(), scores.end()), wide_bias(biases.begin(), biases.end());
        for (auto& x : wide) x = std::abs(x);
        for (auto& x : wide_bias) x = std::abs(x);
        magnitude = Reference(wide, codes, wide_bias);
    }

    size_t LogitsBytes() const { return expected.size() * static_cast<size_t>(vq::SizeOf(type)); }

    // A buffer of poison for the logits, with guards; they begin at kGuard + offset.
    std::vector<unsigned char> PoisonedLogits(size_t offset) const {
        return std::vector<unsigned char>(kGuard + offset + LogitsBytes() + kGuard, kPoison);
    }

    // May be lost: a rounding of float32 for each of M + 1 sums, relative to all that is summed, then one of T.
    void Check(const std::vector<unsigned char>& buffer, size_t offset, const std::string& what) const {
        const size_t begin = kGuard + offset, end = begin + LogitsBytes();
        size_t touched = 0;
        for (size_t i = 0; i < buffer.size(); ++i) touched += (i < begin || i >= end) && buffer[i] != kPoison;
        CHECK(touched == 0, << what << ": " << touched << " bytes written outside of the logits");
        const auto logits = half::Load(buffer.data() + begin, expected.size(), type);
        for (size_t i = 0; i < logits.size(); ++i) {
            const double sums = static_cast<double>(shape.num_codebooks + 1) * 0x1p-24 * magnitude[i];
            const double bound = sums + half::Rounding(std::abs(expected[i]) + sums, type);
            CHECK(std::abs(logits[i] - expected[i]) <= bound,
                  << what << " row " << i / static_cast<size_t>(shape.vocab_size) << " token "
                  << i % static_cast<size_t>(shape.vocab_size) << ": " << logits[i] << ", expected " << expected[i]);
        }
    }

private:
    std::vector<unsigned char> Bytes(const std::vector<float>& values) const {
        std::vector<unsigned char> bytes(values.size() * static_cast<size_t>(vq::SizeOf(type)));
        if (!values.empty()) half::Store(values, type, bytes.data());
        return bytes;
    }

    std::vector<double> Reference(const std::vector<double>& scores, const std::vector<int32_t>& codes,
                                  const std::vector<double>& biases) const {
        std::vector<double> logits(static_cast<size_t>(shape.rows * shape.vocab_size));
        vq::GatherScatterReference(scores.data(), codes.data(), biases.empty() ? nullptr : biases.data(), logits.data(),
                                   shape);
        return logits;
    }
};

inline std::string Name(const Case& c) {
    std::ostringstream name;
    name << "M=" << c.shape.num_codebooks << " K=" << c.shape.num_codes << " V=" << c.shape.vocab_size
         << " rows=" << c.shape.rows << " type=" << static_cast<int>(c.type) << " bits=" << c.code_bits
         << (c.bias.empty() ? "" : " bias");
    return name.str();
}

}  // namespace gather_scatter_case
