// The VQTopK kernels: a pass over the codes with a merge of its parts, and the same answer in code space.
//
// tests/native/cuda_on_host.h compiles this file with a C++ compiler too and runs it there.
#pragma once

#include "best.cuh"
#include "stream.cuh"
#include "vq/launch.h"

namespace vq {

// What a part of the vocabulary leaves for the merge: its k best, [k, parts] of a row so that the parts' i-th best lie
// together, and its share of the normaliser.
struct TopKParts {
    unsigned long long* keys;  // [rows, k, parts]
    float2* logs;              // [rows, parts]: peak and sum (block.cuh)
};

struct TopKStreamArgs {
    StreamArgs stream;
    int k;
    TopKParts parts;
    float* values;
    int64_t* ids;
    float* logsumexp;
};

struct TopKBucketArgs {
    const void* code_logits;
    const void* codes;
    int64_t num_codes;
    int k;
    DeviceBuckets buckets;
    float* values;
    int64_t* ids;
    float* logsumexp;
};

namespace device {

// Shared memory of all the kernels here, before what a pass over the codes needs.
struct TopKScratch {
    BestScratch best;
    BlockScratch block;
    int32_t reach[256];  // codes whose best token is among the k best tokens of all codes
};
static_assert(sizeof(TopKScratch) <= plan::kScratchBytes, "stream_plan.h leaves too little shared memory");

__device__ __forceinline__ void WriteTopK(const Best& best, const LogSum& log, int64_t row, int k, float* values,
                                          int64_t* ids, float* logsumexp) {
    for (int i = static_cast<int>(threadIdx.x); i < k; i += static_cast<int>(blockDim.x)) {
        values[row * k + i] = ValueOf(best.At(i));
        ids[row * k + i] = TokenOf(best.At(i));
    }
    if (threadIdx.x == 0) logsumexp[row] = log.Value();
}

// One row and one part of the vocabulary: grid [rows, parts].
template <typename T, typename Code>
__global__ void __launch_bounds__(plan::kStreamThreads) TopKStream(TopKStreamArgs args) {
    extern __shared__ uint4 decode_shared[];
    auto* const scratch = reinterpret_cast<TopKScratch*>(decode_shared);
    const int64_t row = blockIdx.x, part = blockIdx.y, parts = gridDim.y;
    const StreamPlan& plan = args.stream.plan;
    LogitTiles<T, Code> tiles(args.stream, row, reinterpret_cast<unsigned char*>(decode_shared) + plan::kScratchBytes);
    Best best(args.k, &scratch->best);
    LogSum log = EmptyLogSum();

    const int64_t next_part = (part + 1) * plan.per_part, end = next_part < plan.tiles ? next_part : plan.tiles;
    for (int64_t tile = part * plan.per_part; tile < end; ++tile) {
        tiles.Load(tile);
        for (int first = 0; first < tiles.Count(); first += static_cast<int>(blockDim.x)) {
            const int i = first + static_cast<int>(threadIdx.x);
            Key key = kNoKey;
            if (i < tiles.Count()) {
                const float logit = tiles.Logit(i);
                log.Add(logit);
                key = KeyOf(logit, static_cast<int32_t>(tiles.Token(i)));
            }
            best.Push(key);
        }
    }
    best.Flush();
    log = BlockLogSum(log, &scratch->block);
    if (parts == 1) return WriteTopK(best, log, row, args.k, args.values, args.ids, args.logsumexp);
    for (int i = static_cast<int>(threadIdx.x); i < args.k; i += static_cast<int>(blockDim.x)) {
        args.parts.keys[(row * args.k + i) * parts + part] = i < best.Kept() ? best.At(i) : kNoKey;
    }
    if (threadIdx.x == 0) args.parts.logs[row * parts + part] = make_float2(log.peak, log.sum);
}

// Merges the parts of a row: grid [rows]. The parts' best come first, so the threshold is soon close to its end, and
// once a whole rank of all parts holds nothing better, no later one does: k is not read to its end but for adversaries.
static __global__ void __launch_bounds__(plan::kStreamThreads) TopKMerge(TopKStreamArgs args) {
    extern __shared__ uint4 decode_shared[];
    auto* const scratch = reinterpret_cast<TopKScratch*>(decode_shared);
    const int64_t row = blockIdx.x;
    const int parts = args.stream.plan.parts, width = static_cast<int>(blockDim.x);
    const int ranks = parts < width ? width / parts : 1;  // looked at together
    const Key* const keys = args.parts.keys + row * args.k * parts;
    Best best(args.k, &scratch->best);
    for (int rank = 0; rank < args.k; rank += ranks) {
        const int begin = rank * parts, upto = rank + ranks < args.k ? rank + ranks : args.k, end = upto * parts;
        bool grew = false;
        for (int first = begin; first < end; first += width) {
            const int i = first + static_cast<int>(threadIdx.x);
            best.Push(i < end ? keys[i] : kNoKey);
            grew |= best.Grew();
        }
        if (!grew) break;
        best.Flush();
    }
    best.Flush();
    LogSum log = EmptyLogSum();
    for (int part = static_cast<int>(threadIdx.x); part < parts; part += width) {
        const float2 of = args.parts.logs[row * parts + part];
        log.Add(LogSum{of.x, of.y});
    }
    log = BlockLogSum(log, &scratch->block);
    WriteTopK(best, log, row, args.k, args.values, args.ids, args.logsumexp);
}

// The first place of [begin, end) from where on a falling list is below `value`.
__device__ __forceinline__ int64_t EndOfRun(const float* falling, int64_t begin, int64_t end, float value) {
    while (begin < end) {
        const int64_t middle = (begin + end) / 2;
        if (falling[middle] < value) {
            end = middle;
        } else {
            begin = middle + 1;
        }
    }
    return begin;
}

// The best token of a code that some token has. Rounding may make lower biases' values equal to the head's, and then
// the lowest id is best.
__device__ __forceinline__ Key BestOfCode(const DeviceBuckets& buckets, int64_t code, float score) {
    const float value = score + buckets.head_bias[code];
    int32_t token = buckets.head[code];
    if (buckets.rank_bias != nullptr && score + buckets.next_bias[code] == value && value != MinusInfinity()) {
        const int64_t end = buckets.starts[code + 1];
        int64_t i = EndOfRun(buckets.rank_bias, buckets.starts[code], end, buckets.head_bias[code]);
        for (; i < end && score + buckets.rank_bias[i] == value; ++i) {
            if (buckets.by_rank[i] < token) token = buckets.by_rank[i];
        }
    }
    return KeyOf(value, token);
}

// One row of one codebook in code space: grid [rows]. A bucket whose best token is not among the k best of all buckets'
// best holds none of the k best tokens, so k buckets are left, best first, each read only as far as it reaches.
template <typename T, typename Code>
__global__ void __launch_bounds__(plan::kStreamThreads) TopKBuckets(TopKBucketArgs args) {
    extern __shared__ uint4 decode_shared[];
    auto* const scratch = reinterpret_cast<TopKScratch*>(decode_shared);
    const int64_t row = blockIdx.x;
    const T* const scores = static_cast<const T*>(args.code_logits) + row * args.num_codes;
    const DeviceBuckets& buckets = args.buckets;
    const int width = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x) % kWarp;
    Best best(args.k, &scratch->best);
    LogSum log = EmptyLogSum();
    for (int64_t first = 0; first < buckets.codes; first += width) {
        const int64_t code = first + threadIdx.x;
        Key key = kNoKey;
        if (code < buckets.codes) {
            const float score = Widen(LoadConstant<Pack<T, 1>>(scores + code).x[0]);
            if (buckets.head[code] >= 0) {
                log.Add(score + buckets.mass[code]);
                key = BestOfCode(buckets, code, score);
            }
        }
        best.Push(key);
    }
    best.Flush();
    log = BlockLogSum(log, &scratch->block);
    if (args.k == 1) return WriteTopK(best, log, row, 1, args.values, args.ids, args.logsumexp);

