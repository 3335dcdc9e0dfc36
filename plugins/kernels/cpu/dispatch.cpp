#include "cpu/dispatch.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"

namespace vq::cpu {
namespace {

// Look-ups below which a second thread costs more than it brings.
constexpr int64_t kLookupsPerPart = 1 << 16;

}  // namespace

const Kernels& KernelsOf(Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::kAvx2:
            return Avx2Kernels();
        case Isa::kAvx512:
            return Avx512Kernels();
        case Isa::kAvx512Vbmi:
            return Avx512VbmiKernels();
#elif defined(__aarch64__)
        case Isa::kNeon:
            return NeonKernels();
#endif
        default:
            return PortableKernels();
    }
}

Isa BestIsa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        return __builtin_cpu_supports("avx512vbmi") ? Isa::kAvx512Vbmi : Isa::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#elif defined(__aarch64__)
    return Isa::kNeon;
#endif
    return Isa::kPortable;
}

const char* IsaName(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return "portable";
        case Isa::kNeon:
            return "NEON";
        case Isa::kAvx2:
            return "AVX2";
        case Isa::kAvx512:
            return "AVX-512";
        case Isa::kAvx512Vbmi:
            return "AVX-512 VBMI";
    }
    return "unknown";
}

void Serial(int64_t count, const std::function<void(int64_t)>& body) {
    for (int64_t i = 0; i < count; ++i) body(i);
}

int64_t PartsFor(int64_t count, int64_t lookups, int64_t threads) {
    return std::clamp<int64_t>(std::min(threads, lookups / kLookupsPerPart), 1, count);
}

void Widen(const void* in, Type type, int64_t count, float* out) {
    if (type == Type::kFloat32) {
        std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
    } else {
        PortableKernels().widen(in, type, count, out);
    }
}

}  // namespace vq::cpu
