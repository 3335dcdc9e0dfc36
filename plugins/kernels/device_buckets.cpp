#include "device_buckets.h"

#include <cstring>
#include <vector>

#include "gather_scatter_plan.h"

namespace vq {
namespace {

template <typename Number>
size_t BytesOf(const std::vector<Number>& numbers) {
    return static_cast<size_t>(plan::RoundUp(static_cast<int64_t>(numbers.size() * sizeof(Number)), plan::kStoreBytes));
}

}  // namespace

// A failure here leaves nothing to do: the context is gone or going.
void OwnedBuckets::CudaFree::operator()(void* memory) const noexcept { (void)cudaFree(memory); }

cudaError_t OwnedBuckets::Upload(const Buckets& b) {
    const size_t total = BytesOf(b.starts) + BytesOf(b.by_id) + BytesOf(b.by_rank) + BytesOf(b.rank_bias) +
                         BytesOf(b.head) + BytesOf(b.head_bias) + BytesOf(b.next_bias) + BytesOf(b.mass);
    void* memory = nullptr;
    if (const cudaError_t status = cudaMalloc(&memory, total); status != cudaSuccess) return status;
    std::unique_ptr<void, CudaFree> owned(memory);
    std::vector<unsigned char> host(total);
    size_t at = 0;
    const auto place = [&](const auto& numbers) {
        using Number = typename std::decay_t<decltype(numbers)>::value_type;
        if (numbers.empty()) return static_cast<const Number*>(nullptr);
        std::memcpy(host.data() + at, numbers.data(), numbers.size() * sizeof(Number));
        const void* on_device = static_cast<unsigned char*>(memory) + at;
        at += BytesOf(numbers);
        return static_cast<const Number*>(on_device);
    };
    DeviceBuckets pointers{};
    pointers.starts = place(b.starts);
    pointers.by_id = place(b.by_id);
    pointers.by_rank = place(b.by_rank);
    pointers.rank_bias = place(b.rank_bias);
    pointers.head = place(b.head);
    pointers.head_bias = place(b.head_bias);
    pointers.next_bias = place(b.next_bias);
    pointers.mass = place(b.mass);
    pointers.codes = b.num_codes();
    const cudaError_t status = cudaMemcpy(memory, host.data(), total, cudaMemcpyHostToDevice);
    if (status != cudaSuccess) return status;
    memory_ = std::move(owned);
    pointers_ = pointers;
    return cudaSuccess;
}

}  // namespace vq
