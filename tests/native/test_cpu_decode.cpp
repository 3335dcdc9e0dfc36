// The CPU kernels of VQTopK and VQSample, on every instruction set that this processor has, against the host
// references.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/candidates.h"
#include "cpu/isa.h"
#include "cpu/sample.h"
#include "cpu/top_k.h"
#include "half.h"
#include "instruction_sets.h"
#include "vq/reference.h"

namespace {

using vq::GatherScatterShape;
using vq::Type;
using vq::cpu::Isa;
using vq::cpu::Sample;
using vq::cpu::TopK;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kPoison = 12345.0f;

// Parts on threads of their own, in reverse, so that a part that leans on another shows.
void Threads(int64_t count, const std::function<void(int64_t)>& body) {
    std::vector<std::thread> threads;
    for (int64_t i = count; i-- > 0;) threads.emplace_back([&body, i] { body(i); });
    for (auto& thread : threads) thread.join();
}

enum class Numbers {
    kNormal,
    kFew,      // whole numbers from -2 to 2: most tokens tie, and every sum is exact
    kRounded,  // 2^22 and more, where float32 counts in halves, plus tenths: rounding makes biases equal
};

struct Problem {
    GatherScatterShape shape;
    Type type;
    std::vector<int32_t> codes;
    std::vector<float> scores, bias;  // exact in T, but for kRounded; bias may be empty

    Problem(const GatherScatterShape& sizes, bool with_bias, Type t, uint32_t seed, Numbers numbers = Numbers::kNormal)
        : shape(sizes), type(t) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.0f, 3.0f);
        std::uniform_int_distribution<int> few(-2, 2), tenths(0, 9);
        const auto number = [&] {
            return numbers == Numbers::kNormal ? half::Rounded(normal(random), type) : static_cast<float>(few(random));
        };
        // Some codes stay unused, but for the last.
        const auto most = std::max<int32_t>(0, static_cast<int32_t>(shape.num_codes * (2 + seed % 3) / 4) - 1);
        std::uniform_int_distribution<int32_t> id(0, most);
        codes.resize(static_cast<size_t>(shape.vocab_size * shape.num_codebooks));
        for (auto& code : codes) code = id(random);
        codes.back() = static_cast<int32_t>(shape.num_codes) - 1;
        scores.resize(static_cast<size_t>(shape.rows * shape.num_codebooks * shape.num_codes));
        for (auto& score : scores) score = number() + (numbers == Numbers::kRounded ? 0x1p22f : 0.0f);
        if (with_bias) bias.resize(static_cast<size_t>(shape.vocab_size));
        for (auto& value : bias) {
            value = numbers == Numbers::kRounded ? 0.1f * static_cast<float>(tenths(random)) : number();
        }
    }

    int64_t Width() const { return shape.num_codebooks * shape.num_codes; }
    const float* Bias() const { return bias.empty() ? nullptr : bias.data(); }

    std::vector<uint8_t> CodeLogits() const {
        std::vector<uint8_t> bytes(scores.size() * static_cast<size_t>(vq::SizeOf(type)));
        half::Store(scores, type, bytes.data());
        return bytes;
    }

    // All V logits in double; of absolute values, what their rounding errors are relative to.
    std::vector<double> Logits(bool absolute) const {
        std::vector<double> wide(scores.begin(), scores.end()), wide_bias(bias.begin(), bias.end());
        if (absolute) {
            for (auto& x : wide) x = std::abs(x);
            for (auto& x : wide_bias) x = std::abs(x);
        }
        std::vector<double> logits(static_cast<size_t>(shape.rows * shape.vocab_size));
        vq::GatherScatterReference(wide.data(), codes.data(), bias.empty() ? nullptr : wide_bias.data(), logits.data(),
                                   shape);
        return logits;
    }

    // How far a float32 sum of a row may be off: M roundings relative to the largest of what is summed; in fixed point
    // 1.25 steps of the widest span a codebook and three roundings (isa.h). The span is twice the largest score at
    // most.
    double SumBound(int64_t row) const {
        const auto m = static_cast<double>(shape.num_codebooks);
        double score = 0.0, extra = 0.0;
        for (int64_t i = row * Width(); i < (row + 1) * Width(); ++i) {
            score = std::max(score, std::abs(static_cast<double>(scores[static_cast<size_t>(i)])));
        }
        for (const float b : bias) extra = std::max(extra, std::abs(static_cast<double>(b)));
        const double most = m * score + extra;
        return 0x1p-24 * (m < 8 ? m * most : 2.5 * m * score + 6.0 * most);
    }

    // How far logsumexp may be off: the sums; with one codebook the mass of a bucket, and its sum with the score; both
    // stages of exponentials (mass.h); the rounding of the result.
    double LogSumExpBound(int64_t row, double exact, double mass) const {
        const double stages = shape.num_codebooks == 1 ? 2.0 : 1.0;
        return SumBound(row) + 0x1p-24 * (stages * (2 * 88 + 64) + 4.0 * (std::abs(exact) + mass));
    }

    // Whether tokens may be left with what eight bits tell of them (fast_scan.h).
    bool MayBeScanned(Isa isa) const {
        return shape.num_codebooks >= vq::cpu::kMinFixedCodebooks &&
               shape.num_codes <= vq::cpu::KernelsOf(isa).max_scan_codes;
    }

    std::string Name(Isa isa) const {
        std::ostringstream name;
        name << vq::cpu::IsaName(isa) << " M=" << shape.num_codebooks << " K=" << shape.num_codes
             << " V=" << shape.vocab_size << " rows=" << shape.rows << " type=" << static_cast<int>(type)
             << (bias.empty() ? "" : " bias");
        return name.str();
    }
};

