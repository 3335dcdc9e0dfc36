// Logits of one row, tile by tile of the vocabulary, in shared memory and nowhere else.
#pragma once

#include "block.cuh"
#include "pack.cuh"
#include "stream_plan.h"

namespace vq {

// Pointers as in launch.h; codes_stride: ids from one codebook to the next.
struct StreamArgs {
    const void* code_logits;
    const void* codes;
    const void* bias;
    GatherScatterShape shape;
    int64_t codes_stride;
    StreamPlan plan;
};

namespace device {

// T: type of the code logits and bias. Code: of the packed ids.
template <typename T, typename Code>
class LogitTiles {
public:
    static constexpr int N = plan::kStoreBytes / sizeof(Code);  // tokens of a thread

    // shared: sum_bytes, then the staged code logits.
    __device__ __forceinline__ LogitTiles(const StreamArgs& args, int64_t row, unsigned char* shared)
        : args_(args),
          source_(static_cast<const T*>(args.code_logits) + row * args.shape.num_codebooks * args.shape.num_codes),
          sums_(reinterpret_cast<float*>(shared)),
          table_(reinterpret_cast<T*>(shared + args.plan.sum_bytes)),
          lanes_(static_cast<int>(blockDim.x) / args.plan.split),
          staged_(false) {}

    // Works out the logits of a tile; all threads of the block, barriers at both ends.
    __device__ __forceinline__ void Load(int64_t tile) {
        const int64_t tokens = static_cast<int64_t>(lanes_) * N, left = args_.shape.vocab_size - tile * tokens;
        start_ = tile * tokens;
        count_ = static_cast<int>(left < tokens ? left : tokens);
        const int lane = static_cast<int>(threadIdx.x) % lanes_, share = static_cast<int>(threadIdx.x) / lanes_;
        const int64_t m_count = args_.shape.num_codebooks;
        // Rows of ids are padded to 16 bytes, so a load that begins with a token of the vocabulary ends inside.
        const bool exists = lane * N < count_;
        const Code* ids = static_cast<const Code*>(args_.codes) + start_ + (exists ? lane * N : 0);
        float sum[N] = {};
        if (args_.plan.chunk == 0) {
            Add(ids, share, m_count, source_, sum);
        } else {
            for (int64_t first = 0; first < m_count; first += args_.plan.chunk) {
                const int64_t next = first + args_.plan.chunk, end = next < m_count ? next : m_count;
                Stage(first, end);
                Add(ids, first + share, end, table_ - first * args_.shape.num_codes, sum);
            }
        }
        __syncthreads();  // the tile before may still be read
#pragma unroll
        for (int j = 0; j < N; ++j) sums_[(share * N + j) * (lanes_ + 1) + lane] = sum[j];
        __syncthreads();
    }

    __device__ __forceinline__ int Count() const { return count_; }               // tokens of the tile
    __device__ __forceinline__ int64_t Token(int i) const { return start_ + i; }  // id of the i-th
    __device__ __forceinline__ float Logit(int i) const {
        float logit = 0.0f;
        for (int share = 0; share < args_.plan.split; ++share) {
            logit += sums_[(share * N + i % N) * (lanes_ + 1) + i / N];
        }
        if (args_.bias != nullptr) {
            logit += Widen(LoadConstant<Pack<T, 1>>(static_cast<const T*>(args_.bias) + start_ + i).x[0]);
        }
        return logit;
    }

private:
    // Adds codebooks [m, end) in steps of the split. The ids of a batch are fetched while those of the last are looked
    // up.
    __device__ __forceinline__ void Add(const Code* ids, int64_t m, int64_t end, const T* table,
                                        float (&sum)[N]) const {
        constexpr int kBatch = 2;
        const int64_t step = args_.plan.split;
        Pack<Code, N> now[kBatch] = {}, next[kBatch] = {};
        Fetch(ids, m, end, now);
#pragma unroll 1
        for (; m < end; m += kBatch * step) {
            Fetch(ids, m + kBatch * step, end, next);
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                if (m + b * step >= end) break;
                const T* const row = table + (m + b * step) * args_.shape.num_codes;
#pragma unroll
                for (int j = 0; j < N; ++j) sum[j] += Widen(row[now[b].x[j]]);
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b) now[b] = next[b];
        }
    }

    template <int kBatch>
    __device__ __forceinline__ void Fetch(const Code* ids, int64_t m, int64_t end, Pack<Code, N> (&to)[kBatch]) const {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int64_t at = m + b * args_.plan.split;
            if (at < end) to[b] = LoadConstant<Pack<Code, N>>(ids + at * args_.codes_stride);
        }
    }

    // Copies the code logits of codebooks [first, end) to shared memory, once where all of them fit.
    __device__ __forceinline__ void Stage(int64_t first, int64_t end) {
        if (staged_) return;
        staged_ = args_.plan.chunk >= args_.shape.num_codebooks;
        __syncthreads();  // others may still look up what is overwritten here
        const T* const from = source_ + first * args_.shape.num_codes;
        const int count = static_cast<int>((end - first) * args_.shape.num_codes);
        constexpr int W = plan::kStoreBytes / sizeof(T);
        if (count % W == 0 && reinterpret_cast<uintptr_t>(from) % plan::kStoreBytes == 0) {
            for (int i = static_cast<int>(threadIdx.x) * W; i < count; i += static_cast<int>(blockDim.x) * W) {
                StoreShared(LoadConstant<Pack<T, W>>(from + i), table_ + i);
            }
        } else {
            for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
                table_[i] = LoadConstant<Pack<T, 1>>(from + i).x[0];
            }
        }
        __syncthreads();
    }

    const StreamArgs& args_;
    const T* source_;
    float* sums_;
    T* table_;
    int lanes_, count_;
    int64_t start_;
    bool staged_;
};

}  // namespace device
}  // namespace vq