    const int reached = best.Kept();
    const Code* const codes = static_cast<const Code*>(args.codes);
    for (int i = static_cast<int>(threadIdx.x); i < reached; i += width) {
        scratch->reach[i] = codes[TokenOf(best.At(i))];
    }
    // The k-th best of the buckets' best is a bound; with fewer buckets than k there is none yet.
    best.Clear(reached == args.k ? best.At(args.k - 1) : kNoKey);

    // A warp takes a bucket, 32 tokens at a time, and all warps go on together.
    const int warps = width / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    for (int first = 0; first < reached; first += warps) {
        const bool mine = first + warp < reached;
        const int32_t code = scratch->reach[mine ? first + warp : first];
        const float score = Widen(LoadConstant<Pack<T, 1>>(scores + code).x[0]);
        int64_t at = buckets.starts[code];
        const int64_t end = mine ? buckets.starts[code + 1] : at;
        while (__syncthreads_or(at < end)) {
            const int64_t i = at + lane;
            const float bias = buckets.rank_bias != nullptr && i < end ? buckets.rank_bias[i] : 0.0f;
            best.Push(i < end ? KeyOf(score + bias, buckets.by_rank[i]) : kNoKey);
            if (at >= end) continue;
            // Where the last of these 32 is below the bound, so is the rest of its run of equal bias, whose ids are
            // higher. A lower bias ends it all, unless rounding made its value the bound's own.
            const int64_t last = at + kWarp < end ? at + kWarp - 1 : end - 1;
            const float last_bias = buckets.rank_bias == nullptr ? 0.0f : buckets.rank_bias[last];
            const Key last_key = KeyOf(score + last_bias, buckets.by_rank[last]);
            if (last_key >= best.Threshold()) {
                at = last + 1;
            } else if (last_key >> 32 < best.Threshold() >> 32 || buckets.rank_bias == nullptr) {
                at = end;
            } else {
                at = EndOfRun(buckets.rank_bias, last + 1, end, last_bias);
            }
        }
        best.Flush();
        // Best first: where the first of the next buckets' best does not reach the bound, none does.
        if (first + warps < reached) {
            const int32_t next = scratch->reach[first + warps];
            const float value = Widen(LoadConstant<Pack<T, 1>>(scores + next).x[0]) + buckets.head_bias[next];
            if (KeyOf(value, 0) < best.Threshold()) break;
        }
    }
    WriteTopK(best, log, row, args.k, args.values, args.ids, args.logsumexp);
}

}  // namespace device
}  // namespace vq
