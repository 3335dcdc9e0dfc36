// The k best of many numbers: values falling, equal ones by rising id, NaN last.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/isa.h"

namespace vq::cpu {

// A value and its id as one number: the better, the larger. Zeros of either sign are equal; NaN is below all. Ids are
// 0 to 2^32 - 1.
inline uint64_t KeyOf(float value, int64_t id) {
    const float plain = value + 0.0f;  // -0 becomes 0
    uint32_t bits;
    std::memcpy(&bits, &plain, sizeof bits);
    // Bits of positive numbers rise with the number, those of negative ones fall.
    const uint32_t rising = std::isnan(value) ? 0u : (bits >> 31) != 0u ? ~bits : bits | 0x80000000u;
    return uint64_t{rising} << 32 | static_cast<uint32_t>(~static_cast<uint64_t>(id));
}

inline float ValueOf(uint64_t key) {
    const auto rising = static_cast<uint32_t>(key >> 32);
    if (rising == 0u) return std::numeric_limits<float>::quiet_NaN();
    const uint32_t bits = (rising >> 31) != 0u ? rising & 0x7fffffffu : ~rising;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int64_t IdOf(uint64_t key) { return static_cast<int64_t>(~static_cast<uint32_t>(key)); }

// Collects numbers in the order of their ids. Most blocks bring nothing: Reach() is all that they are compared with.
class Candidates {
public:
    explicit Candidates(int64_t k);

    // The least value that can still be among the k best.
    float Reach() const { return reach_; }

    // One number that Reach() lets pass; its id is above all before.
    void Offer(float value, int64_t id) {
        keys_.push_back(KeyOf(value, id));
        if (keys_.size() >= limit_) Compact();
    }

    // values [kBlock] of the ids first, first + 1, ...; only the first `count` are offered.
    void OfferBlock(const Decode& decode, const float* values, int64_t count, int64_t first);

    // The best of both, whatever their ids.
    void Merge(const Candidates& other);

    // The k best into values [k] and ids [k]. Fewer than k were offered where NaN was passed over: the lowest of the
    // ids left follow, with NaN.
    void Finish(float* values, int64_t* ids);

private:
    void Compact();

    int64_t k_;
    size_t limit_;  // numbers kept before the k best are picked out
    float reach_;
    std::vector<uint64_t> keys_;
};

// Completes the `found` best with the lowest of the other ids and NaN, up to k.
void FillRest(float* values, int64_t* ids, int64_t found, int64_t k);

}  // namespace vq::cpu
