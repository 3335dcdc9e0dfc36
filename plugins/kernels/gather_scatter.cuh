// Every VQGatherScatter kernel, and which of them a plan asks for.
#pragma once

#include "gather_scatter_kernel.cuh"

namespace vq {

using GatherScatterKernelPointer = void (*)(GatherScatterKernelArgs);

namespace device {

template <typename T, typename Code, bool kVector>
GatherScatterKernelPointer KernelForRows(const GatherScatterPlan& p) {
    if (p.chunk == 0) return p.rows_per_block == 1 ? &GatherScatter<T, Code, 1, kVector, false> : nullptr;
    switch (p.rows_per_block) {
        case 1:
            return &GatherScatter<T, Code, 1, kVector, true>;
        case 2:
            return &GatherScatter<T, Code, 2, kVector, true>;
        case 4:
            return &GatherScatter<T, Code, 4, kVector, true>;
        case 8:
            if constexpr (sizeof(T) == 2) return &GatherScatter<T, Code, 8, kVector, true>;
    }
    return nullptr;
}

template <typename T>
GatherScatterKernelPointer KernelForCodes(int32_t code_bits, const GatherScatterPlan& p) {
    switch (code_bits) {
        case 8:
            return p.vector_stores ? KernelForRows<T, uint8_t, true>(p) : KernelForRows<T, uint8_t, false>(p);
        case 16:
            return p.vector_stores ? KernelForRows<T, uint16_t, true>(p) : KernelForRows<T, uint16_t, false>(p);
    }
    return nullptr;
}

}  // namespace device

// The kernel of a plan; null where there is none (a type, code_bits or plan that cannot be).
inline GatherScatterKernelPointer GatherScatterKernel(Type type, int32_t code_bits, const GatherScatterPlan& p) {
    switch (type) {
        case Type::kFloat32:
            return device::KernelForCodes<float>(code_bits, p);
        case Type::kFloat16:
            return device::KernelForCodes<__half>(code_bits, p);
        case Type::kBFloat16:
            return device::KernelForCodes<__nv_bfloat16>(code_bits, p);
    }
    return nullptr;
}

}  // namespace vq
