#include "cpu/fast_scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>

#include "cpu/mass.h"
#include "cpu/row_tables.h"

namespace vq::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Below this, passing over all tokens in full is as quick.
constexpr int64_t kMinVocabulary = 4096;
// Of the normaliser: what four standard deviations of that which is left out may come to; the unit roundoff of float16.
constexpr double kTolerance = 1.0 / 2048.0;
// Of a token: beyond it, leaving anything as it is would show, and the mean of exponentials is no longer that of a
// parabola.
constexpr double kMaxDeviation = 0.25;
// Of the tokens: if more than one in so many must be summed in float32, passing over all of them in full is as quick.
constexpr int64_t kMostPicked = 8;
constexpr int64_t kPartsOfASum = 4;
// Floats of the scores that stay in the first cache while tokens pass by.
constexpr int64_t kScoresAtOnce = 8192;
// What summing a token by itself costs, in look-ups of a full pass.
constexpr int64_t kCostOfOne = 8;
// How many tokens ahead memory is asked for.
constexpr int64_t kTokensAhead = 8;

double Squared(double x) { return x * x; }

// What is left out of the normaliser if tokens stay as they are: own, common are the variances, of a token, of what it
// alone and what all share.
struct Leftover {
    double own, common;
    double squares, mass;  // of the tokens: the sums of exp(x - peak) squared and as it is

    double Variance() const { return own * squares + common * mass * mass; }
};

// A bound such that leaving also all tokens whose shares are below it is within `variance`; of tokens whose shares have
// the same quarter octave, all or none. Negative where even none is too much.
float LargestBound(Leftover left, const std::vector<float>& shares, double variance) {
    constexpr int kShift = 21;  // a sign, the exponent, two bits more
    if (left.Variance() > variance) return -1.0f;
    struct {
        float squares, mass;
    } sums[1 << (31 - kShift)] = {};
    for (const float share : shares) {
        uint32_t bits;
        std::memcpy(&bits, &share, sizeof bits);
        sums[bits >> kShift].squares += share * share;
        sums[bits >> kShift].mass += share;
    }
    for (uint32_t i = 0; i < std::size(sums); ++i) {
        left.squares += static_cast<double>(sums[i].squares);
        left.mass += static_cast<double>(sums[i].mass);
        if (left.Variance() <= variance) continue;
        const uint32_t bits = i << kShift;
        float bound;
        std::memcpy(&bound, &bits, sizeof bound);
        return bound;
    }
    return kInfinity;
}

// scores [count, num_codes] -> the sum of those that ids [count] choose.
float SumOf(const float* scores, int64_t num_codes, const uint8_t* ids, int64_t count) {
    // Several sums at once: one alone would wait for every addition.
    float sums[kPartsOfASum] = {};
    int64_t m = 0;
    for (; m + kPartsOfASum <= count; m += kPartsOfASum) {
        for (int64_t i = 0; i < kPartsOfASum; ++i) sums[i] += scores[(m + i) * num_codes + ids[m + i]];
    }
    for (; m < count; ++m) sums[0] += scores[m * num_codes + ids[m]];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

bool FastScan::Has(const PackedCodes& codes, const Kernels& kernels) {
    return kernels.scan != nullptr && codes.code_bits == 8 && codes.num_codebooks >= kMinFixedCodebooks &&
           codes.num_codebooks <= kMaxFixedCodebooks && codes.vocab_size >= kMinVocabulary && codes.numbers;
}

bool FastScan::Serves(const PackedCodes& codes, const Kernels& kernels, int64_t num_codes, int64_t rows) {
    return num_codes <= (rows < kMinRowsTogether ? kernels.max_scan_codes : kernels.max_scan_codes_of_many) &&
           Has(codes, kernels);
}

FastScan::FastScan(const PackedCodes& codes, const Kernels& kernels, int64_t num_codes, int64_t k,
                   const ParallelFor& parallel, int64_t threads, Scratch& scratch)
    : codes_(codes),
      kernels_(kernels),
      num_codes_(num_codes),
      k_(k),
      parallel_(parallel),
      threads_(threads),
      groups_(codes.blocks * (kBlock / kGroup)),
      s_(scratch) {
    s_.planes.resize(static_cast<size_t>(FixedPoint::kPlanes * codes.num_codebooks * kTable));
    s_.sums.resize(static_cast<size_t>(codes.blocks * kBlock));
    s_.peaks.resize(static_cast<size_t>(groups_));
    s_.found.resize(static_cast<size_t>(codes.vocab_size));
    fixed_.planes = s_.planes.data();
}

bool FastScan::Row(const float* scores, float* values, int64_t* ids, float* logsumexp) {
    const int64_t m = codes_.num_codebooks;
    if (!kernels_.to_fixed_point(scores, codes_.shares.data(), m, num_codes_, &fixed_)) return false;
    if (static_cast<double>(fixed_.deviation) > kMaxDeviation) return false;
    ScanAll();
    peak_ = *std::max_element(s_.peaks.begin(), s_.peaks.end());
    if (!(std::abs(peak_) < kInfinity)) return false;
    // The roundings of float32, of which there are fewer than eight.
    error_ =
        fixed_.error + 0x1p-21f * (std::abs(fixed_.offset) + std::abs(peak_) + fixed_.step * static_cast<float>(m));
    const double mass = MassOfAll();
    if (!Pick(mass)) return false;
    SumPicked(scores);
    Candidates best(k_);
    for (size_t i = 0; i < s_.picks.size(); ++i) {
        if (s_.exact[i] >= best.Reach()) best.Offer(s_.exact[i], s_.picks[i]);
    }
    best.Finish(values, ids);
    const Mass masses[]{{static_cast<double>(peak_), LeftOut(mass)},
                        MassOf(kernels_.decode, s_.exact.data(), static_cast<int64_t>(s_.exact.size()), 1.0f)};
    *logsumexp = static_cast<float>(Total(masses, std::size(masses), 1.0).Log(1.0));
    return true;
}

void FastScan::ScanAll() {
    const int64_t parts = PartsFor(codes_.blocks, codes_.blocks * kBlock * codes_.num_codebooks, threads_);
    ForParts(codes_.blocks, parts, parallel_, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t b = begin; b < end; ++b) {
            float* sums = Sums(b * (kBlock / kGroup));
            kernels_.scan(fixed_, codes_.At(b, num_codes_), sums);
            const int64_t count = std::min(kBlock, codes_.vocab_size - b * kBlock);
            std::fill(sums + count, sums + kBlock, -kInfinity);
            for (int64_t t = 0; t < kBlock; t += kGroup) {
                s_.peaks[static_cast<size_t>((b * kBlock + t) / kGroup)] = kernels_.decode.largest(sums + t, kGroup);
            }
        }
    });
}

