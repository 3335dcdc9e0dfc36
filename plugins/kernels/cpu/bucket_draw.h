// Drawing a token of a head with one codebook: a code first, then one of its tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/buckets.h"
#include "cpu/draw.h"

namespace vq::cpu {

// Works on one row at a time; one object a thread.
class BucketDraw {
public:
    // buckets by id, with their masses at `scale` [U], 1 / temperature; both must outlive this.
    BucketDraw(const Buckets& buckets, const std::vector<float>& masses, const Decode& decode, float scale);

    // scores float32 [K], uniform in [0, 1) -> a token and its log-probability.
    void Row(const float* scores, double uniform, int64_t* id, float* logprob);

private:
    // Draws from numbers_ [count] by exp(scale * number).
    struct Choice {
        Drawn drawn;
        Mass total;
    };
    Choice Choose(int64_t count, double uniform);

    const Buckets& buckets_;
    const std::vector<float>& masses_;
    const Decode& decode_;
    const float scale_;
    std::vector<float> used_, numbers_;
    std::vector<Mass> parts_;
};

}  // namespace vq::cpu
