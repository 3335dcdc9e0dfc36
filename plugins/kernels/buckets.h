// The tokens of a head with one codebook, sorted by code: what answers in code space need. Host only, no CUDA.
#pragma once

#include <cstdint>
#include <vector>

namespace vq {

// Tables of constants, built once. A bucket is the tokens of one code; `starts` says where each begins in the lists.
struct Buckets {
    std::vector<int32_t> starts;   // [codes + 1]
    std::vector<int32_t> by_id;    // [V]: tokens by (code, token id)
    std::vector<int32_t> by_rank;  // [V]: tokens by (code, falling bias, token id)
    std::vector<float> rank_bias;  // [V]: the bias of by_rank's tokens; empty without bias
    std::vector<int32_t> head;     // [codes]: first of by_rank, the best token of the code; -1 where no token has it
    std::vector<float> head_bias;  // [codes]: its bias; 0 without
    std::vector<float> next_bias;  // [codes]: the largest bias below head_bias; -infinity where there is none
    std::vector<float> mass;       // [codes]: logsumexp of bias over the bucket; -infinity where it is empty

    int64_t num_codes() const { return static_cast<int64_t>(head.size()); }  // up to the largest code in use
};

// Args: codes int32 [V], each 0 to 65535 (CheckCodes); bias float32 [V] without NaN, or null.
Buckets BuildBuckets(const int32_t* codes, const float* bias, int64_t vocab_size);

}  // namespace vq
