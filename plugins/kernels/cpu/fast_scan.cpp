#include "cpu/fast_scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "cpu/row_tables.h"

namespace vq::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Below this, passing over all tokens in full is as quick.
constexpr int64_t kMinVocabulary = 4096;
// Of the normaliser: what four standard deviations of that which is left out may come to.
constexpr double kTolerance = 1.0 / 4096.0;
// A token with this share is summed in full: of a few of them, the byte that refining leaves out would still show.
constexpr double kMost = 1.0 / 256.0;
// Of a token, which what refining leaves out must not show in: a 256th of that, in tokens that have less than kMost.
constexpr double kMaxDeviation = 256.0 * kTolerance / 4.0 / 0x1p-4;
constexpr int64_t kPartsOfASum = 4;

// A bound such that leaving all groups of lesser squares as they are is within `variance`: of groups whose squares have
// the same half octave, all or none. own, common: of what is left out, the variances of a token's and of what all
// share.
float LargestBound(const std::vector<float>& squares, const std::vector<float>& masses, double own, double common,
                   double variance) {
    constexpr int kShift = 22;  // a sign, the exponent, one bit more
    struct {
        float squares, mass;
    } sums[1 << (32 - kShift)] = {};
    for (size_t g = 0; g < squares.size(); ++g) {
        uint32_t bits;
        std::memcpy(&bits, &squares[g], sizeof bits);
        sums[bits >> kShift].squares += squares[g];
        sums[bits >> kShift].mass += masses[g];
    }
    double square = 0.0, mass = 0.0;
    for (uint32_t i = 0; i < std::size(sums); ++i) {
        square += static_cast<double>(sums[i].squares);
        mass += static_cast<double>(sums[i].mass);
        if (own * square + common * mass * mass <= variance) continue;
        const uint32_t bits = i << kShift;
        float bound;
        std::memcpy(&bound, &bits, sizeof bound);
        return bound;
    }
    return kInfinity;
}

}  // namespace

bool FastScan::Serves(const PackedCodes& codes, const Kernels& kernels, int64_t num_codes, int64_t rows) {
    return num_codes <= (rows < kMinRowsTogether ? kernels.max_scan_codes : kernels.max_scan_codes_of_many) &&
           codes.code_bits == 8 && codes.num_codebooks >= kMinFixedCodebooks &&
           codes.num_codebooks <= kMaxFixedCodebooks && codes.vocab_size >= kMinVocabulary && codes.numbers;
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
    const auto groups = static_cast<size_t>(groups_);
    s_.planes.resize(static_cast<size_t>(FixedPoint::kPlanes * codes.num_codebooks * kTable));
    s_.sums.resize(static_cast<size_t>(codes.blocks * kBlock));
    s_.peaks.resize(groups);
    s_.masses.resize(groups);
    s_.squares.resize(groups);
    s_.refined.resize(groups);
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
    const float rounding = 0x1p-21f * (std::abs(fixed_.offset) + std::abs(peak_) + fixed_.step * static_cast<float>(m));
    error_ = fixed_.error + rounding;
    fine_error_ = 256.0f * fixed_.unit * static_cast<float>(m) + rounding;
    RefineWhatWeighs();
    SumWhatWeighsMost(scores);
    Candidates best(k_);
    PickBest(scores, best);
    best.Finish(values, ids);
    *logsumexp = static_cast<float>(static_cast<double>(peak_) + std::log(Total()));
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
    std::fill(s_.refined.begin(), s_.refined.end(), uint8_t{0});
}

void FastScan::RefineWhatWeighs() {
    kernels_.weigh(s_.sums.data(), groups_, peak_, s_.masses.data(), s_.squares.data());
    const auto squared = [](double x) { return x * x; };
    const float bound =
        LargestBound(s_.squares, s_.masses, squared(static_cast<double>(fixed_.deviation)),
                     squared(static_cast<double>(fixed_.common_deviation)), squared(kTolerance * Total() / 4.0));
    s_.heavy.clear();
    for (int64_t g = 0; g < groups_; ++g) {
        if (s_.squares[static_cast<size_t>(g)] >= bound) s_.heavy.push_back(g);
    }
    Refine(s_.heavy);
}

void FastScan::SumWhatWeighsMost(const float* scores) {
    const float least = peak_ + static_cast<float>(std::log(kMost * Total()));
    int32_t picks[kGroup];
    for (int64_t g = 0; g < groups_; ++g) {
        if (s_.peaks[static_cast<size_t>(g)] < least) continue;
        const int64_t found = kernels_.decode.select(Sums(g), kGroup, least, picks);
        for (int64_t t = 0; t < found; ++t) Sums(g)[picks[t]] = Exact(scores, g * kGroup + picks[t]);
        Judge(g);
    }
}

