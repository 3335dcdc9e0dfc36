#include "cpu/buckets.h"

#include <algorithm>
#include <cmath>

#include "cpu/candidates.h"
#include "cpu/mass.h"

namespace vq::cpu {

Buckets::Buckets(const int32_t* codes, const float* biases, int64_t vocab_size, Order order) {
    const auto v_count = static_cast<size_t>(vocab_size);
    std::vector<int32_t> next(static_cast<size_t>(*std::max_element(codes, codes + vocab_size)) + 1, 0);
    for (size_t v = 0; v < v_count; ++v) ++next[static_cast<size_t>(codes[v])];
    int32_t before = 0;
    for (size_t c = 0; c < next.size(); ++c) {
        const int32_t count = next[c];
        next[c] = before;
        if (count == 0) continue;
        code.push_back(static_cast<int32_t>(c));
        start.push_back(before);
        before += count;
    }
    start.push_back(before);
    tokens.resize(v_count);
    for (size_t v = 0; v < v_count; ++v) {
        tokens[static_cast<size_t>(next[static_cast<size_t>(codes[v])]++)] = static_cast<int32_t>(v);
    }
    if (biases == nullptr) return;

    const auto better = [biases](int32_t a, int32_t b) { return KeyOf(biases[a], a) > KeyOf(biases[b], b); };
    for (int64_t u = 0; u < Count(); ++u) {
        const auto begin = tokens.begin() + start[u], end = tokens.begin() + start[u + 1];
        if (order == Order::kByBias) std::sort(begin, end, better);
        first_bias.push_back(biases[*begin]);
    }
    for (const int32_t token : tokens) bias.push_back(biases[token]);
}

std::vector<float> Buckets::Masses(const Decode& decode, float scale) const {
    const auto wide = static_cast<double>(scale);
    std::vector<float> masses, block(kBlock);
    std::vector<Mass> parts;
    for (int64_t u = 0; u < Count(); ++u) {
        if (bias.empty()) {
            masses.push_back(static_cast<float>(std::log(static_cast<double>(Size(u))) / wide));
            continue;
        }
        parts.clear();
        for (int64_t i = start[u]; i < start[u + 1]; i += kBlock) {
            const int64_t count = std::min<int64_t>(kBlock, start[u + 1] - i);
            std::copy_n(bias.begin() + i, count, block.begin());
            parts.push_back(MassOf(decode, block.data(), count, scale));
        }
        masses.push_back(
            static_cast<float>(Total(parts.data(), static_cast<int64_t>(parts.size()), wide).Log(wide) / wide));
    }
    return masses;
}

const float* Buckets::Used(const float* scores, float* scratch) const {
    if (static_cast<int64_t>(code.back()) + 1 == Count()) return scores;
    for (size_t u = 0; u < code.size(); ++u) scratch[u] = scores[code[u]];
    return scratch;
}

}  // namespace vq::cpu
