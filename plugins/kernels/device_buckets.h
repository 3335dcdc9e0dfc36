// Buckets (buckets.h) on the current device: one allocation, copied once, when an adapter is made.
#pragma once

#include <memory>

#include "buckets.h"
#include "vq/launch.h"

namespace vq {

class OwnedBuckets {
public:
    // Returns cudaSuccess, or why the tables are not on the device; then nothing is held.
    cudaError_t Upload(const Buckets& buckets);

    const DeviceBuckets& get() const { return pointers_; }

private:
    struct CudaFree {
        void operator()(void* memory) const noexcept;
    };
    std::unique_ptr<void, CudaFree> memory_;
    DeviceBuckets pointers_{};
};

}  // namespace vq
