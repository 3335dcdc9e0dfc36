// The CPU kernels of every instruction set that this processor has, against the host reference in double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/gather_scatter.h"
#include "cpu/isa.h"
#include "half.h"
#include "instruction_sets.h"
#include "vq/reference.h"

namespace {

using vq::GatherScatterShape;
using vq::Type;
using vq::cpu::GatherScatter;
using vq::cpu::Isa;

constexpr size_t kGuard = 64;  // bytes behind the logits that no kernel may touch
constexpr uint8_t kPoison = 0xa5;

// Parts on threads of their own, in reverse, so that a part that leans on another shows.
void Threads(int64_t count, const std::function<void(int64_t)>& body) {
    std::vector<std::thread> threads;
    for (int64_t i = count; i-- > 0;) threads.emplace_back([&body, i] { body(i); });
    for (auto& thread : threads) thread.join();
}

struct Problem {
    GatherScatterShape shape;
    std::vector<int32_t> codes;
    std::vector<float> scores, bias;  // already rounded to T

    Problem(const GatherScatterShape& sizes, bool with_bias, Type type, uint32_t seed) : shape(sizes) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.0f, 3.0f);
        std::uniform_int_distribution<int32_t> id(0, static_cast<int32_t>(shape.num_codes) - 1);
        codes.resize(static_cast<size_t>(shape.vocab_size * shape.num_codebooks));
        for (auto& code : codes) code = id(random);
        codes.back() = static_cast<int32_t>(shape.num_codes) - 1;
        scores.resize(static_cast<size_t>(shape.rows * shape.num_codebooks * shape.num_codes));
        for (auto& score : scores) score = half::Rounded(normal(random), type);
        if (with_bias) bias.resize(static_cast<size_t>(shape.vocab_size));
        for (auto& value : bias) value = half::Rounded(normal(random), type);
    }

    // What may be lost: M roundings of float32 relative to what is summed; in fixed point (isa.h) 1.25 steps of 24 bits
    // of the widest span a codebook, and three roundings of what is summed at the end. Then one rounding of T.
    void Compare(const std::vector<float>& logits, Type type, Isa isa) const {
        const std::vector<double> wide(scores.begin(), scores.end()), wide_bias(bias.begin(), bias.end());
        std::vector<double> absolute(wide), absolute_bias(wide_bias), expected(logits.size()), weight(logits.size());
        for (auto& x : absolute) x = std::abs(x);
        for (auto& x : absolute_bias) x = std::abs(x);
        vq::GatherScatterReference(wide.data(), codes.data(), bias.empty() ? nullptr : wide_bias.data(),
                                   expected.data(), shape);
        vq::GatherScatterReference(absolute.data(), codes.data(), bias.empty() ? nullptr : absolute_bias.data(),
                                   weight.data(), shape);
        std::vector<std::pair<double, double>> spans;
        for (int64_t r = 0; r < shape.rows; ++r) spans.push_back(SpanAndPeak(r));
        for (size_t i = 0; i < logits.size(); ++i) {
            const auto m = static_cast<double>(shape.num_codebooks);
            double sum = m * 0x1p-24 * weight[i];
            if (shape.num_codes <= vq::cpu::KernelsOf(isa).max_fixed_codes) {
                const auto [span, peak] = spans[i / static_cast<size_t>(shape.vocab_size)];
                sum = std::max(sum, 0x1p-24 * (1.25 * m * span + 3.0 * (peak + weight[i])));
            }
            const double bound = sum + half::Rounding(expected[i], type);
            CHECK(std::abs(logits[i] - expected[i]) <= bound,
                  << vq::cpu::IsaName(isa) << " M=" << shape.num_codebooks << " K=" << shape.num_codes
                  << " V=" << shape.vocab_size << " rows=" << shape.rows << " type=" << static_cast<int>(type) << " at "
                  << i << ": " << logits[i] << ", expected " << expected[i] << " within " << bound);
        }
    }

    void Run(Isa isa, Type type, int64_t parts) const {
        const auto size = static_cast<size_t>(vq::SizeOf(type));
        std::vector<uint8_t> in(scores.size() * size);
        half::Store(scores, type, in.data());
        const size_t bytes = static_cast<size_t>(shape.rows * shape.vocab_size) * size;
        std::vector<uint8_t> out(bytes + kGuard, kPoison);
        GatherScatter(codes.data(), bias.empty() ? nullptr : bias.data(), shape.vocab_size, shape.num_codebooks, isa)
            .Run(in.data(), out.data(), shape.rows, shape.num_codes, type, Threads, parts);
        for (size_t i = bytes; i < out.size(); ++i) CHECK(out[i] == kPoison, << "written behind the logits");
        Compare(half::Load(out.data(), bytes / size, type), type, isa);
    }

    // Of a row: the widest codebook's largest score minus smallest; the sum of the codebooks' largest absolute scores.
    std::pair<double, double> SpanAndPeak(int64_t row) const {
        double widest = 0.0, peak = 0.0;
        for (int64_t m = 0; m < shape.num_codebooks; ++m) {
            const auto* first = scores.data() + (row * shape.num_codebooks + m) * shape.num_codes;
            const auto [low, high] = std::minmax_element(first, first + shape.num_codes);
            widest = std::max(widest, static_cast<double>(*high) - static_cast<double>(*low));
            peak += std::max(std::abs(*low), std::abs(*high));
        }
        return {widest, peak};
    }
};

