// Every VQSample kernel, and which of them a launch asks for.
#pragma once

#include "sample_kernel.cuh"

namespace vq {

struct SampleKernels {
    void (*parts)(SampleStreamArgs) = nullptr;
    void (*token)(SampleStreamArgs) = nullptr;
    void (*peaks)(SampleCodeArgs) = nullptr;
    void (*sums)(SampleCodeArgs) = nullptr;
    void (*code)(SampleCodeArgs) = nullptr;
};

namespace device {

template <typename T, typename Code>
SampleKernels SampleKernelsOfTypes() {
    return {&SampleParts<T, Code>, &SampleToken<T, Code>, &SamplePeaks<T, Code>, &SampleSums<T, Code>,
            &SampleCode<T, Code>};
}

}  // namespace device

// The kernels of a type; null ones where there are none.
inline SampleKernels SampleKernelsOf(Type type, int32_t code_bits) {
    const auto of = [code_bits](auto number) -> SampleKernels {
        using T = decltype(number);
        if (code_bits == 8) return device::SampleKernelsOfTypes<T, uint8_t>();
        if (code_bits == 16) return device::SampleKernelsOfTypes<T, uint16_t>();
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
