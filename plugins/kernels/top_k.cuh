// Every VQTopK kernel that depends on types, and which of them a launch asks for.
#pragma once

#include "top_k_kernel.cuh"

namespace vq {

struct TopKKernels {
    void (*stream)(TopKStreamArgs) = nullptr;
    void (*buckets)(TopKBucketArgs) = nullptr;
};

// The kernels of a type; null ones where there are none.
inline TopKKernels TopKKernelsOf(Type type, int32_t code_bits) {
    const auto of = [code_bits](auto number) -> TopKKernels {
        using T = decltype(number);
        if (code_bits == 8) return {&device::TopKStream<T, uint8_t>, &device::TopKBuckets<T, uint8_t>};
        if (code_bits == 16) return {&device::TopKStream<T, uint16_t>, &device::TopKBuckets<T, uint16_t>};
        return {};
    };
    switch (type) {
        case Type::kFloat32:
            return of(float{});
        case Type::kFloat16:
            return of(__half{});
        case Type::kBFloat16:
            return of(__nv_bfloat16{});
    }
    return {};
}

}  // namespace vq
