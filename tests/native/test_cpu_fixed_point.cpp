// The fixed-point kernels of every instruction set that has them (isa.h), called as top-k and logits call them, against
// sums in double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/packed_codes.h"
#include "instruction_sets.h"

namespace {

using vq::cpu::Block;
using vq::cpu::FixedPoint;
using vq::cpu::Isa;
using vq::cpu::kBlock;
using vq::cpu::Kernels;
using vq::cpu::kGroup;
using vq::cpu::PackedCodes;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr uint8_t kPoison = 0xa5;
constexpr size_t kGuard = 64;  // bytes behind the planes that no kernel may touch

std::vector<Isa> WithFixedPoint() {
    std::vector<Isa> all;
    for (const Isa isa : InstructionSets()) {
        if (vq::cpu::KernelsOf(isa).to_fixed_point != nullptr) all.push_back(isa);
    }
    return all;
}

enum class Spans {
    kEqual,
    kWide,  // every seventh codebook spans up to 200 times as much as the others
};

// One block of a head, and one row of scores [M, K].
struct Head {
    int64_t num_codebooks, num_codes;
    std::vector<float> scores, bias;
    std::vector<int32_t> ids;  // [kBlock, M]
    PackedCodes codes;

    Head(int64_t m_count, int64_t k_count, bool with_bias, Spans spans, uint32_t seed)
        : num_codebooks(m_count),
          num_codes(k_count),
          scores(Scores(m_count, k_count, spans, seed)),
          bias(with_bias ? Biases(seed) : std::vector<float>()),
          ids(Ids(m_count, k_count, seed)),
          codes(ids.data(), with_bias ? bias.data() : nullptr, kBlock, m_count) {}

    static std::vector<float> Scores(int64_t m_count, int64_t k_count, Spans spans, uint32_t seed) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.0f, 3.0f);
        std::vector<float> scores(static_cast<size_t>(m_count * k_count));
        for (auto& score : scores) score = normal(random);
        for (int64_t i = 0; i < m_count * k_count; ++i) {
            const int64_t m = i / k_count;
            if (spans == Spans::kWide && m % 7 == 3) scores[static_cast<size_t>(i)] *= m % 2 == 0 ? 200.0f : 8.0f;
        }
        return scores;
    }

    static std::vector<float> Biases(uint32_t seed) {
        std::mt19937 random(seed + 1);
        std::normal_distribution<float> normal(0.0f, 3.0f);
        std::vector<float> bias(kBlock);
        for (auto& x : bias) x = normal(random);
        return bias;
    }

    // All codes at every place of a vector, the first and the last code among them.
    static std::vector<int32_t> Ids(int64_t m_count, int64_t k_count, uint32_t seed) {
        std::mt19937 random(seed + 2);
        std::uniform_int_distribution<int32_t> id(0, static_cast<int32_t>(k_count) - 1);
        std::vector<int32_t> ids(static_cast<size_t>(kBlock * m_count));
        for (auto& x : ids) x = id(random);
        std::fill(ids.begin(), ids.begin() + m_count, 0);
        std::fill(ids.end() - m_count, ids.end(), static_cast<int32_t>(k_count) - 1);
        return ids;
    }

    Block InBlock() const { return codes.At(0, num_codes); }

    std::vector<double> Sums() const {
        std::vector<double> sums(bias.begin(), bias.end());
        sums.resize(kBlock);
        for (int64_t t = 0; t < kBlock; ++t) {
            for (int64_t m = 0; m < num_codebooks; ++m) {
                const int32_t id = ids[static_cast<size_t>(t * num_codebooks + m)];
                sums[static_cast<size_t>(t)] += static_cast<double>(scores[static_cast<size_t>(m * num_codes + id)]);
            }
        }
        return sums;
    }

    // What the look-ups of a sum are off by together: half a unit each, and two roundings of float32 of the scores'
    // distance from the lowest (fixed_point.inl).
    double LookUps(const FixedPoint& fixed) const {
        double sum = 0.0;
        for (int64_t m = 0; m < num_codebooks; ++m) {
            const auto first = scores.begin() + m * num_codes;
            const auto [low, high] = std::minmax_element(first, first + num_codes);
            sum += 0.5 * static_cast<double>(fixed.unit) +
                   0x1p-23 * (static_cast<double>(*high) - static_cast<double>(*low));
        }
        return sum;
    }

    std::string Name(Isa isa) const {
        std::ostringstream name;
        name << vq::cpu::IsaName(isa) << " M=" << num_codebooks << " K=" << num_codes << (bias.empty() ? "" : " bias");
        return name.str();
    }
};

