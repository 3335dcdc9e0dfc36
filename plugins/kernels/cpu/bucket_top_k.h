// The k best tokens of a head with one codebook, in time that grows with K and k but not with V.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "cpu/buckets.h"
#include "cpu/mass.h"

namespace vq::cpu {

// Works on one row at a time; one object a thread.
class BucketTopK {
public:
    // buckets by falling bias, with their masses at scale 1 [U]; both must outlive this. 1 <= k <= V.
    BucketTopK(const Buckets& buckets, const std::vector<float>& masses, const Decode& decode, int64_t k);

    // scores float32 [K] -> values [k], ids [k], logsumexp.
    void Row(const float* scores, float* values, int64_t* ids, float* logsumexp);

private:
    // Tokens of a bucket whose values are equal, by rising id.
    struct Run {
        int64_t bucket;
        int64_t after;  // where the bucket goes on
        float value;
        const int32_t* next;
        const int32_t* end;
    };
    struct Entry {
        uint64_t key;  // of the run's next token
        size_t run;
    };

    float LogSumExp(const float* scores);
    int64_t FindReach(const float* scores, const float* firsts);
    float KthOfGroups(const float* firsts);
    bool Begin(Run& run, const float* scores);
    void Merge(const float* scores, int64_t reached, float* values, int64_t* ids);
    void SinkTop();

    const Buckets& buckets_;
    const std::vector<float>& masses_;
    const Decode& decode_;
    const int64_t k_, count_;
    std::vector<float> used_, firsts_, sums_, groups_;
    std::vector<int32_t> reached_;
    std::vector<Mass> parts_;
    std::vector<Run> runs_;
    std::vector<Entry> heap_;
    std::deque<std::vector<int32_t>> sorted_;  // of runs that the buckets do not hold by rising id
};

}  // namespace vq::cpu