void Sweep() {
    uint32_t seed = 1;
    for (const Isa isa : InstructionSets()) {
        std::printf("  %s\n", vq::cpu::IsaName(isa));
        for (const int64_t m : {1, 2, 3, 8, 17}) {
            for (const int64_t k : {1, 13, 256, 257, 1024}) {
                for (const int64_t v : {1, 31, 511, 512, 513, 1531}) {
                    for (const int64_t rows : {0, 1, 3, 4, 9, 17}) {
                        const auto type = static_cast<Type>(seed % 3);
                        const GatherScatterShape shape{rows, m, k, v};
                        Problem(shape, seed % 2 == 0, type, seed).Run(isa, type, 1 + seed % 5);
                        ++seed;
                    }
                }
            }
        }
        // One to sixteen shuffles a look-up in fixed point, full and not.
        for (const int64_t k : {3, 16, 17, 33, 64, 65, 100}) {
            for (const int64_t m : {8, 21}) {
                for (const int64_t rows : {1, 4}) {
                    const auto type = static_cast<Type>(seed % 3);
                    Problem({rows, m, k, 1531}, seed / 2 % 2 == 0, type, seed).Run(isa, type, 1 + seed % 5);
                    ++seed;
                }
            }
        }
        // More rows than a tile, more look-ups than a part, the largest K.
        Problem({257, 1, 4096, 1009}, true, Type::kFloat32, 1).Run(isa, Type::kFloat32, 4);
        Problem({1, 64, 256, 50257}, true, Type::kBFloat16, 2).Run(isa, Type::kBFloat16, 3);
        Problem({9, 256, 256, 1025}, true, Type::kFloat32, 4).Run(isa, Type::kFloat32, 2);
        Problem({1, 257, 256, 777}, true, Type::kFloat32, 5).Run(isa, Type::kFloat32, 1);
        Problem({2, 1, 65536, 70001}, false, Type::kFloat16, 3).Run(isa, Type::kFloat16, 2);
    }
}

// Special values travel as IEEE 754 sums do.
void SpecialValues() {
    const float inf = std::numeric_limits<float>::infinity();
    const std::vector<int32_t> codes{0, 0, 1, 0, 2, 1, 0, 1};            // [V=4, M=2]
    const std::vector<float> scores{1.0f, -inf, inf, -inf, 0.5f, 0.0f};  // [M=2, K=3]
    for (const Isa isa : InstructionSets()) {
        std::vector<float> logits(4);
        GatherScatter(codes.data(), nullptr, 4, 2, isa)
            .Run(scores.data(), logits.data(), 1, 3, Type::kFloat32, vq::cpu::Serial, 1);
        CHECK(logits[0] == -inf && logits[1] == -inf && logits[2] == inf && logits[3] == 1.5f,
              << vq::cpu::IsaName(isa));
    }
}

