#include "cpu/fast_scan.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "cpu/row_tables.h"

namespace vq::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Below this, passing over all tokens in full is as quick.
constexpr int64_t kMinVocabulary = 4096;
// A group with this share of the normaliser is refined; where that leaves too much out, those with a quarter of it, ...
constexpr double kShare = 1.0 / 2048.0;
constexpr double kTolerance = 1.0 / 4096.0;
// A token with this share is summed in full: of a few of them, the byte that refining leaves out would still show.
constexpr double kMost = 1.0 / 256.0;
constexpr int64_t kPartsOfASum = 4;
constexpr size_t kTokensAhead = 2;

}  // namespace

bool FastScan::Serves(const PackedCodes& codes, const Kernels& kernels, int64_t num_codes, int64_t rows) {
    return num_codes <= (rows < kMinRowsTogether ? kernels.max_scan_codes : kernels.max_scan_codes_of_many) &&
           codes.code_bits == 8 && codes.num_codebooks >= kMinFixedCodebooks &&
           codes.num_codebooks <= kMaxFixedCodebooks && codes.vocab_size >= kMinVocabulary && codes.numbers;
}

FastScan::FastScan(const PackedCodes& codes, const Kernels& kernels, int64_t num_codes, int64_t k,
                   const ParallelFor& parallel, int64_t threads)
    : codes_(codes),
      kernels_(kernels),
      num_codes_(num_codes),
      k_(k),
      parallel_(parallel),
      threads_(threads),
      groups_(codes.blocks * (kBlock / kGroup)),
      planes_(static_cast<size_t>(FixedPoint::kPlanes * codes.num_codebooks * 256)),
      sums_(new float[static_cast<size_t>(codes.blocks * kBlock)]),
      peaks_(static_cast<size_t>(groups_)),
      masses_(static_cast<size_t>(groups_)),
      tops_(static_cast<size_t>(groups_)),
      refined_(static_cast<size_t>(groups_)) {
    fixed_.planes = planes_.data();
}

bool FastScan::Row(const float* scores, float* values, int64_t* ids, float* logsumexp) {
    const int64_t m = codes_.num_codebooks;
    if (!kernels_.to_fixed_point(scores, m, num_codes_, &fixed_)) return false;
    ScanAll();
    peak_ = *std::max_element(peaks_.begin(), peaks_.end());
    if (!(std::abs(peak_) < kInfinity)) return false;
    // The roundings of float32, of which there are fewer than eight.
    const float rounding = 0x1p-21f * (std::abs(fixed_.offset) + std::abs(peak_) + fixed_.step * static_cast<float>(m));
    error_ = fixed_.error + rounding;
    fine_error_ = 256.0f * fixed_.unit * static_cast<float>(m) + rounding;
    Weigh();
    RefineWhatWeighs();
    SumWhatWeighsMost(scores);
    Candidates best(k_);
    PickBest(scores, best);
    best.Finish(values, ids);
    *logsumexp = static_cast<float>(static_cast<double>(peak_) + std::log(total_));
    return true;
}

void FastScan::ScanAll() {
    const int64_t parts = PartsFor(codes_.blocks, codes_.blocks * kBlock * codes_.num_codebooks, threads_);
    ForParts(codes_.blocks, parts, parallel_, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t b = begin; b < end; ++b) {
            float* sums = sums_.get() + b * kBlock;
            kernels_.scan(fixed_, codes_.At(b, num_codes_), sums);
            const int64_t count = std::min(kBlock, codes_.vocab_size - b * kBlock);
            std::fill(sums + count, sums + kBlock, -kInfinity);
            for (int64_t t = 0; t < kBlock; t += kGroup) {
                peaks_[static_cast<size_t>((b * kBlock + t) / kGroup)] = kernels_.decode.largest(sums + t, kGroup);
            }
        }
    });
    std::fill(refined_.begin(), refined_.end(), uint8_t{0});
}

void FastScan::Weigh() {
    kernels_.weigh(sums_.get(), groups_, peak_, masses_.data());
    tops_ = peaks_;
    kernels_.decode.exponentials(tops_.data(), groups_, peak_, 1.0f);
}

void FastScan::RefineWhatWeighs() {
    total_ = 0.0;
    for (const float mass : masses_) total_ += static_cast<double>(mass);
    std::vector<int64_t> heavy;
    for (double share = kShare;; share *= 0.25) {
        heavy.clear();
        double left = 0.0;  // the sum of squares of what is not refined, from above
        for (int64_t g = 0; g < groups_; ++g) {
            const auto i = static_cast<size_t>(g);
            if (refined_[i]) continue;
            if (masses_[i] > share * total_) {
                heavy.push_back(g);
            } else {
                left += static_cast<double>(masses_[i]) * static_cast<double>(tops_[i]);
            }
        }
        Refine(heavy);
        if (4.0 * static_cast<double>(fixed_.deviation) * std::sqrt(left) <= kTolerance * total_) break;
    }
}