// The sum of exp(x - peak).
double FastScan::MassOfAll() const {
    double mass = 0.0;
    for (int64_t b = 0; b < codes_.blocks; ++b) {
        mass += static_cast<double>(kernels_.weigh(Sums(b * (kBlock / kGroup)), kBlock, peak_));
    }
    return mass;
}

// ... of those that stay as they are, of which the mean of the exponentials is raised by half the square of the
// deviation.
double FastScan::LeftOut(double mass) const {
    double picked = 0.0;
    for (const float share : s_.shares) picked += static_cast<double>(share);
    return std::max(mass - picked, 0.0) * (1.0 + 0.5 * Squared(static_cast<double>(fixed_.deviation)));
}

// Chooses tokens: those that may be among the k best, and those that the normaliser needs. False if there are too many,
// or all of them would not be enough.
bool FastScan::Pick(double mass) {
    const double own = Squared(static_cast<double>(fixed_.deviation));
    const double variance = Squared(kTolerance * mass / 4.0);
    // If all tokens had so large a share, leaving them would be a quarter of what is allowed.
    const double square = variance / 4.0 / std::max(own * static_cast<double>(codes_.vocab_size), 0x1p-1000);
    // k groups have a token of that much each, so the k-th best token has it too.
    const float sure = KthLargest(s_.peaks, -kInfinity) - 2.0f * error_;
    Collect(std::min(sure, peak_ + 0.5f * static_cast<float>(std::log(square))));
    const float surer = KthLargest(s_.rough, sure) - 2.0f * error_;
    s_.shares = s_.rough;
    const auto count = static_cast<int64_t>(s_.shares.size());
    const auto share = static_cast<double>(kernels_.decode.exponentials(s_.shares.data(), count, peak_, 1.0f));
    const Leftover others{own, Squared(static_cast<double>(fixed_.common_deviation)),
                          square * static_cast<double>(codes_.vocab_size), mass - share};
    const float bound = LargestBound(others, s_.shares, variance);
    if (bound < 0.0f) return false;
    size_t picked = 0;
    for (size_t i = 0; i < s_.picks.size(); ++i) {
        if (s_.shares[i] < bound && s_.rough[i] < surer) continue;
        s_.picks[picked] = s_.picks[i];
        s_.shares[picked++] = s_.shares[i];
    }
    s_.picks.resize(picked);
    s_.shares.resize(picked);
    return static_cast<int64_t>(picked) * kMostPicked <= codes_.vocab_size;
}

// All tokens whose sums are `least` or more, by rising id.
void FastScan::Collect(float least) {
    const int64_t found = kernels_.decode.select(s_.sums.data(), codes_.vocab_size, least, s_.found.data());
    s_.picks.assign(s_.found.begin(), s_.found.begin() + found);
    s_.rough.resize(s_.picks.size());
    for (size_t i = 0; i < s_.picks.size(); ++i) s_.rough[i] = s_.sums[static_cast<size_t>(s_.picks[i])];
}

// Codebook by codebook, as many as the first cache holds the scores of.
void FastScan::SumPicked(const float* scores) {
    s_.exact.resize(s_.picks.size());
    const auto count = static_cast<int64_t>(s_.picks.size());
    const int64_t m_count = codes_.num_codebooks, together = std::max(kScoresAtOnce / num_codes_, kPartsOfASum);
    const int64_t parts = PartsFor(count, count * kCostOfOne * m_count, threads_);
    ForParts(count, parts, parallel_, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; ++i) {
            s_.exact[static_cast<size_t>(i)] =
                codes_.bias.empty() ? 0.0f : codes_.bias[static_cast<size_t>(s_.picks[static_cast<size_t>(i)])];
        }
        for (int64_t m = 0; m < m_count; m += together) {
            const int64_t books = std::min(together, m_count - m);
            for (int64_t i = begin; i < end; ++i) {
                const auto at = static_cast<size_t>(i);
                if (i + kTokensAhead < end) codes_.PrefetchToken(s_.picks[at + kTokensAhead], m, books);
                s_.exact[at] += SumOf(scores + m * num_codes_, num_codes_,
                                      codes_.by_token.data() + s_.picks[at] * m_count + m, books);
            }
        }
    });
}

// Of those that are `least` or more; -infinity where there are fewer.
float FastScan::KthLargest(const std::vector<float>& x, float least) {
    s_.order.clear();
    std::copy_if(x.begin(), x.end(), std::back_inserter(s_.order), [&](float value) { return value >= least; });
    if (static_cast<int64_t>(s_.order.size()) < k_) return -kInfinity;
    const auto kth = s_.order.begin() + (k_ - 1);
    std::nth_element(s_.order.begin(), kth, s_.order.end(), std::greater<>());
    return *kth;
}

}  // namespace vq::cpu