// A head's row in fixed point, its planes in memory of exactly their size, on cache lines as the kernels have them.
struct Fixed {
    const Kernels& kernels;
    vq::cpu::Bytes planes;
    FixedPoint fixed;
    bool fits;

    Fixed(Isa isa, const Head& head)
        : kernels(vq::cpu::KernelsOf(isa)),
          planes(static_cast<size_t>(FixedPoint::kPlanes * head.num_codebooks * 256) + kGuard, kPoison) {
        fixed.planes = planes.data();
        fits = kernels.to_fixed_point(head.scores.data(), head.codes.shares.data(), head.num_codebooks, head.num_codes,
                                      &fixed);
        for (size_t i = planes.size() - kGuard; i < planes.size(); ++i) {
            CHECK(planes[i] == kPoison, << head.Name(isa) << ": written behind the planes");
        }
    }
};

void CheckSums(const std::vector<float>& found, const std::vector<double>& exact, double bound,
               const std::string& what) {
    for (size_t t = 0; t < exact.size(); ++t) {
        CHECK(std::abs(static_cast<double>(found[t]) - exact[t]) <= bound,
              << what << " token " << t << ": " << found[t] << ", expected " << exact[t] << " within " << bound);
    }
}

// Both sums of a head, each within what isa.h promises.
void CheckHead(Isa isa, const Head& head) {
    const Fixed row(isa, head);
    CHECK(row.fits, << head.Name(isa));
    if (!row.fits) return;
    const FixedPoint& fixed = row.fixed;
    const std::vector<double> exact = head.Sums();
    double peak = 0.0;
    for (const double x : exact) peak = std::max(peak, std::abs(x));
    // Fewer than eight roundings of numbers that are no larger than these together.
    const double m = static_cast<double>(head.num_codebooks);
    const double most = std::abs(static_cast<double>(fixed.offset)) + peak + static_cast<double>(fixed.step) * m +
                        (head.bias.empty() ? 0.0 : 15.0);
    const double rounding = head.LookUps(fixed) + 0x1p-21 * most;

    std::vector<float> sums(kBlock, kNan);
    row.kernels.one_row_fixed(fixed, head.InBlock(), sums.data());
    CheckSums(sums, exact, rounding, head.Name(isa) + " in full,");

    std::fill(sums.begin(), sums.end(), kNan);
    row.kernels.scan(fixed, head.InBlock(), sums.data());
    CheckSums(sums, exact, static_cast<double>(fixed.error) + rounding, head.Name(isa) + " scanned,");
}

void Sweep(Isa isa) {
    uint32_t seed = 1;
    for (const int64_t m : {8, 9, 17, 37}) {
        for (const int64_t k : {1, 3, 15, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 255, 256}) {
            for (const Spans spans : {Spans::kEqual, Spans::kWide}) {
                for (const bool with_bias : {false, true}) CheckHead(isa, {m, k, with_bias, spans, seed++});
            }
        }
    }
    for (const int64_t k : {16, 100, 256}) CheckHead(isa, {256, k, true, Spans::kWide, seed++});
}

// The largest sums there are: every token has the best code of 256 codebooks, which is 255 in every plane but the
// lowest.
void LargestSums(Isa isa) {
    for (const int64_t k : {2, 16, 17, 64, 256}) {
        for (const int64_t best : {int64_t{0}, k / 2, k - 1}) {
            Head head(256, k, false, Spans::kEqual, 1);
            std::fill(head.scores.begin(), head.scores.end(), -1.0f);
            for (int64_t m = 0; m < 256; ++m) head.scores[static_cast<size_t>(m * k + best)] = 1.0f;
            std::fill(head.ids.begin(), head.ids.end(), static_cast<int32_t>(best));
            head.codes = PackedCodes(head.ids.data(), nullptr, kBlock, 256);
            CheckHead(isa, head);
        }
    }
}

// Equal scores, of every size: the sums are exact but for rounding, whatever the unit.
void NoSpan(Isa isa) {
    for (const float score : {0.0f, 2.5f, -1e-40f, 1e30f}) {
        Head head(8, 20, false, Spans::kEqual, 2);
        std::fill(head.scores.begin(), head.scores.end(), score);
        CheckHead(isa, head);
    }
}