void FastScan::SumWhatWeighsMost(const float* scores) {
    const float least = peak_ + static_cast<float>(std::log(kMost * total_));
    int32_t picks[kGroup];
    for (int64_t g = 0; g < groups_; ++g) {
        const auto i = static_cast<size_t>(g);
        if (peaks_[i] < least) continue;
        const int64_t found = kernels_.decode.select(Sums(g), kGroup, least, picks);
        for (int64_t t = 0; t < found; ++t) Sums(g)[picks[t]] = Exact(scores, g * kGroup + picks[t]);
        kernels_.weigh(Sums(g), 1, peak_, &masses_[i]);
        peaks_[i] = kernels_.decode.largest(Sums(g), kGroup);
    }
    total_ = 0.0;
    for (const float mass : masses_) total_ += static_cast<double>(mass);
}

void FastScan::Refine(const std::vector<int64_t>& groups) {
    const auto count = static_cast<int64_t>(groups.size());
    const int64_t tiles = (count + kRefined - 1) / kRefined;
    const int64_t lookups = count * kGroup * codes_.num_codebooks;
    if (tiles == 0) return;
    ForParts(tiles, PartsFor(tiles, lookups, threads_), parallel_, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t tile = begin; tile < end; ++tile) {
            for (int64_t at = (tile + 1) * kRefined; at < std::min(count, (tile + 2) * kRefined); ++at) {
                Prefetch(groups[static_cast<size_t>(at)] * kGroup);
            }
            const uint8_t* ids[kRefined];
            float* sums[kRefined];
            float nobody[kGroup] = {};
            for (int64_t i = 0; i < kRefined; ++i) {
                const int64_t at = tile * kRefined + i;
                const int64_t group = groups[static_cast<size_t>(std::min(at, count - 1))];
                ids[i] = Ids(group * kGroup);
                sums[i] = at < count ? Sums(group) : nobody;
            }
            kernels_.refine(fixed_, codes_.num_codebooks, ids, sums);
            for (int64_t at = tile * kRefined; at < std::min(count, (tile + 1) * kRefined); ++at) {
                const int64_t group = groups[static_cast<size_t>(at)];
                const auto i = static_cast<size_t>(group);
                refined_[i] = 1;
                peaks_[i] = kernels_.decode.largest(Sums(group), kGroup);
                kernels_.weigh(Sums(group), 1, peak_, &masses_[i]);
            }
        }
    });
}

void FastScan::PickBest(const float* scores, Candidates& best) {
    // k groups have a token of that much each, so the k-th best token has it too.
    const float sure = groups_ < k_ ? -kInfinity : KthPeak(k_);
    int32_t picks[kGroup];
    tokens_.clear();
    for (int64_t g = 0; g < groups_; ++g) {
        const float least = sure - Error(g);
        if (peaks_[static_cast<size_t>(g)] < least) continue;
        const int64_t found = kernels_.decode.select(Sums(g), kGroup, least, picks);
        for (int64_t i = 0; i < found; ++i) tokens_.push_back(g * kGroup + picks[i]);
    }
    while (!tokens_.empty() && tokens_.back() >= codes_.vocab_size) tokens_.pop_back();
    for (size_t i = 0; i < tokens_.size(); ++i) {
        if (i + kTokensAhead < tokens_.size()) Prefetch(tokens_[i + kTokensAhead]);
        const int64_t token = tokens_[i];
        if (sums_[static_cast<size_t>(token)] + Error(token / kGroup) < best.Reach()) continue;
        const float value = Exact(scores, token);
        if (value >= best.Reach()) best.Offer(value, token);
    }
}

float FastScan::KthPeak(int64_t k) {
    sorted_.resize(peaks_.size());
    for (size_t g = 0; g < peaks_.size(); ++g) sorted_[g] = peaks_[g] - Error(static_cast<int64_t>(g));
    std::nth_element(sorted_.begin(), sorted_.begin() + (k - 1), sorted_.end(), std::greater<>());
    return sorted_[static_cast<size_t>(k - 1)];
}

float FastScan::Exact(const float* scores, int64_t token) const {
    const uint8_t* ids = Ids(token);
    // Several sums at once: one alone would wait for every addition.
    float sums[kPartsOfASum] = {codes_.bias.empty() ? 0.0f : codes_.bias[static_cast<size_t>(token)]};
    int64_t m = 0;
    for (; m + kPartsOfASum <= codes_.num_codebooks; m += kPartsOfASum) {
        for (int64_t i = 0; i < kPartsOfASum; ++i) sums[i] += scores[(m + i) * num_codes_ + ids[(m + i) * kBlock]];
    }
    for (; m < codes_.num_codebooks; ++m) sums[0] += scores[m * num_codes_ + ids[m * kBlock]];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A token's ids lie a block apart each, and the scan has pushed most of them out of the nearer caches.
void FastScan::Prefetch(int64_t token) const {
    const uint8_t* ids = Ids(token);
    for (int64_t m = 0; m < codes_.num_codebooks; ++m) __builtin_prefetch(ids + m * kBlock);
}

const uint8_t* FastScan::Ids(int64_t token) const {
    return static_cast<const uint8_t*>(codes_.At(token / kBlock, num_codes_).codes) + token % kBlock;
}

}  // namespace vq::cpu