// ------------------------------------------------------------------------------------------------------------ top-k

struct Found {
    std::vector<float> values, logsumexp;
    std::vector<int64_t> ids;

    Found(const Problem& problem, Isa isa, int64_t k, int64_t threads)
        : values(static_cast<size_t>(problem.shape.rows * k + 1), kPoison),
          logsumexp(static_cast<size_t>(problem.shape.rows + 1), kPoison),
          ids(static_cast<size_t>(problem.shape.rows * k + 1), -7) {
        TopK(problem.codes.data(), problem.Bias(), problem.shape.vocab_size, problem.shape.num_codebooks, isa)
            .Run(problem.CodeLogits().data(), values.data(), ids.data(), logsumexp.data(), problem.shape.rows,
                 problem.shape.num_codes, k, problem.type, Threads, threads);
        CHECK(values.back() == kPoison && logsumexp.back() == kPoison && ids.back() == -7, << "written behind the end");
    }
};

void CheckLogSumExp(const Problem& problem, Isa isa, const Found& found, const std::vector<double>& exact) {
    for (int64_t r = 0; r < problem.shape.rows; ++r) {
        const double wanted = exact[static_cast<size_t>(r)], got = found.logsumexp[static_cast<size_t>(r)];
        const double bound =
            problem.LogSumExpBound(r, wanted, std::log(static_cast<double>(problem.shape.vocab_size))) +
            (problem.MayBeScanned(isa) ? 0x1p-11 : 0.0);  // of the mass, at four standard deviations
        CHECK(std::abs(got - wanted) <= bound, << problem.Name(isa) << " row " << r << ": logsumexp " << got
                                               << ", expected " << wanted << " within " << bound);
    }
}

// Against float32 sums that the test knows bit by bit (M = 1, and whole numbers): ids and values are the same numbers.
void CheckExact(const Problem& problem, Isa isa, int64_t k, int64_t threads) {
    const Found found(problem, isa, k, threads);
    const int64_t v_count = problem.shape.vocab_size;
    std::vector<double> logits = problem.Logits(false), exact;
    for (int64_t r = 0; r < problem.shape.rows; ++r) {
        exact.push_back(vq::LogSumExpReference(logits.data() + r * v_count, v_count));
        std::vector<float> row(logits.begin() + r * v_count, logits.begin() + (r + 1) * v_count);  // rounded once
        std::vector<int64_t> order(row.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return row[static_cast<size_t>(a)] > row[static_cast<size_t>(b)];
        });
        for (int64_t i = 0; i < k; ++i) {
            const auto at = static_cast<size_t>(r * k + i);
            const int64_t id = order[static_cast<size_t>(i)];
            CHECK(found.ids[at] == id && found.values[at] == row[static_cast<size_t>(id)],
                  << problem.Name(isa) << " k=" << k << " row " << r << " place " << i << ": token " << found.ids[at]
                  << " of " << found.values[at] << ", expected " << id << " of " << row[static_cast<size_t>(id)]);
        }
    }
    CheckLogSumExp(problem, isa, found, exact);
}

