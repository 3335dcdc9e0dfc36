#include "cpu/bucket_draw.h"

#include <algorithm>
#include <cmath>

namespace vq::cpu {

BucketDraw::BucketDraw(const Buckets& buckets, const std::vector<float>& masses, const Decode& decode, float scale)
    : buckets_(buckets), masses_(masses), decode_(decode), scale_(scale), used_(static_cast<size_t>(buckets.Count())) {}

void BucketDraw::Row(const float* scores, double uniform, int64_t* id, float* logprob) {
    scores = buckets_.Used(scores, used_.data());
    numbers_.resize(static_cast<size_t>(buckets_.Count()));
    decode_.add(scores, masses_.data(), buckets_.Count(), numbers_.data());
    const auto [bucket, total] = Choose(buckets_.Count(), uniform);

    const int64_t begin = buckets_.start[bucket.index], size = buckets_.Size(bucket.index);
    const double wide = scale_;
    // As Choose saw the bucket: rounded otherwise, it would be off by more than all there is at small temperatures.
    const float weighed = scores[bucket.index] + masses_[bucket.index];
    double log = (static_cast<double>(weighed) - total.peak) * wide - std::log(total.sum);
    int64_t within;
    if (buckets_.bias.empty()) {
        within = std::min(static_cast<int64_t>(bucket.share * static_cast<double>(size)), size - 1);
        log -= std::log(static_cast<double>(size));
    } else {
        numbers_.assign(buckets_.bias.begin() + begin, buckets_.bias.begin() + begin + size);
        const auto [token, inside] = Choose(size, bucket.share);
        within = token.index;
        log += (static_cast<double>(buckets_.bias[begin + within]) - inside.peak) * wide - std::log(inside.sum);
    }
    *id = buckets_.tokens[begin + within];
    *logprob = static_cast<float>(log);
}

BucketDraw::Choice BucketDraw::Choose(int64_t count, double uniform) {
    parts_.clear();
    for (int64_t i = 0; i < count; i += kBlock) {
        parts_.push_back(MassOf(decode_, numbers_.data() + i, std::min(kBlock, count - i), scale_));
    }
    const auto parts = static_cast<int64_t>(parts_.size());
    const Mass total = Total(parts_.data(), parts, scale_);
    const Drawn part = DrawMass(parts_.data(), parts, total, scale_, uniform);
    const int64_t first = part.index * kBlock;
    Drawn drawn = DrawFrom(numbers_.data() + first, std::min(kBlock, count - first), parts_[part.index], total, scale_,
                           part.share);
    drawn.index += first;
    return {drawn, total};
}

}  // namespace vq::cpu