// Rows that fixed point would spoil: one codebook far wider than the others, the widest floats, all scores equal, NaN.
void FixedPointLimits() {
    for (const Isa isa : InstructionSets()) {
        Problem wide({2, 16, 200, 999}, false, Type::kFloat32, 21);
        for (size_t k = 0; k < 200; ++k) wide.scores[k] *= 1e5f;
        wide.Run(isa, Type::kFloat32, 1);

        Problem large({1, 8, 256, 600}, false, Type::kFloat32, 22);
        for (auto& score : large.scores) score *= 1e35f;
        large.Run(isa, Type::kFloat32, 1);

        Problem small({1, 8, 256, 600}, false, Type::kFloat32, 23);
        for (auto& score : small.scores) score = half::Rounded(score * 1e-40, Type::kFloat32);
        small.Run(isa, Type::kFloat32, 1);

        Problem equal({1, 8, 256, 600}, true, Type::kFloat32, 24);
        for (auto& score : equal.scores) score = 2.5f;
        equal.Run(isa, Type::kFloat32, 1);

        Problem nan({1, 8, 256, 600}, false, Type::kFloat32, 25);
        nan.scores[static_cast<size_t>(nan.codes[0])] = std::numeric_limits<float>::quiet_NaN();
        std::vector<float> logits(600);
        GatherScatter(nan.codes.data(), nullptr, 600, 8, isa)
            .Run(nan.scores.data(), logits.data(), 1, 256, Type::kFloat32, vq::cpu::Serial, 1);
        CHECK(std::isnan(logits[0]) && !std::isnan(logits[599]), << vq::cpu::IsaName(isa));
    }
}

// Every bfloat16 and every float16 survives the way through float32 and back.
void EveryHalf() {
    std::vector<uint16_t> all(65536);
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
    std::vector<int32_t> codes(65536);
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int32_t>(i);
    for (const Isa isa : InstructionSets()) {
        for (const Type type : {Type::kFloat16, Type::kBFloat16}) {
            std::vector<uint16_t> out(65536);
            GatherScatter(codes.data(), nullptr, 65536, 1, isa)
                .Run(all.data(), out.data(), 1, 65536, type, vq::cpu::Serial, 1);
            const uint32_t infinity = type == Type::kFloat16 ? 0x7c00 : 0x7f80;
            for (uint32_t i = 0; i < 65536; ++i) {
                const bool nan = (i & 0x7fff) > infinity, found_nan = (out[i] & 0x7fffu) > infinity;
                const bool zero = (i & 0x7fff) == 0 && (out[i] & 0x7fff) == 0;  // a sum may lose the sign of zero
                CHECK(nan ? found_nan : zero || out[i] == i,
                      << vq::cpu::IsaName(isa) << " " << i << " became " << out[i]);
            }
        }
    }
}

// One object, many threads at once.
void SharedByThreads() {
    const Problem problem({1, 3, 256, 4999}, true, Type::kFloat32, 9);
    const GatherScatter kernel(problem.codes.data(), problem.bias.data(), 4999, 3);
    std::vector<std::vector<float>> outs(8, std::vector<float>(4999));
    std::vector<std::thread> threads;
    for (auto& out : outs) {
        threads.emplace_back(
            [&] { kernel.Run(problem.scores.data(), out.data(), 1, 256, Type::kFloat32, vq::cpu::Serial, 1); });
    }
    for (auto& thread : threads) thread.join();
    for (const auto& out : outs) problem.Compare(out, Type::kFloat32, vq::cpu::BestIsa());
}

void Refusals() {
    const int32_t codes[]{0, 5, -1, 2};
    CHECK(vq::CheckCodes(codes, {1, 2, 6, 1}).empty());
    CHECK(vq::CheckCodes(codes, {1, 2, 5, 1}) == "codes[0, 1] is 5, expected 0 to 4");
    CHECK(vq::CheckCodes(codes, {1, 2, 6, 2}) == "codes[1, 0] is -1, expected 0 to 5");
    CHECK(vq::CheckShape({0, 1, 1, 1}).empty());
    CHECK(!vq::CheckShape({-1, 1, 1, 1}).empty());
    CHECK(!vq::CheckShape({1, 0, 1, 1}).empty());
    CHECK(!vq::CheckShape({1, 1, 0, 1}).empty());
    CHECK(!vq::CheckShape({1, 1, 65537, 1}).empty());
    CHECK(!vq::CheckShape({1, 1, 1, 0}).empty());
    CHECK(!vq::CheckShape({1, 1 << 20, 1, int64_t{1} << 40}).empty());
}

}  // namespace

int main() {
    Sweep();
    SpecialValues();
    FixedPointLimits();
    EveryHalf();
    SharedByThreads();
    Refusals();
    return check::Done("cpu kernels");
}