// Against sums in double: values fall, belong to their tokens, and no token left out is better by more than rounding.
void CheckRounded(const Problem& problem, Isa isa, int64_t k, int64_t threads) {
    const Found found(problem, isa, k, threads);
    const int64_t v_count = problem.shape.vocab_size;
    const std::vector<double> logits = problem.Logits(false), wide(problem.scores.begin(), problem.scores.end()),
                              wide_bias(problem.bias.begin(), problem.bias.end());
    std::vector<double> values(static_cast<size_t>(problem.shape.rows * k)),
        exact(static_cast<size_t>(problem.shape.rows));
    std::vector<int64_t> ids(values.size());
    vq::TopKReference(wide.data(), problem.codes.data(), wide_bias.empty() ? nullptr : wide_bias.data(), k,
                      values.data(), ids.data(), exact.data(), problem.shape);
    for (int64_t r = 0; r < problem.shape.rows; ++r) {
        const double bound = problem.SumBound(r);
        std::set<int64_t> taken;
        for (int64_t i = 0; i < k; ++i) {
            const auto at = static_cast<size_t>(r * k + i);
            const int64_t id = found.ids[at];
            const bool valid = id >= 0 && id < v_count;
            CHECK(valid && taken.insert(id).second, << problem.Name(isa) << " token " << id);
            if (!valid) continue;
            CHECK(std::abs(found.values[at] - logits[static_cast<size_t>(r * v_count + id)]) <= bound,
                  << problem.Name(isa) << " token " << id << ": " << found.values[at]);
            // The i-th largest of numbers that are each off by `bound` is off by no more.
            CHECK(std::abs(found.values[at] - values[at]) <= bound,
                  << problem.Name(isa) << " place " << i << ": " << found.values[at] << ", expected " << values[at]);
            const bool falls = i == 0 || found.values[at - 1] > found.values[at] ||
                               (found.values[at - 1] == found.values[at] && found.ids[at - 1] < id);
            CHECK(falls, << problem.Name(isa) << " place " << i);
        }
    }
    CheckLogSumExp(problem, isa, found, exact);
}

void TopKSweep(Isa isa) {
    uint32_t seed = 1;
    for (const int64_t m : {1, 2, 8, 17}) {
        for (const int64_t k_count : {1, 13, 256, 700}) {
            for (const int64_t v : {1, 31, 512, 513, 1531}) {
                for (const int64_t k : {int64_t{1}, int64_t{50}, int64_t{256}, v}) {
                    if (k > v) continue;
                    for (const int64_t rows : {0, 1, 3, 9}) {
                        const auto type = static_cast<Type>(seed % 3);
                        const GatherScatterShape shape{rows, m, k_count, v};
                        const Problem problem(shape, seed % 2 == 0, type, seed);
                        if (m == 1) {
                            CheckExact(problem, isa, k, 1 + seed % 3);
                        } else {
                            CheckRounded(problem, isa, k, 1 + seed % 3);
                        }
                        if (m < 8) CheckExact({shape, seed % 2 == 0, type, seed, Numbers::kFew}, isa, k, 1 + seed % 3);
                        ++seed;
                    }
                }
            }
        }
    }
}

void TopKLarge(Isa isa) {
    // More rows than a part, more look-ups than a part, the largest K, many codes in few tokens.
    CheckExact({{70, 1, 512, 3001}, true, Type::kFloat16, 1}, isa, 50, 4);
    CheckExact({{2, 1, 65536, 70001}, true, Type::kFloat32, 2}, isa, 256, 2);
    CheckExact({{2, 1, 65536, 70001}, false, Type::kBFloat16, 3, Numbers::kFew}, isa, 256, 2);
    CheckExact({{1, 2, 300, 70001}, true, Type::kFloat32, 4, Numbers::kFew}, isa, 256, 2);
    CheckRounded({{1, 64, 256, 20011}, true, Type::kBFloat16, 5}, isa, 50, 3);
    CheckRounded({{6, 16, 256, 9001}, true, Type::kFloat32, 6}, isa, 50, 2);
}

// Heads that are scanned in eight bits (fast_scan.h), by one to sixteen shuffles a look-up, full and not; one row and
// many; one codebook far wider than the others.
void TopKScanned(Isa isa) {
    uint32_t seed = 1;
    for (const int64_t k_count : {3, 16, 17, 33, 100, 128, 129, 256}) {
        for (const int64_t m : {8, 19}) {
            for (const int64_t rows : {1, 6}) {
                for (const float widening : {1.0f, 30.0f}) {
                    const auto type = static_cast<Type>(seed % 3);
                    Problem problem({rows, m, k_count, 5003}, seed % 5 < 3, type, seed);
                    for (int64_t i = 0; i < rows * m * k_count; ++i) {
                        if (i / k_count % m != 2) continue;
                        float& score = problem.scores[static_cast<size_t>(i)];
                        score = half::Rounded(widening * score, type);
                    }
                    for (const int64_t k : {1, 50, 256}) CheckRounded(problem, isa, k, 1 + seed % 3);
                    ++seed;
                }
            }
        }
    }
}

