#include "cpu/bucket_top_k.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "cpu/candidates.h"

namespace vq::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

BucketTopK::BucketTopK(const Buckets& buckets, const std::vector<float>& masses, const Decode& decode, int64_t k)
    : buckets_(buckets), masses_(masses), decode_(decode), k_(k), count_(buckets.Count()) {
    const auto size = static_cast<size_t>(count_);
    used_.resize(size);
    firsts_.resize(size);
    sums_.resize(size);
    reached_.resize(size);
}

void BucketTopK::Row(const float* scores, float* values, int64_t* ids, float* logsumexp) {
    scores = buckets_.Used(scores, used_.data());
    *logsumexp = LogSumExp(scores);
    const float* firsts = scores;
    if (!buckets_.bias.empty()) {
        decode_.add(scores, buckets_.first_bias.data(), count_, firsts_.data());
        firsts = firsts_.data();
    }
    Merge(scores, FindReach(scores, firsts), values, ids);
}

float BucketTopK::LogSumExp(const float* scores) {
    decode_.add(scores, masses_.data(), count_, sums_.data());
    parts_.clear();
    for (int64_t u = 0; u < count_; u += kBlock) {
        parts_.push_back(MassOf(decode_, sums_.data() + u, std::min(kBlock, count_ - u), 1.0f));
    }
    return static_cast<float>(Total(parts_.data(), static_cast<int64_t>(parts_.size()), 1.0).Log(1.0));
}

// Puts the buckets that may hold one of the k best into reached_ and returns how many there are. `firsts` [U]: the
// values of each bucket's best token. Whatever k tokens reach bounds the k-th value; equal values stay, as ids decide.
int64_t BucketTopK::FindReach(const float* scores, const float* firsts) {
    const float peak = decode_.largest(firsts, count_);
    int64_t found = decode_.select(firsts, count_, peak, reached_.data());
    if (found == 0) return 0;  // nothing but NaN
    const int64_t best = reached_[0];
    float least = -kInfinity;
    if (buckets_.Size(best) >= k_) {
        least = buckets_.bias.empty() ? peak : scores[best] + buckets_.bias[buckets_.start[best] + k_ - 1];
        if (std::isnan(least)) least = -kInfinity;
    }
    if (least != peak) found = decode_.select(firsts, count_, least, reached_.data());
    if (found <= 2 * k_) return found;
    const float closer = KthOfGroups(firsts);
    return closer > least ? decode_.select(firsts, count_, closer, reached_.data()) : found;
}

// The k-th largest of the maxima of 2 k groups of buckets: a little less than the k-th largest of all, for far less
// work.
float BucketTopK::KthOfGroups(const float* firsts) {
    const int64_t groups = std::min(2 * k_, count_);
    groups_.assign(static_cast<size_t>(groups), -kInfinity);
    for (int64_t u = 0; u < count_; u += groups) {
        decode_.raise(firsts + u, std::min(groups, count_ - u), groups_.data());
    }
    std::nth_element(groups_.begin(), groups_.begin() + (k_ - 1), groups_.end(), std::greater<>());
    return groups_[static_cast<size_t>(k_ - 1)];
}

// Makes `run` the tokens at run.after and after it that have the same value; false at the end of the bucket.
bool BucketTopK::Begin(Run& run, const float* scores) {
    const int64_t begin = run.after, end = buckets_.start[run.bucket + 1];
    if (begin == end) return false;
    const float score = scores[run.bucket];
    const int32_t* tokens = buckets_.tokens.data();
    run.value = score;
    run.after = end;
    if (!buckets_.bias.empty()) {
        const float* bias = buckets_.bias.data();
        run.value = score + bias[begin];
        if (std::isnan(run.value)) return false;  // as are all after it
        run.after = begin + 1;
        if (run.after < end && score + bias[run.after] == run.value) {
            const auto equal = [&](float b) { return score + b == run.value; };
            run.after = std::partition_point(bias + begin, bias + end, equal) - bias;
        }
        if (bias[run.after - 1] != bias[begin]) {
            // Rounding has made different biases equal: ids decide, and k of them are enough.
            auto& ids = sorted_.emplace_back(static_cast<size_t>(std::min(k_, run.after - begin)));
            std::partial_sort_copy(tokens + begin, tokens + run.after, ids.begin(), ids.end());
            run.next = ids.data();
            run.end = ids.data() + ids.size();
            return true;
        }
    }
    run.next = tokens + begin;
    run.end = tokens + run.after;
    return true;
}

void BucketTopK::Merge(const float* scores, int64_t reached, float* values, int64_t* ids) {
    const auto lower = [](const Entry& a, const Entry& b) { return a.key < b.key; };
    runs_.clear();
    heap_.clear();
    sorted_.clear();
    for (int64_t i = 0; i < reached; ++i) {
        Run run{reached_[static_cast<size_t>(i)], 0, 0.0f, nullptr, nullptr};
        run.after = buckets_.start[run.bucket];
        Begin(run, scores);  // a bucket has a first token, and NaN is not reached
        heap_.push_back({KeyOf(run.value, *run.next), runs_.size()});
        runs_.push_back(run);
    }
    std::make_heap(heap_.begin(), heap_.end(), lower);
    int64_t found = 0;
    while (found < k_ && !heap_.empty()) {
        Entry& top = heap_.front();
        values[found] = ValueOf(top.key);
        ids[found++] = IdOf(top.key);
        Run& run = runs_[top.run];
        if (++run.next != run.end || Begin(run, scores)) {
            top.key = KeyOf(run.value, *run.next);
        } else {
            top = heap_.back();
            heap_.pop_back();
        }
        SinkTop();
    }
    FillRest(values, ids, found, k_);
}

// Restores the order of the heap after its first entry has changed. Mostly that entry is still the best.
void BucketTopK::SinkTop() {
    const size_t size = heap_.size();
    for (size_t at = 0, child = 1; child < size; at = child, child = 2 * at + 1) {
        if (child + 1 < size && heap_[child + 1].key > heap_[child].key) ++child;
        if (heap_[at].key >= heap_[child].key) return;
        std::swap(heap_[at], heap_[child]);
    }
}

}  // namespace vq::cpu