// One number that is none, anywhere, or a span that float32 does not hold: the row must be summed in float32.
void Refusals(Isa isa) {
    for (const int64_t k : {3, 16, 17, 100, 256}) {
        const Head fine(9, k, false, Spans::kEqual, 3);
        CHECK(Fixed(isa, fine).fits, << fine.Name(isa));
        for (const int64_t m : {0, 4, 8}) {
            for (int64_t code = 0; code < k; ++code) {
                for (const float special : {kInfinity, -kInfinity, kNan}) {
                    Head head = fine;
                    head.scores[static_cast<size_t>(m * k + code)] = special;
                    CHECK(!Fixed(isa, head).fits, << head.Name(isa) << ": " << special << " at " << m << ", " << code);
                }
            }
        }
        Head wide = fine;
        wide.scores[1] = 3e38f;
        wide.scores[2] = -3e38f;
        CHECK(!Fixed(isa, wide).fits, << wide.Name(isa));
        // The unit would be below the smallest float32.
        Head tiny = fine;
        for (float& score : tiny.scores) score *= 1e-39f;
        CHECK(!Fixed(isa, tiny).fits, << tiny.Name(isa));
    }
}

void MassesAreExact(Isa isa) {
    std::mt19937 random(4);
    std::uniform_real_distribution<float> below(-90.0f, 1.0f), near(-3.0f, 1.0f);
    const float peak = 7.25f;
    const int64_t groups = 37;
    std::vector<float> x(static_cast<size_t>(groups * kGroup));
    for (size_t i = 0; i < x.size(); ++i) x[i] = peak + (i / kGroup % 2 == 0 ? below : near)(random);
    const auto group = [&](int64_t g) { return x.begin() + g * kGroup; };
    std::fill(group(3), group(4), -kInfinity);      // all of no mass
    std::fill(group(5), group(6), peak - 1000.0f);  // all of a mass that float32 does not hold
    std::fill(group(6), group(7) - 1, -kInfinity);  // all but one
    std::fill(group(8), group(9), kNan);            // all of them no number
    for (int64_t i = 0; i < kGroup; i += 3) group(10)[i] = kNan;
    const auto check = [&](int64_t first, int64_t count) {
        double exact = 0.0;
        for (auto i = x.begin() + first; i < x.begin() + first + count; ++i) {
            if (!std::isnan(*i)) exact += std::exp(static_cast<double>(*i) - static_cast<double>(peak));
        }
        const auto found = static_cast<double>(vq::cpu::KernelsOf(isa).weigh(x.data() + first, count, peak));
        CHECK(std::abs(found - exact) <= 0x1p-16 * exact + static_cast<double>(count) * 0x1p-126,
              << vq::cpu::IsaName(isa) << " mass of " << count << " from " << first << " on: " << found << ", expected "
              << exact);
    };
    for (int64_t g = 0; g < groups; ++g) check(g * kGroup, kGroup);
    for (const int64_t count : {int64_t{0}, int64_t{16}, int64_t{48}, groups * kGroup}) check(0, count);
}

// A K that an instruction set serves needs kernels, and its tables have 256 entries.
void LimitsAgree() {
    for (const Isa isa : InstructionSets()) {
        const Kernels& kernels = vq::cpu::KernelsOf(isa);
        const int64_t most =
            std::max({kernels.max_fixed_codes, kernels.max_scan_codes, kernels.max_scan_codes_of_many});
        const bool all = kernels.to_fixed_point && kernels.one_row_fixed && kernels.scan && kernels.weigh;
        CHECK(most <= 256 && (most > 0) == all, << vq::cpu::IsaName(isa) << " serves K up to " << most);
        CHECK(kernels.max_scan_codes_of_many <= kernels.max_scan_codes, << vq::cpu::IsaName(isa));
    }
}

}  // namespace

int main() {
    LimitsAgree();
    for (const Isa isa : WithFixedPoint()) {
        std::printf("  %s\n", vq::cpu::IsaName(isa));
        Sweep(isa);
        LargestSums(isa);
        NoSpan(isa);
        Refusals(isa);
        MassesAreExact(isa);
    }
    return check::Done("cpu fixed point");
}
