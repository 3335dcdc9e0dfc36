#include "cpu/candidates.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace vq::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Numbers beyond twice k: picking few out often costs more than it tightens.
constexpr int64_t kSpare = 64;

}  // namespace

Candidates::Candidates(int64_t k) : k_(k), limit_(static_cast<size_t>(k)), reach_(-kInfinity) {
    keys_.reserve(static_cast<size_t>(2 * k + kSpare + kBlock));
}

void Candidates::OfferBlock(const Decode& decode, const float* values, int64_t count, int64_t first) {
    int32_t picks[kBlock];
    const int64_t found = decode.select(values, count, reach_, picks);
    for (int64_t i = 0; i < found; ++i) keys_.push_back(KeyOf(values[picks[i]], first + picks[i]));
    if (keys_.size() >= limit_) Compact();
}

void Candidates::Merge(const Candidates& other) {
    keys_.insert(keys_.end(), other.keys_.begin(), other.keys_.end());
    if (static_cast<int64_t>(keys_.size()) > k_) Compact();
}

void Candidates::Compact() {
    std::nth_element(keys_.begin(), keys_.begin() + (k_ - 1), keys_.end(), std::greater<>());
    keys_.resize(static_cast<size_t>(k_));
    limit_ = static_cast<size_t>(2 * k_ + kSpare);
    // Ids rise, so an equal value comes too late.
    reach_ = std::nextafter(ValueOf(keys_.back()), kInfinity);
}

void Candidates::Finish(float* values, int64_t* ids) {
    if (static_cast<int64_t>(keys_.size()) > k_) Compact();
    std::sort(keys_.begin(), keys_.end(), std::greater<>());
    for (size_t i = 0; i < keys_.size(); ++i) {
        values[i] = ValueOf(keys_[i]);
        ids[i] = IdOf(keys_[i]);
    }
    FillRest(values, ids, static_cast<int64_t>(keys_.size()), k_);
}

void FillRest(float* values, int64_t* ids, int64_t found, int64_t k) {
    if (found == k) return;
    std::vector<int64_t> taken(ids, ids + found);
    std::sort(taken.begin(), taken.end());
    auto next = taken.begin();
    for (int64_t id = 0; found < k; ++id) {
        if (next != taken.end() && *next == id) {
            ++next;
            continue;
        }
        values[found] = std::numeric_limits<float>::quiet_NaN();
        ids[found++] = id;
    }
}

}  // namespace vq::cpu
