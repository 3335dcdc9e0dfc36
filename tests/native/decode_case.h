// One random head with its VQTopK and VQSample oracles, for every test of the CUDA kernels: emulated on the host or on
// a GPU. What a result may differ by follows from the roundings of float32.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "half.h"
#include "vq/reference.h"
#include "vq/shape.h"

namespace decode_case {

using vq::GatherScatterShape;
using vq::Type;

enum class Bias { kNone, kRandom, kZero, kMasked };

// coarse: numbers are multiples of 1/4 below 16, so sums are exact in float32 and equal values are many: then the ids
// must be the reference's to the last one.
struct Case {
    GatherScatterShape shape;
    Type type;
    int32_t code_bits;
    bool coarse;
    std::vector<float> scores, biases;  // exact in T; biases may be empty
    std::vector<int32_t> codes;         // [V, M]
    std::vector<unsigned char> code_logits, bias;
    std::vector<uint32_t> words;
    double magnitude = 0.0;  // the largest sum of absolute values that a logit can be made of

    Case(const GatherScatterShape& sizes, Type t, Bias kind, bool exact, uint32_t seed)
        : shape(sizes), type(t), code_bits(vq::CodeBits(sizes.num_codes)), coarse(exact) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.0f, 3.0f);
        const auto number = [&] {
            const float drawn = std::min(15.75f, std::max(-15.75f, normal(random)));
            return coarse ? std::nearbyint(drawn * 4.0f) / 4.0f : half::Rounded(drawn, type);
        };
        scores.resize(static_cast<size_t>(shape.rows * shape.num_codebooks * shape.num_codes));
        for (float& x : scores) x = number();
        if (kind != Bias::kNone) biases.resize(static_cast<size_t>(shape.vocab_size));
        for (float& x : biases) x = kind == Bias::kZero ? 0.0f : number();
        if (kind == Bias::kMasked) {  // tokens that must not come: every third
            for (size_t v = 1; v < biases.size(); v += 3) biases[v] = -std::numeric_limits<float>::infinity();
        }
        // Crowded: the square makes low codes frequent, so that buckets are of all sizes and some are empty.
        std::uniform_real_distribution<double> unit(0.0, 1.0);
        codes.resize(static_cast<size_t>(shape.vocab_size * shape.num_codebooks));
        for (int32_t& code : codes) {
            const double u = unit(random);
            code = static_cast<int32_t>(u * u * static_cast<double>(shape.num_codes));
        }
        words.resize(static_cast<size_t>(vq::WordsPerCodebook(shape.vocab_size, code_bits) * shape.num_codebooks));
        vq::PackCodes(codes.data(), shape.vocab_size, shape.num_codebooks, code_bits, words.data());
        code_logits = Bytes(scores);
        bias = Bytes(biases);
        magnitude = 15.75 * static_cast<double>(shape.num_codebooks + 1);
    }

    std::vector<double> Scores() const { return {scores.begin(), scores.end()}; }
    std::vector<double> Biases() const { return {biases.begin(), biases.end()}; }

    std::string Name() const {
        std::ostringstream name;
        name << "M=" << shape.num_codebooks << " K=" << shape.num_codes << " V=" << shape.vocab_size
             << " rows=" << shape.rows << " type=" << static_cast<int>(type) << (biases.empty() ? "" : " bias")
             << (coarse ? " coarse" : "");
        return name.str();
    }

    // A logit may be off by a float32 rounding for each of M + 1 sums.
    double LogitBound() const {
        return coarse ? 0.0 : static_cast<double>(shape.num_codebooks + 1) * 0x1p-24 * magnitude;
    }

    // A sum of V weights, none negative, each off by its logit's error and a few roundings of expf, in float32.
    double ShareBound(double temperature) const {
        const double logit = static_cast<double>(shape.num_codebooks + 2) * 0x1p-24 * magnitude / temperature;
        return 2.0 * logit + 64.0 * 0x1p-24;
    }

    void CheckTopK(int64_t k, const std::vector<float>& values, const std::vector<int64_t>& ids,
                   const std::vector<float>& logsumexp, const std::string& what) const {
        const auto rows = static_cast<size_t>(shape.rows), best = static_cast<size_t>(k);
        std::vector<double> expected(rows * best), normaliser(rows),
            logits(rows * static_cast<size_t>(shape.vocab_size));
        std::vector<int64_t> expected_ids(rows * best);
        const auto s = Scores(), b = Biases();
        vq::TopKReference(s.data(), codes.data(), b.empty() ? nullptr : b.data(), k, expected.data(),
                          expected_ids.data(), normaliser.data(), shape);
        vq::GatherScatterReference(s.data(), codes.data(), b.empty() ? nullptr : b.data(), logits.data(), shape);
        for (size_t r = 0; r < rows; ++r) {
            for (size_t i = r * best; i < (r + 1) * best; ++i) {
                const std::string where =
                    what + " " + Name() + " row " + std::to_string(r) + " rank " + std::to_string(i - r * best) + ": ";
                CHECK(Near(values[i], expected[i], LogitBound()),
                      << where << values[i] << ", expected " << expected[i]);
                const bool in_range = ids[i] >= 0 && ids[i] < shape.vocab_size;
                CHECK(in_range, << where << "token " << ids[i]);
                if (!in_range) continue;
                if (coarse) {
                    CHECK(ids[i] == expected_ids[i],
                          << where << "token " << ids[i] << ", expected " << expected_ids[i]);
                } else {
                    const double logit =
                        logits[r * static_cast<size_t>(shape.vocab_size) + static_cast<size_t>(ids[i])];
                    CHECK(Near(values[i], logit, LogitBound()), << where << values[i] << " is not that of " << ids[i]);
                }
                if (i == r * best) continue;
                CHECK(values[i - 1] > values[i] || (values[i - 1] == values[i] && ids[i - 1] < ids[i]), << where);
            }
            CHECK(Near(logsumexp[r], normaliser[r], Rounding(normaliser[r]) + ShareBound(1.0)),
                  << what << " " << Name() << " row " << r << ": logsumexp " << logsumexp[r] << ", expected "
                  << normaliser[r]);
        }
    }

    // Draws must be the reference's, but for tokens whose stretch ends within the rounding of the sums.
    void CheckSample(double temperature, const std::vector<float>& uniform, const std::vector<int64_t>& ids,
                     const std::vector<float>& logprob, const std::string& what) const {
        const auto rows = static_cast<size_t>(shape.rows), v_count = static_cast<size_t>(shape.vocab_size);
        std::vector<double> u(uniform.begin(), uniform.end()), expected(rows), upper(rows * v_count),
            share(rows * v_count);
        std::vector<int64_t> expected_ids(rows);
        const auto s = Scores(), b = Biases();
        vq::SampleReference(s.data(), codes.data(), b.empty() ? nullptr : b.data(), temperature, u.data(),
                            expected_ids.data(), expected.data(), upper.data(), share.data(), shape);
        const double bound = ShareBound(temperature);
        for (size_t r = 0; r < rows; ++r) {
            std::ostringstream where;
            where << what << " " << Name() << " T=" << temperature << " row " << r << " u=" << u[r] << ": token "
                  << ids[r] << ", expected " << expected_ids[r];
            const bool in_range = ids[r] >= 0 && ids[r] < shape.vocab_size;
            CHECK(in_range, << where.str());
            if (!in_range) continue;
            const size_t v = r * v_count + static_cast<size_t>(ids[r]);
            CHECK(share[v] > 0.0, << where.str() << ", which cannot come");
            CHECK(upper[v] + bound > u[r] && upper[v] - share[v] - bound <= u[r],
                  << where.str() << ", whose stretch is " << upper[v] - share[v] << " to " << upper[v]);
            const double exact = std::log(share[v]);
            CHECK(Near(logprob[r], exact, bound + Rounding(exact) + Rounding(magnitude / temperature)),
                  << where.str() << ", logprob " << logprob[r] << ", exact " << exact);
        }
    }

