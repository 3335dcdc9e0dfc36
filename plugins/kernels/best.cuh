// The k best of a stream of logits, kept by one block: equal values by lower token id.
#pragma once

#include "block.cuh"

namespace vq::device {

// Value and token as one number: greater is better, and no two tokens are equal. -0 is 0, and NaN is above infinity.
using Key = unsigned long long;
inline constexpr Key kNoKey = 0;  // below every token's

__device__ __forceinline__ Key KeyOf(float value, int32_t token) {
    value += 0.0f;
    unsigned bits;
    memcpy(&bits, &value, sizeof(bits));
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return static_cast<Key>(bits) << 32 | ~static_cast<unsigned>(token);
}

__device__ __forceinline__ float ValueOf(Key key) {
    unsigned bits = static_cast<unsigned>(key >> 32);
    bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

__device__ __forceinline__ int32_t TokenOf(Key key) { return static_cast<int32_t>(~static_cast<unsigned>(key)); }

inline constexpr int kBestCapacity = 1024;  // keys: 256 kept and a candidate of each of 512 threads fit

struct BestScratch {
    Key keys[kBestCapacity];  // the kept ones, falling, then the candidates
    int32_t count;            // of candidates
};

// Candidates that beat the k-th best so far are collected, and sorted only when there may be no room for more: after
// the first few hundred tokens hardly any beats it. The keys being different, the order they came in leaves no trace.
class Best {
public:
    __device__ __forceinline__ Best(int k, BestScratch* scratch) : scratch_(scratch), k_(k) { Clear(kNoKey); }

    // Forgets all; from now on nothing below `least` counts, which at least k candidates to come must reach.
    __device__ __forceinline__ void Clear(Key least) {
        kept_ = count_ = 0;
        single_ = kNoKey;
        threshold_ = least == kNoKey ? kNoKey : least - 1;
        __syncthreads();
        if (threadIdx.x == 0) scratch_->count = 0;
        __syncthreads();
    }

    // One candidate of every thread, or kNoKey. All threads of the block.
    __device__ __forceinline__ void Push(Key key) {
        if (k_ == 1) {  // greedy decoding sorts nothing
            if (key > single_) single_ = key;
            return;
        }
        if (kept_ + count_ + static_cast<int>(blockDim.x) > kBestCapacity) Flush();
        const bool passes = key > threshold_;
        const unsigned voters = __ballot_sync(kAllLanes, passes);
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        int32_t at = 0;
        if (lane == 0 && voters != 0) at = atomicAdd(&scratch_->count, __popc(voters));
        at = __shfl_sync(kAllLanes, at, 0);
        if (passes) scratch_->keys[kept_ + at + __popc(voters & ((1u << lane) - 1))] = key;
        __syncthreads();
        count_ = scratch_->count;
        __syncthreads();
    }

    // Candidates become the k best. Afterwards At(0 .. Kept()) are those, falling.
    __device__ __forceinline__ void Flush() {
        if (k_ == 1) return Reduce();
        if (count_ == 0) return;
        const int total = kept_ + count_;
        int size = 2;
        while (size < total) size *= 2;
        for (int i = total + static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) {
            scratch_->keys[i] = kNoKey;
        }
        if (threadIdx.x == 0) scratch_->count = 0;
        __syncthreads();
        Sort(size);
        kept_ = total < k_ ? total : k_;
        count_ = 0;
        if (kept_ == k_) threshold_ = scratch_->keys[k_ - 1];
    }

    __device__ __forceinline__ int Kept() const { return kept_; }
    __device__ __forceinline__ Key At(int i) const { return scratch_->keys[i]; }
    __device__ __forceinline__ Key Threshold() const { return k_ == 1 ? single_ : threshold_; }
    // Whether any candidate came since the last Flush.
    __device__ __forceinline__ bool Grew() const { return count_ > 0; }

private:
    __device__ __forceinline__ void Reduce() {
        Key best = single_;
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) {
            const Key other = __shfl_xor_sync(kAllLanes, best, step);
            if (other > best) best = other;
        }
        const int warps = static_cast<int>(blockDim.x) / kWarp;
        __syncthreads();
        if (threadIdx.x % kWarp == 0) scratch_->keys[threadIdx.x / kWarp] = best;
        __syncthreads();
        for (int w = 0; w < warps; ++w) {
            if (scratch_->keys[w] > best) best = scratch_->keys[w];
        }
        __syncthreads();
        if (threadIdx.x == 0) scratch_->keys[0] = best;
        single_ = best;
        kept_ = best == kNoKey ? 0 : 1;
        __syncthreads();
    }

    // Bitonic, falling. A warp's 32 pairs of a step lie within its own 64 keys while they are at most 32 apart, and
    // then no other warp has to be waited for.
    __device__ __forceinline__ void Sort(int size) {
        Key* const keys = scratch_->keys;
        for (int run = 2; run <= size; run *= 2) {
            for (int apart = run / 2; apart > 0; apart /= 2) {
                for (int pair = static_cast<int>(threadIdx.x); pair < size / 2; pair += static_cast<int>(blockDim.x)) {
                    const int low = 2 * pair - (pair & (apart - 1)), high = low + apart;
                    const Key a = keys[low], b = keys[high];
                    if ((a < b) == ((low & run) == 0)) {
                        keys[low] = b;
                        keys[high] = a;
                    }
                }
                const int next = apart > 1 ? apart / 2 : run;
                if (apart > kWarp || next > kWarp) {
                    __syncthreads();
                } else {
                    __syncwarp();
                }
            }
        }
        __syncthreads();
    }

    BestScratch* scratch_;
    int k_, kept_, count_;
    Key single_, threshold_;
};

}  // namespace vq::device