// Thousands of tokens that weigh about the same, and few codes: what eight bits leave out does not average out.
void TopKOfFlatRows(Isa isa) {
    uint32_t seed = 1;
    for (const int64_t k_count : {3, 16, 17, 64, 256}) {
        for (const int64_t m : {8, 19, 64}) {
            for (const float flattening : {0.03f, 0.1f, 0.3f}) {
                Problem problem({1, m, k_count, 9001}, seed % 2 == 0, Type::kFloat32, seed);
                ++seed;
                for (float& score : problem.scores) score *= flattening;
                for (float& bias : problem.bias) bias *= flattening;
                CheckRounded(problem, isa, 3, 1);
            }
        }
    }
}

// Ties that only rounding makes, at the borders of buckets and inside them; k from one token to all.
void TopKTies(Isa isa) {
    for (uint32_t seed = 1; seed <= 60; ++seed) {
        const int64_t v = 1 + seed * 17 % 200, k_count = std::vector<int64_t>{1, 2, 5, 40}[seed % 4];
        const Problem problem({2, 1, k_count, v}, true, Type::kFloat32, seed, Numbers::kRounded);
        for (const int64_t k : {int64_t{1}, int64_t{5}, (v + 1) / 2, v}) {
            if (k <= v) CheckExact(problem, isa, k, 1);
        }
    }
    // All tokens equal.
    for (const int64_t m : {1, 2, 8}) {
        Problem equal({2, m, 64, 5000}, false, Type::kFloat32, 3);
        for (auto& score : equal.scores) score = 1.5f;
        CheckExact(equal, isa, 256, 2);
    }
}

