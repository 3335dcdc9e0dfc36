// The VQSample kernels: the cumulative distribution of softmax(logits / temperature) inverted at a number per row.
//
// tests/native/cuda_on_host.h compiles this file with a C++ compiler too and runs it there.
#pragma once

#include "best.cuh"
#include "stream.cuh"
#include "vq/launch.h"

namespace vq {

// For more than one codebook: what every part of the vocabulary weighs.
struct SampleStreamArgs {
    StreamArgs stream;
    const float* temperature;
    const float* uniform;
    float2* logs;  // [rows, parts]: peak and sum (block.cuh)
    int64_t* ids;
    float* logprob;
};

// For one codebook. A code's mass does not depend on the row, but on the temperature where there is a bias.
struct SampleCodeArgs {
    const void* code_logits;
    const void* codes;
    const void* bias;
    int64_t num_codes, vocab_size;
    const float* temperature;
    const float* uniform;
    unsigned* peaks;           // [num_codes]: the largest bias of a code's tokens, as OrderedBits; null: buckets tell
    unsigned long long* sums;  // [num_codes]: sum of exp((bias - peak) / temperature), in units of 2^-40
    DeviceBuckets buckets;
    int64_t* ids;
    float* logprob;
};

namespace device {

inline constexpr float kUnitsOfOne = 1099511627776.0f;  // 2^40: 2^23 tokens of weight 1 fit in 64 bits

// Numbers as integers of the same order, 0 below all of them. NaN is above infinity.
__device__ __forceinline__ unsigned OrderedBits(float value) { return static_cast<unsigned>(KeyOf(value, 0) >> 32); }
__device__ __forceinline__ float OfOrderedBits(unsigned bits) { return ValueOf(static_cast<Key>(bits) << 32); }

template <typename T>
__device__ __forceinline__ float BiasOf(const void* bias, int64_t token) {
    return bias == nullptr ? 0.0f : Widen(LoadConstant<Pack<T, 1>>(static_cast<const T*>(bias) + token).x[0]);
}

// exp(x - peak); 1 where both are -infinity, whose difference is no number.
__device__ __forceinline__ float Weight(float x, float peak) { return x == peak ? 1.0f : expf(x - peak); }

// --- one codebook ---

// The masses of the codes, in two passes over the tokens: grid [blocks]. Integers, because their sum is the same in any
// order; relative to each code's own largest bias, because a code of small bias may have the largest logit.
template <typename T, typename Code>
__global__ void __launch_bounds__(plan::kStreamThreads) SamplePeaks(SampleCodeArgs args) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t v = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; v < args.vocab_size; v += step) {
        atomicMax(args.peaks + static_cast<const Code*>(args.codes)[v], OrderedBits(BiasOf<T>(args.bias, v)));
    }
}

template <typename T, typename Code>
__global__ void __launch_bounds__(plan::kStreamThreads) SampleSums(SampleCodeArgs args) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const float temperature = *args.temperature;
    for (int64_t v = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; v < args.vocab_size; v += step) {
        const Code code = static_cast<const Code*>(args.codes)[v];
        const float peak = OfOrderedBits(args.peaks[code]);
        const float weight = Weight(BiasOf<T>(args.bias, v) / temperature, peak / temperature);
        // NaN and what is above 1 can only come of a NaN or a temperature that is not above 0.
        const float bounded = weight < 1.0f ? weight : 1.0f;
        atomicAdd(args.sums + code, static_cast<unsigned long long>(bounded * kUnitsOfOne));
    }
}

// log of what the tokens of a code weigh at this temperature; -infinity for a code without tokens.
__device__ __forceinline__ float TemperedMass(const SampleCodeArgs& args, int64_t code, float temperature) {
    if (args.peaks == nullptr) {
        if (code >= args.buckets.codes) return MinusInfinity();
        return logf(static_cast<float>(args.buckets.starts[code + 1] - args.buckets.starts[code]));
    }
    const unsigned long long sum = args.sums[code];
    if (sum == 0) return MinusInfinity();
    return OfOrderedBits(args.peaks[code]) / temperature + logf(static_cast<float>(sum) / kUnitsOfOne);
}

