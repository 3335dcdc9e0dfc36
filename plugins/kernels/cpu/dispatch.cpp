#include "cpu/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace vq::cpu {
namespace {

// Look-ups below which a second thread costs more than it brings.
constexpr int64_t kLookupsPerPart = 1 << 16;

#if defined(__x86_64__)
bool Has(Isa isa) {
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (isa) {
        case Isa::kPortable:
            return true;
        case Isa::kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::kAvx512:
            return avx512;
        case Isa::kAvx512Vbmi:
            return avx512 && __builtin_cpu_supports("avx512vbmi");
        default:
            return false;
    }
}
#elif defined(__aarch64__)
bool Has(Isa isa) { return isa == Isa::kPortable || isa == Isa::kNeon; }
#else
bool Has(Isa isa) { return isa == Isa::kPortable; }
#endif

constexpr struct {
    const char* name;
    Isa isa;
} kNames[]{{"portable", Isa::kPortable},
           {"neon", Isa::kNeon},
           {"avx2", Isa::kAvx2},
           {"avx512", Isa::kAvx512},
           {"avx512vbmi", Isa::kAvx512Vbmi}};

Isa Named(const std::string& wanted) {
    std::string there;
    for (const auto& known : kNames) {
        if (!Has(known.isa)) continue;
        if (wanted == known.name) return known.isa;
        there += (there.empty() ? "" : ", ") + std::string(known.name);
    }
    throw std::invalid_argument("the environment variable EXPORT_VQ_ISA is \"" + wanted + "\"; this processor has " +
                                there);
}

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
    if (const char* wanted = std::getenv("EXPORT_VQ_ISA")) return Named(wanted);
    Isa best = Isa::kPortable;
    for (const auto& known : kNames) {
        if (Has(known.isa)) best = known.isa;
    }
    return best;
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

Widened::Widened(const Kernels& kernels, const void* in, Type type, int64_t count)
    : data_(static_cast<const float*>(in)) {
    if (type == Type::kFloat32) return;
    copy_.resize(static_cast<size_t>(count));
    kernels.widen(in, type, count, copy_.data());
    data_ = copy_.data();
}

}  // namespace vq::cpu