// The same numbers, bit by bit, however the work is cut.
void ThreadsDoNotShow(Isa isa) {
    for (const int64_t m : {1, 2, 16}) {
        for (const int64_t rows : {1, 7, 40}) {
            const Problem problem({rows, m, 256, 40009}, true, Type::kFloat32, static_cast<uint32_t>(m + rows));
            const Found one(problem, isa, 50, 1);
            for (const int64_t threads : {2, 3, 16}) {
                const Found found(problem, isa, 50, threads);
                CHECK(one.values == found.values && one.ids == found.ids && one.logsumexp == found.logsumexp,
                      << problem.Name(isa) << " on " << threads << " threads");
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- sample

struct Draws {
    std::vector<int64_t> ids;
    std::vector<float> logprob;

    Draws(const Problem& problem, Isa isa, float temperature, const std::vector<float>& uniform, int64_t threads)
        : ids(uniform.size() + 1, -7), logprob(uniform.size() + 1, kPoison) {
        Sample(problem.codes.data(), problem.Bias(), problem.shape.vocab_size, problem.shape.num_codebooks, isa)
            .Run(problem.CodeLogits().data(), temperature, uniform.data(), ids.data(), logprob.data(),
                 problem.shape.rows, problem.shape.num_codes, problem.type, Threads, threads);
        CHECK(ids.back() == -7 && logprob.back() == kPoison, << "written behind the end");
    }
};

void CheckSample(const Problem& problem, Isa isa, float temperature, uint32_t seed, int64_t threads) {
    const int64_t rows = problem.shape.rows, v_count = problem.shape.vocab_size;
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> anywhere(0.0f, 1.0f);
    std::vector<float> uniform(static_cast<size_t>(rows));
    for (size_t r = 0; r < uniform.size(); ++r) {
        uniform[r] = r % 4 == 0 ? 0.0f : r % 4 == 1 ? 1.0f - 0x1p-24f : std::min(anywhere(random), 1.0f - 0x1p-24f);
    }
    const Draws draws(problem, isa, temperature, uniform, threads);
    const std::vector<double> wide(problem.scores.begin(), problem.scores.end()),
        wide_bias(problem.bias.begin(), problem.bias.end()), wide_uniform(uniform.begin(), uniform.end());
    std::vector<int64_t> ids(uniform.size());
    std::vector<double> logprob(uniform.size()), upper(uniform.size() * static_cast<size_t>(v_count)),
        share(upper.size());
    vq::SampleReference(wide.data(), problem.codes.data(), wide_bias.empty() ? nullptr : wide_bias.data(),
                        static_cast<double>(temperature), wide_uniform.data(), ids.data(), logprob.data(), upper.data(),
                        share.data(), problem.shape);
    const double mass = std::log(static_cast<double>(v_count));
    for (int64_t r = 0; r < rows; ++r) {
        const auto row = static_cast<size_t>(r);
        const int64_t id = draws.ids[row];
        CHECK(id >= 0 && id < v_count, << problem.Name(isa) << " token " << id);
        if (id < 0 || id >= v_count) continue;
        const auto at = static_cast<size_t>(r * v_count + id);
        // Every chance is off by its logit's and the normaliser's share of it, in both stages; so are sums of chances.
        const double peak = *std::max_element(problem.scores.begin(), problem.scores.end());
        const double bound = 4.0 * problem.LogSumExpBound(r, std::abs(peak), mass) / std::min(1.0f, temperature);
        CHECK(upper[at] - share[at] - bound <= wide_uniform[row] && wide_uniform[row] <= upper[at] + bound,
              << problem.Name(isa) << " row " << r << ": token " << id << " ends at " << upper[at] << ", drawn at "
              << wide_uniform[row] << ", expected " << ids[row]);
        CHECK(std::abs(draws.logprob[row] - std::log(share[at])) <= bound + 0x1p-24 * std::abs(draws.logprob[row]),
              << problem.Name(isa) << " logprob " << draws.logprob[row] << ", expected " << std::log(share[at]));
    }
}

void SampleSweep(Isa isa) {
    uint32_t seed = 1;
    for (const int64_t m : {1, 2, 9}) {
        for (const int64_t k_count : {1, 13, 256, 700}) {
            for (const int64_t v : {1, 31, 512, 513, 1531}) {
                for (const int64_t rows : {0, 1, 3, 9}) {
                    for (const float temperature : {1.0f, 0.6f, 3.0f}) {
                        const auto type = static_cast<Type>(seed % 3);
                        CheckSample({{rows, m, k_count, v}, seed % 2 == 0, type, seed}, isa, temperature, seed,
                                    1 + seed % 3);
                        ++seed;
                    }
                }
            }
        }
    }
    CheckSample({{3, 1, 65536, 70001}, true, Type::kFloat32, 2}, isa, 0.8f, 1, 2);
    CheckSample({{30, 1, 7, 30011}, true, Type::kFloat32, 3}, isa, 0.8f, 2, 2);
}

// The middle of every token's stretch draws that token, where rounding is far smaller than the stretch.
void EveryTokenIsDrawn(Isa isa) {
    for (const int64_t m : {1, 2}) {
        for (const bool with_bias : {false, true}) {
            Problem problem({1, m, 40, 700}, with_bias, Type::kFloat32, 5, Numbers::kFew);
            const std::vector<float> row = problem.scores;
            problem.shape.rows = 700;
            for (int64_t r = 1; r < 700; ++r) problem.scores.insert(problem.scores.end(), row.begin(), row.end());
            const std::vector<double> wide(problem.scores.begin(), problem.scores.end()),
                wide_bias(problem.bias.begin(), problem.bias.end()), none(700, 0.0);
            std::vector<int64_t> ids(700);
            std::vector<double> logprob(700), upper(700 * 700), share(700 * 700);
            vq::SampleReference(wide.data(), problem.codes.data(), with_bias ? wide_bias.data() : nullptr, 1.0,
                                none.data(), ids.data(), logprob.data(), upper.data(), share.data(), problem.shape);
            std::vector<float> uniform;
            for (size_t v = 0; v < 700; ++v) uniform.push_back(static_cast<float>(upper[v] - share[v] / 2.0));
            const Draws draws(problem, isa, 1.0f, uniform, 2);
            for (int64_t v = 0; v < 700; ++v) {
                const auto at = static_cast<size_t>(v);
                if (share[at] < 1e-4) continue;  // 4 roundings of exponents up to 12, and the uniform number's own
                CHECK(draws.ids[at] == v, << problem.Name(isa) << ": " << draws.ids[at] << " at the middle of " << v);
            }
        }
    }
}

// Tokens 200 below the best have no chance in float32, wherever they lie: in front, at the end, alone in their block.
void DeadTokens(Isa isa) {
    const std::vector<float> uniform{0.0f, 0x1p-149f, 0x1p-60f, 0.5f, 1.0f - 0x1p-24f, 1.0f, -1.0f, kNan};
    for (const int64_t m : {1, 2}) {
        for (const bool by_bias : {false, true}) {
            Problem problem({8, m, 4, 1200}, by_bias, Type::kFloat32, 1, Numbers::kFew);
            const auto alive = [](int64_t v) { return v >= 600 && v < 603; };
            std::fill(problem.scores.begin(), problem.scores.end(), 0.0f);
            std::fill(problem.bias.begin(), problem.bias.end(), 0.0f);
            for (int64_t v = 0; v < 1200; ++v) {
                for (int64_t i = 0; i < m; ++i) {
                    problem.codes[static_cast<size_t>(v * m + i)] = by_bias || alive(v) ? 1 : v < 600 ? 0 : 2;
                }
                if (by_bias && !alive(v)) problem.bias[static_cast<size_t>(v)] = -200.0f;
            }
            for (size_t i = 0; !by_bias && i < problem.scores.size(); ++i)
                problem.scores[i] = i % 4 == 1 ? 0.0f : -200.0f;
            const Draws draws(problem, isa, 1.0f, uniform, 1);
            for (size_t r = 0; r < uniform.size(); ++r) {
                CHECK(alive(draws.ids[r]), << problem.Name(isa) << " drew " << draws.ids[r] << " at " << uniform[r]);
            }
        }
    }
}

// Many heads, as a draw looks at a block twice, and sums that round otherwise the second time are rare.
void Temperatures(Isa isa) {
    const std::vector<float> uniform(9, 0.5f);
    for (const int64_t m : {1, 2, 3}) {
        for (uint32_t seed = 4; seed < 24; ++seed) {
            const Problem problem({9, m, 40, 900}, true, Type::kFloat32, seed);
            const Found best(problem, isa, 2, 1);
            for (const float temperature : {1e-30f, std::numeric_limits<float>::denorm_min()}) {
                const Draws draws(problem, isa, temperature, uniform, 1);
                for (size_t r = 0; r < 9; ++r) {
                    if (best.values[2 * r] == best.values[2 * r + 1]) continue;
                    CHECK(draws.ids[r] == best.ids[2 * r], << problem.Name(isa) << " not greedy at " << temperature);
                    CHECK(draws.logprob[r] == 0.0f, << problem.Name(isa) << " log " << draws.logprob[r]);
                }
            }
        }
        const Problem problem({9, m, 40, 900}, true, Type::kFloat32, 4);
        const Draws flat(problem, isa, 1e30f, uniform, 1);
        for (size_t r = 0; r < 9; ++r) {
            CHECK(std::abs(flat.logprob[r] + std::log(900.0)) <= 64 * 0x1p-24 * std::log(900.0), << flat.logprob[r]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------- special values

// Heads of few tokens, and of enough for a scan.
void SpecialValues(Isa isa) {
    for (const auto& [m, v_count] : {std::pair<int64_t, int64_t>{1, 1100}, {2, 1100}, {8, 1100}, {8, 4201}}) {
        for (const bool with_bias : {false, true}) {
            for (const float special : {kInfinity, -kInfinity, kNan}) {
                for (const bool everywhere : {false, true}) {
                    Problem problem({6, m, 16, v_count}, with_bias, Type::kFloat32, 3);
                    for (size_t i = 0; i < problem.scores.size(); ++i) {
                        if (everywhere || i % 16 == 3) problem.scores[i] = special;
                    }
                    const int64_t k = 50;
                    const Found found(problem, isa, k, 2);
                    const Draws draws(problem, isa, 0.7f, {0.0f, 0.25f, 0.5f, 0.75f, 0.999f, 0.1f}, 2);
                    for (int64_t r = 0; r < 6; ++r) {
                        const float sum = found.logsumexp[static_cast<size_t>(r)];
                        CHECK(std::isnan(special) ? std::isnan(sum)
                              : special > 0.0f    ? sum == kInfinity
                              : everywhere        ? sum == -kInfinity
                                                  : std::isfinite(sum),
                              << problem.Name(isa) << " " << special << " gave " << sum);
                        std::set<int64_t> ids(found.ids.begin() + r * k, found.ids.begin() + (r + 1) * k);
                        CHECK(static_cast<int64_t>(ids.size()) == k && *ids.begin() >= 0 && *ids.rbegin() < v_count);
                        const int64_t id = draws.ids[static_cast<size_t>(r)];
                        CHECK(id >= 0 && id < v_count, << id);
                        const bool fine = special == -kInfinity && !everywhere;
                        CHECK(std::isnan(draws.logprob[static_cast<size_t>(r)]) != fine);
                    }
                }
            }
        }
    }
}

// Biases that are none, in heads of few tokens and of enough for a scan: tokens at -infinity weigh nothing, and come
// after all others; one at infinity is the best; one that is no number shows in logsumexp.
void SpecialBiases(Isa isa) {
    for (const auto& [m, v_count] : {std::pair<int64_t, int64_t>{1, 1100}, {2, 1100}, {8, 1100}, {8, 4201}}) {
        for (const int64_t k_count : {16, 100}) {
            const auto at = [&](size_t v) { return v % 3 == 1; };
            Problem masked({2, m, k_count, v_count}, true, Type::kFloat32, 5);
            Problem low = masked;  // the same but for the masked tokens, which have no chance in float32
            for (size_t v = 0; v < masked.bias.size(); ++v) {
                if (at(v)) masked.bias[v] = -kInfinity, low.bias[v] = -1e4f;
            }
            const Found found(masked, isa, 256, 2), expected(low, isa, 256, 2);
            CHECK(found.ids == expected.ids && found.values == expected.values, << masked.Name(isa));
            CheckLogSumExp(masked, isa, found, {expected.logsumexp.begin(), expected.logsumexp.end() - 1});

            for (size_t v = 0; v < masked.bias.size(); ++v) masked.bias[v] = v < 10 ? 0.0f : -kInfinity;
            const Found ten(masked, isa, 256, 2);
            for (int64_t i = 0; i < 256; ++i) {
                CHECK((ten.ids[static_cast<size_t>(i)] < 10) == (i < 10) &&
                          (ten.values[static_cast<size_t>(i)] == -kInfinity) == (i >= 10),
                      << masked.Name(isa) << " place " << i << ": token " << ten.ids[static_cast<size_t>(i)]);
            }

            masked.bias[7] = kInfinity;
            const Found infinite(masked, isa, 256, 2);
            CHECK(infinite.ids[0] == 7 && infinite.logsumexp[0] == kInfinity, << masked.Name(isa));

            masked.bias[7] = kNan;
            const Found nan(masked, isa, 9, 2);
            CHECK(std::find(nan.ids.begin(), nan.ids.end(), 7) == nan.ids.end() && std::isnan(nan.logsumexp[1]),
                  << masked.Name(isa) << ": logsumexp " << nan.logsumexp[1]);
        }
    }
}

// NaN tokens come after all others, by id.
void NanComesLast(Isa isa) {
    for (const int64_t m : {1, 2}) {
        Problem problem({1, m, 3, 9}, false, Type::kFloat32, 1, Numbers::kFew);
        for (int64_t v = 0; v < 9; ++v) {
            for (int64_t i = 0; i < m; ++i) problem.codes[static_cast<size_t>(v * m + i)] = static_cast<int32_t>(v % 3);
        }
        for (size_t i = 0; i < problem.scores.size(); ++i)
            problem.scores[i] = i % 3 == 1 ? kNan : static_cast<float>(i % 3);
        const Found found(problem, isa, 8, 1);
        const std::vector<int64_t> expected{2, 5, 8, 0, 3, 6, 1, 4};
        CHECK(std::equal(expected.begin(), expected.end(), found.ids.begin()), << vq::cpu::IsaName(isa) << " M=" << m);
        CHECK(!std::isnan(found.values[5]) && std::isnan(found.values[6]) && std::isnan(found.values[7]));
    }
}

// ------------------------------------------------------------------------------------------------------------- parts

void ExponentialsAreExact(Isa isa) {
    const vq::cpu::Decode& decode = vq::cpu::KernelsOf(isa).decode;
    for (int64_t count = 1; count <= 512; count += 37) {
        for (float first = -90.0f; first < 0.0f; first += 0.37f) {
            std::vector<float> x(static_cast<size_t>(count)), out;
            for (size_t i = 0; i < x.size(); ++i) x[i] = std::min(first + 0.00173f * static_cast<float>(i), 0.0f);
            out = x;
            const float sum = decode.exponentials(out.data(), count, 0.0f, 1.0f);
            double total = 0.0;
            for (size_t i = 0; i < x.size(); ++i) {
                const double exact = std::exp(static_cast<double>(x[i]));
                const bool tiny = out[i] == 0.0f && exact <= 0x1p-126 * (1.0 + 0x1p-16);
                CHECK(tiny || std::abs(out[i] - exact) <= 0x1p-22 * exact, << "exp(" << x[i] << ") = " << out[i]);
                total += static_cast<double>(out[i]);
            }
            CHECK(std::abs(sum - total) <= 48 * 0x1p-24 * total, << "sum " << sum << " of " << total);
        }
    }
    float special[]{-kInfinity, kNan, -1000.0f, 0.0f};
    decode.exponentials(special, 4, 0.0f, 1.0f);
    CHECK(special[0] == 0.0f && std::isnan(special[1]) && special[2] == 0.0f && special[3] == 1.0f);
}

// None, few, most and all of them, at every place of a vector; nothing is written behind the last number's place.
void SelectionsAreExact(Isa isa) {
    const vq::cpu::Decode& decode = vq::cpu::KernelsOf(isa).decode;
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int64_t count = 0; count <= 200; ++count) {
        std::vector<float> x(static_cast<size_t>(count));
        for (float& value : x) value = normal(random);
        for (size_t i = 0; i + 3 < x.size(); i += 29) {
            x[i] = kNan;
            x[i + 1] = kInfinity;
            x[i + 2] = -kInfinity;
            x[i + 3] = 1.5f;
        }
        for (const float least : {-kInfinity, -2.0f, 0.0f, 1.5f, 3.0f, kInfinity}) {
            std::vector<int32_t> expected, picks(x.size() + 1, -7);
            for (size_t i = 0; i < x.size(); ++i) {
                if (x[i] >= least) expected.push_back(static_cast<int32_t>(i));
            }
            const auto found = static_cast<size_t>(decode.select(x.data(), count, least, picks.data()));
            CHECK(found == expected.size() && std::equal(expected.begin(), expected.end(), picks.begin()),
                  << vq::cpu::IsaName(isa) << ": " << found << " of " << count << " from " << least << " on");
            CHECK(picks.back() == -7, << vq::cpu::IsaName(isa) << ": written behind the picks");
        }
    }
}

void KeysKeepTheOrder() {
    const std::vector<float> rising{-kInfinity, -3e38f, -1.0f, -1e-40f, 0.0f, 1e-40f, 1.0f, 3e38f, kInfinity};
    for (size_t i = 0; i < rising.size(); ++i) {
        CHECK(vq::cpu::ValueOf(vq::cpu::KeyOf(rising[i], 9)) == rising[i]);
        CHECK(vq::cpu::IdOf(vq::cpu::KeyOf(rising[i], 0xfffffff0)) == 0xfffffff0);
        CHECK(vq::cpu::KeyOf(rising[i], 1) > vq::cpu::KeyOf(rising[i], 2));
        CHECK(vq::cpu::KeyOf(rising[i], 0) > vq::cpu::KeyOf(kNan, 0));
        if (i > 0) CHECK(vq::cpu::KeyOf(rising[i], 2) > vq::cpu::KeyOf(rising[i - 1], 1));
    }
    CHECK(vq::cpu::KeyOf(-0.0f, 5) == vq::cpu::KeyOf(0.0f, 5));
    CHECK(std::isnan(vq::cpu::ValueOf(vq::cpu::KeyOf(-kNan, 3))));
}

// One object, many threads at once.
void SharedByThreads() {
    for (const int64_t m : {1, 3}) {
        const Problem problem({2, m, 256, 4999}, true, Type::kFloat32, 9);
        const TopK kernel(problem.codes.data(), problem.bias.data(), 4999, m);
        const Found expected(problem, vq::cpu::BestIsa(), 10, 1);
        std::vector<std::vector<int64_t>> outs(8, std::vector<int64_t>(20));
        std::vector<std::thread> threads;
        for (auto& out : outs) {
            threads.emplace_back([&] {
                std::vector<float> values(20), logsumexp(2);
                kernel.Run(problem.scores.data(), values.data(), out.data(), logsumexp.data(), 2, 256, 10,
                           Type::kFloat32, vq::cpu::Serial, 1);
            });
        }
        for (auto& thread : threads) thread.join();
        for (const auto& out : outs) CHECK(std::equal(out.begin(), out.end(), expected.ids.begin()));
    }
}

}  // namespace

int main() {
    for (const Isa isa : InstructionSets()) {
        std::printf("  %s\n", vq::cpu::IsaName(isa));
        ExponentialsAreExact(isa);
        SelectionsAreExact(isa);
        TopKSweep(isa);
        TopKLarge(isa);
        TopKScanned(isa);
        TopKOfFlatRows(isa);
        TopKTies(isa);
        ThreadsDoNotShow(isa);
        SampleSweep(isa);
        EveryTokenIsDrawn(isa);
        DeadTokens(isa);
        Temperatures(isa);
        SpecialValues(isa);
        SpecialBiases(isa);
        NanComesLast(isa);
    }
    KeysKeepTheOrder();
    SharedByThreads();
    return check::Done("cpu decode");
}