// One row: grid [rows]. A draw among the codes by their mass, then one inside the code.
template <typename T, typename Code>
__global__ void __launch_bounds__(plan::kStreamThreads) SampleCode(SampleCodeArgs args) {
    extern __shared__ uint4 decode_shared[];
    auto* const scratch = reinterpret_cast<BlockScratch*>(decode_shared);
    const int64_t row = blockIdx.x;
    const T* const scores = static_cast<const T*>(args.code_logits) + row * args.num_codes;
    const float temperature = *args.temperature, uniform = args.uniform[row];
    const auto term = [&](int64_t code) {
        const float mass = TemperedMass(args, code, temperature);
        // Before the sum: a code without tokens weighs nothing whatever its logit.
        if (mass == MinusInfinity()) return mass;
        return Widen(LoadConstant<Pack<T, 1>>(scores + code).x[0]) / temperature + mass;
    };
    LogSum log = EmptyLogSum();
    for (int64_t code = threadIdx.x; code < args.num_codes; code += blockDim.x) log.Add(term(code));
    log = BlockLogSum(log, scratch);
    const auto code_weight = [&](int64_t code) {
        const float x = term(code);
        return x == MinusInfinity() ? 0.0f : Weight(x, log.peak);
    };
    OrderedWeights<decltype(code_weight)> codes(args.num_codes, code_weight, scratch);
    const float target = uniform * codes.Total();
    const Place code = codes.Pick(target);
    const float left = code.weight > 0.0f ? (target - code.before) / code.weight : 0.0f;

    const float mass = TemperedMass(args, code.index, temperature);
    int64_t token = 0;
    if (args.buckets.codes > code.index) {
        const int32_t* const bucket = args.buckets.by_id + args.buckets.starts[code.index];
        const int64_t count = args.buckets.starts[code.index + 1] - args.buckets.starts[code.index];
        const auto weight = [&](int64_t i) { return Weight(BiasOf<T>(args.bias, bucket[i]) / temperature, mass); };
        OrderedWeights<decltype(weight)> tokens(count, weight, scratch);
        const Place place = tokens.Pick(left * tokens.Total());
        if (count > 0) token = bucket[place.index];
    } else {
        // Without buckets the tokens of the code are found among all.
        const auto weight = [&](int64_t v) {
            if (static_cast<const Code*>(args.codes)[v] != code.index) return 0.0f;
            return Weight(BiasOf<T>(args.bias, v) / temperature, mass);
        };
        OrderedWeights<decltype(weight)> tokens(args.vocab_size, weight, scratch);
        token = tokens.Pick(left * tokens.Total()).index;
    }
    if (threadIdx.x != 0) return;
    const float score = Widen(LoadConstant<Pack<T, 1>>(scores + static_cast<const Code*>(args.codes)[token]).x[0]);
    args.ids[row] = token;
    args.logprob[row] = (score + BiasOf<T>(args.bias, token)) / temperature - log.Value();
}

// --- more codebooks ---

// What a row's part of the vocabulary weighs: grid [rows, parts].
template <typename T, typename Code>
__global__ void __launch_bounds__(plan::kStreamThreads) SampleParts(SampleStreamArgs args) {
    extern __shared__ uint4 decode_shared[];
    auto* const scratch = reinterpret_cast<BlockScratch*>(decode_shared);
    const StreamPlan& plan = args.stream.plan;
    const int64_t row = blockIdx.x, part = blockIdx.y;
    LogitTiles<T, Code> tiles(args.stream, row, reinterpret_cast<unsigned char*>(decode_shared) + plan::kScratchBytes);
    const float temperature = *args.temperature;
    LogSum log = EmptyLogSum();
    const int64_t next_part = (part + 1) * plan.per_part, end = next_part < plan.tiles ? next_part : plan.tiles;
    for (int64_t tile = part * plan.per_part; tile < end; ++tile) {
        tiles.Load(tile);
        for (int i = static_cast<int>(threadIdx.x); i < tiles.Count(); i += static_cast<int>(blockDim.x)) {
            log.Add(tiles.Logit(i) / temperature);
        }
    }
    log = BlockLogSum(log, scratch);
    if (threadIdx.x == 0) args.logs[row * gridDim.y + part] = make_float2(log.peak, log.sum);
}

// The part that holds the draw, then its token: grid [rows]. One part is worked out again, by the same additions as
// before.
template <typename T, typename Code>
__global__ void __launch_bounds__(plan::kStreamThreads) SampleToken(SampleStreamArgs args) {
    extern __shared__ uint4 decode_shared[];
    auto* const scratch = reinterpret_cast<BlockScratch*>(decode_shared);
    const StreamPlan& plan = args.stream.plan;
    const int64_t row = blockIdx.x;
    const float temperature = *args.temperature;
    const float2* const logs = args.logs + row * plan.parts;
    LogSum log = EmptyLogSum();
    for (int part = static_cast<int>(threadIdx.x); part < plan.parts; part += static_cast<int>(blockDim.x)) {
        log.Add(LogSum{logs[part].x, logs[part].y});
    }
    log = BlockLogSum(log, scratch);
    const auto part_weight = [&](int64_t part) {
        return logs[part].y == 0.0f ? 0.0f : logs[part].y * Weight(logs[part].x, log.peak);
    };
    OrderedWeights<decltype(part_weight)> parts(plan.parts, part_weight, scratch);
    const float target = args.uniform[row] * parts.Total();
    const Place part = parts.Pick(target);
    float left = target - part.before;

    LogitTiles<T, Code> tiles(args.stream, row, reinterpret_cast<unsigned char*>(decode_shared) + plan::kScratchBytes);
    const auto weight = [&](int64_t i) {
        const float x = tiles.Logit(static_cast<int>(i)) / temperature;
        return x == MinusInfinity() ? 0.0f : Weight(x, log.peak);
    };
    const int64_t begin = part.index * plan.per_part;
    const int64_t end = begin + plan.per_part < plan.tiles ? begin + plan.per_part : plan.tiles;
    int64_t token = 0;
    float logit = 0.0f;
    for (int64_t tile = begin; tile < end; ++tile) {
        tiles.Load(tile);
        OrderedWeights<decltype(weight)> tokens(tiles.Count(), weight, scratch);
        if (tokens.Total() > 0.0f || tile == begin) {
            // Kept until a later tile has any weight: what remains where rounding leaves the sums short of the draw.
            const Place place = tokens.Pick(left);
            token = tiles.Token(static_cast<int>(place.index));
            logit = tiles.Logit(static_cast<int>(place.index));
        }
        if (tokens.Total() > left) break;
        left -= tokens.Total();
    }
    if (threadIdx.x != 0) return;
    args.ids[row] = token;
    args.logprob[row] = logit / temperature - log.Value();
}

}  // namespace device
}  // namespace vq
