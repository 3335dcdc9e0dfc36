// What the threads of one block work out together: sums, the logsumexp, and the place of a number in a row of weights.
//
// Everything is added in an order that only the block's width decides, so the same input gives the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vq::device {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float MinusInfinity() { return -__builtin_huge_valf(); }

// log of a sum of exponentials, as peak and sum of exp(x - peak); (-infinity, 0) is the empty sum.
struct LogSum {
    float peak, sum;

    __device__ __forceinline__ void Add(float x) {
        if (x > peak) {
            sum = sum * expf(peak - x) + 1.0f;
            peak = x;
        } else if (x != MinusInfinity()) {  // NaN too: it shall show in the sum
            sum += expf(x - peak);
        }
    }
    __device__ __forceinline__ void Add(const LogSum& other) {
        const float both = other.peak > peak ? other.peak : peak;
        if (both == MinusInfinity()) {
            sum += other.sum;  // 0, or the NaN of a sum that has nothing else
            return;
        }
        sum = (sum == 0.0f ? 0.0f : sum * expf(peak - both)) +
              (other.sum == 0.0f ? 0.0f : other.sum * expf(other.peak - both));
        peak = both;
    }
    __device__ __forceinline__ float Value() const { return peak + logf(sum); }
};

__device__ __forceinline__ LogSum EmptyLogSum() { return {MinusInfinity(), 0.0f}; }

// Shared memory of the functions below; one call at a time, each ends with a barrier.
struct BlockScratch {
    LogSum logs[kWarp];
    float bounds[kWarp];
    float total;
    int32_t first, last;
    int64_t index;
    float before, weight;
};

// The threads' sums as one, told to all of them.
__device__ __forceinline__ LogSum BlockLogSum(LogSum mine, BlockScratch* scratch) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
        LogSum other;
        other.peak = __shfl_down_sync(kAllLanes, mine.peak, step);
        other.sum = __shfl_down_sync(kAllLanes, mine.sum, step);
        if (lane < step) mine.Add(other);
    }
    if (lane == 0) scratch->logs[warp] = mine;
    __syncthreads();
    LogSum all = scratch->logs[0];
    for (int w = 1; w < warps; ++w) all.Add(scratch->logs[w]);
    __syncthreads();
    return all;
}

// Where a number fell: the entry, what lies before it and its own weight.
struct Place {
    int64_t index;
    float before, weight;
};

// `count` weights in their order, cut into one stretch for every thread.
template <typename Weight>
class OrderedWeights {
public:
    // weight(i): 0 or more, the same at every call. All threads of the block, and the same arguments.
    __device__ __forceinline__ OrderedWeights(int64_t count, const Weight& weight, BlockScratch* scratch)
        : weight_(weight), scratch_(scratch) {
        const int64_t each = (count + blockDim.x - 1) / blockDim.x;
        begin_ = each * threadIdx.x < count ? each * threadIdx.x : count;
        end_ = begin_ + each < count ? begin_ + each : count;
        own_ = 0.0f;
        for (int64_t i = begin_; i < end_; ++i) own_ += weight_(i);

        const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
        const int warps = static_cast<int>(blockDim.x) / kWarp;
        float upto = own_;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
            const float lower = __shfl_up_sync(kAllLanes, upto, step);
            if (lane >= step) upto += lower;
        }
        const float lower = __shfl_up_sync(kAllLanes, upto, 1);
        before_ = lane == 0 ? 0.0f : lower;
        if (lane == kWarp - 1) scratch_->bounds[warp] = upto;
        __syncthreads();
        if (threadIdx.x == 0) {
            float sum = 0.0f;
            for (int w = 0; w < warps; ++w) {
                const float next = sum + scratch_->bounds[w];
                scratch_->bounds[w] = sum;
                sum = next;
            }
            scratch_->total = sum;
        }
        __syncthreads();
        before_ += scratch_->bounds[warp];
        after_ = before_ + own_;
        total_ = scratch_->total;
        __syncthreads();
    }

    __device__ __forceinline__ float Total() const { return total_; }

    // The first entry whose cumulative weight passes `target`. Entries of weight 0 are never it, also when rounding
    // leaves the sum short of the target; with no weight at all, or NaN, it is entry 0.
    __device__ __forceinline__ Place Pick(float target) {
        if (threadIdx.x == 0) {
            scratch_->first = static_cast<int32_t>(blockDim.x);
            scratch_->last = -1;
            scratch_->index = 0;
            scratch_->before = scratch_->weight = 0.0f;
        }
        __syncthreads();
        if (own_ > 0.0f) {
            if (after_ > target) atomicMin(&scratch_->first, static_cast<int32_t>(threadIdx.x));
            atomicMax(&scratch_->last, static_cast<int32_t>(threadIdx.x));
        }
        __syncthreads();
        const int32_t chosen = scratch_->first < static_cast<int32_t>(blockDim.x) ? scratch_->first : scratch_->last;
        if (static_cast<int32_t>(threadIdx.x) == chosen) {
            float sum = before_;
            for (int64_t i = begin_; i < end_; ++i) {
                const float w = weight_(i);
                if (!(w > 0.0f)) continue;
                scratch_->index = i;
                scratch_->before = sum;
                scratch_->weight = w;
                sum += w;
                if (sum > target) break;
            }
        }
        __syncthreads();
        const Place place{scratch_->index, scratch_->before, scratch_->weight};
        __syncthreads();
        return place;
    }

private:
    const Weight& weight_;
    BlockScratch* scratch_;
    int64_t begin_, end_;
    float own_, before_, after_, total_;
};

}  // namespace vq::device
