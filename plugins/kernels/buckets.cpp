#include "buckets.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace vq {

Buckets BuildBuckets(const int32_t* codes, const float* bias, int64_t vocab_size) {
    const auto v_count = static_cast<size_t>(vocab_size);
    const auto code_count = static_cast<size_t>(*std::max_element(codes, codes + v_count)) + 1;
    Buckets made;
    made.starts.assign(code_count + 1, 0);
    for (size_t v = 0; v < v_count; ++v) ++made.starts[static_cast<size_t>(codes[v]) + 1];
    for (size_t c = 0; c < code_count; ++c) made.starts[c + 1] += made.starts[c];

    made.by_id.resize(v_count);
    std::vector<int32_t> next(made.starts.begin(), made.starts.end() - 1);
    for (size_t v = 0; v < v_count; ++v) {
        made.by_id[static_cast<size_t>(next[static_cast<size_t>(codes[v])]++)] = static_cast<int32_t>(v);
    }

    made.by_rank = made.by_id;
    made.head.assign(code_count, -1);
    made.head_bias.assign(code_count, 0.0f);
    made.next_bias.assign(code_count, -std::numeric_limits<float>::infinity());
    made.mass.assign(code_count, -std::numeric_limits<float>::infinity());
    for (size_t c = 0; c < code_count; ++c) {
        const auto begin = made.by_rank.begin() + made.starts[c], end = made.by_rank.begin() + made.starts[c + 1];
        if (begin == end) continue;
        if (bias != nullptr) {  // stable: equal ones stay by rising id
            std::stable_sort(begin, end, [bias](int32_t a, int32_t b) { return bias[a] > bias[b]; });
            made.head_bias[c] = bias[*begin];
            const auto next = std::find_if(begin, end, [&](int32_t v) { return bias[v] < bias[*begin]; });
            if (next != end) made.next_bias[c] = bias[*next];
        }
        made.head[c] = *begin;
        const double peak = made.head_bias[c];
        double sum = 0.0;
        for (auto token = begin; token != end; ++token) {
            // Also where every bias is -infinity, and the difference no number.
            const double distance = bias == nullptr || bias[*token] == made.head_bias[c] ? 0.0 : bias[*token] - peak;
            sum += std::exp(distance);
        }
        made.mass[c] = static_cast<float>(peak + std::log(sum));
    }
    if (bias != nullptr) {
        made.rank_bias.resize(v_count);
        for (size_t i = 0; i < v_count; ++i) made.rank_bias[i] = bias[static_cast<size_t>(made.by_rank[i])];
    }
    return made;
}

}  // namespace vq