void FastScan::Refine(const std::vector<int64_t>& groups) {
    const auto count = static_cast<int64_t>(groups.size());
    const int64_t tiles = (count + kRefined - 1) / kRefined;
    if (tiles == 0) return;
    const int64_t parts = PartsFor(tiles, count * kGroup * codes_.num_codebooks, threads_);
    ForParts(tiles, parts, parallel_, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t first = begin * kRefined; first < std::min(count, end * kRefined); first += kRefined) {
            const uint8_t* ids[2 * kRefined];
            float* sums[kRefined];
            float nobody[kGroup] = {};
            for (int64_t i = 0; i < 2 * kRefined; ++i) {
                ids[i] = Ids(groups[static_cast<size_t>(std::min(first + i, count - 1))]);
            }
            for (int64_t i = 0; i < kRefined; ++i) {
                sums[i] = first + i < count ? Sums(groups[static_cast<size_t>(first + i)]) : nobody;
            }
            kernels_.refine(fixed_, codes_.num_codebooks, ids, sums);
            for (int64_t i = first; i < std::min(count, first + kRefined); ++i) {
                const int64_t group = groups[static_cast<size_t>(i)];
                s_.refined[static_cast<size_t>(group)] = 1;
                Judge(group);
            }
        }
    });
}

void FastScan::PickBest(const float* scores, Candidates& best) {
    s_.lows.resize(static_cast<size_t>(groups_));
    for (int64_t g = 0; g < groups_; ++g) {
        s_.lows[static_cast<size_t>(g)] = s_.peaks[static_cast<size_t>(g)] - Error(g);
    }
    // k groups have a token of that much each, so the k-th best token has it too.
    const float sure = KthLow();
    int32_t picks[kGroup];
    s_.tokens.clear();
    s_.lows.clear();
    for (int64_t g = 0; g < groups_; ++g) {
        const float least = sure - Error(g);
        if (s_.peaks[static_cast<size_t>(g)] < least) continue;
        const int64_t found = kernels_.decode.select(Sums(g), kGroup, least, picks);
        for (int64_t i = 0; i < found; ++i) {
            const int64_t token = g * kGroup + picks[i];
            if (token >= codes_.vocab_size) break;
            s_.tokens.push_back(token);
            s_.lows.push_back(s_.sums[static_cast<size_t>(token)] - Error(g));
        }
    }
    const float surer = KthLow();
    for (const int64_t token : s_.tokens) {
        if (s_.sums[static_cast<size_t>(token)] + Error(token / kGroup) < surer) continue;
        const float value = Exact(scores, token);
        if (value >= best.Reach()) best.Offer(value, token);
    }
}

// Peak, mass and squares of a group whose sums have changed.
void FastScan::Judge(int64_t group) {
    const auto i = static_cast<size_t>(group);
    s_.peaks[i] = kernels_.decode.largest(Sums(group), kGroup);
    kernels_.weigh(Sums(group), 1, peak_, &s_.masses[i], &s_.squares[i]);
}

// Of exp(x - peak) over all tokens. An error of that deviation raises the mean of its exponential by half its square.
double FastScan::Total() const {
    const double deviation = static_cast<double>(fixed_.deviation);
    double refined = 0.0, others = 0.0;
    for (size_t g = 0; g < s_.masses.size(); ++g) {
        (s_.refined[g] != 0 ? refined : others) += static_cast<double>(s_.masses[g]);
    }
    return refined + others * (1.0 + 0.5 * deviation * deviation);
}

// The k-th largest of `lows`, whose order is lost; -infinity where there are fewer.
float FastScan::KthLow() {
    if (static_cast<int64_t>(s_.lows.size()) < k_) return -kInfinity;
    const auto kth = s_.lows.begin() + (k_ - 1);
    std::nth_element(s_.lows.begin(), kth, s_.lows.end(), std::greater<>());
    return *kth;
}

float FastScan::Exact(const float* scores, int64_t token) const {
    const uint8_t* ids = Ids(token / kGroup) + token % kGroup;
    // Several sums at once: one alone would wait for every addition.
    float sums[kPartsOfASum] = {codes_.bias.empty() ? 0.0f : codes_.bias[static_cast<size_t>(token)]};
    int64_t m = 0;
    for (; m + kPartsOfASum <= codes_.num_codebooks; m += kPartsOfASum) {
        for (int64_t i = 0; i < kPartsOfASum; ++i) sums[i] += scores[(m + i) * num_codes_ + ids[(m + i) * kGroup]];
    }
    for (; m < codes_.num_codebooks; ++m) sums[0] += scores[m * num_codes_ + ids[m * kGroup]];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

const uint8_t* FastScan::Ids(int64_t group) const {
    return codes_.codes.data() + group * codes_.num_codebooks * kGroup;
}

}  // namespace vq::cpu