private:
    static double Rounding(double value) { return half::Rounding(std::abs(value), Type::kFloat32); }

    static bool Near(double found, double expected, double bound) {
        return found == expected || std::abs(found - expected) <= bound;  // equal infinities too
    }

    std::vector<unsigned char> Bytes(const std::vector<float>& values) const {
        std::vector<unsigned char> bytes(values.size() * static_cast<size_t>(vq::SizeOf(type)));
        std::vector<float> finite = values;  // half::Store knows no infinity
        for (float& x : finite) x = std::isinf(x) ? 0.0f : x;
        half::Store(finite, type, bytes.data());
        for (size_t i = 0; i < values.size(); ++i) {
            if (!std::isinf(values[i])) continue;
            const uint32_t bits = type == Type::kFloat16 ? 0xfc00 : type == Type::kBFloat16 ? 0xff80 : 0xff800000;
            std::memcpy(bytes.data() + i * static_cast<size_t>(vq::SizeOf(type)), &bits,
                        static_cast<size_t>(vq::SizeOf(type)));  // little endian
        }
        return bytes;
    }
};

// What a kernel writes into, with poison all around; 64 numbers on both sides that nobody may touch.
template <typename Number>
struct Guarded {
    static constexpr size_t kGuard = 64;
    std::vector<Number> all;

    explicit Guarded(size_t count) : all(count + 2 * kGuard) {
        std::memset(all.data(), 0xff, all.size() * sizeof(Number));
    }

    Number* data() { return all.data() + kGuard; }
    // The numbers, after a look at the guards.
    std::vector<Number> Take(const std::string& what) const {
        size_t touched = 0;
        for (size_t i = 0; i < kGuard * sizeof(Number); ++i) {
            const auto* bytes = reinterpret_cast<const unsigned char*>(all.data());
            touched += bytes[i] != 0xff || bytes[all.size() * sizeof(Number) - 1 - i] != 0xff;
        }
        CHECK(touched == 0, << what << ": " << touched << " bytes written outside");
        return {all.begin() + kGuard, all.end() - kGuard};
    }
};

}  // namespace decode_case
