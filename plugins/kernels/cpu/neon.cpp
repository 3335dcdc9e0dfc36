// 64-bit Arm: look-ups stay scalar (there is no gather), eight rows and conversions are vectors.
#include <arm_neon.h>

#include "cpu/isa.h"

namespace vq::cpu {
namespace {

#include "cpu/decode.inl"
#include "cpu/generic.inl"

void WidenNeon(const void* in, Type type, int64_t count, float* out) {
    if (type == Type::kBFloat16) return Widen(in, type, count, out);
    const auto* halves = static_cast<const uint16_t*>(in);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
    for (; i < count; ++i) out[i] = FloatFromFloat16(halves[i]);
}

void NarrowNeon(const float* in, Type type, int64_t count, void* out) {
    if (type == Type::kBFloat16) return Narrow(in, type, count, out);
    auto* halves = static_cast<uint16_t*>(out);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) vst1_u16(halves + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
    for (; i < count; ++i) halves[i] = Float16FromFloat(in[i]);
}

}  // namespace

const Kernels& NeonKernels() {
    static constexpr Kernels kKernels{OneRowByLoads, EightRows, Interleave, WidenNeon, NarrowNeon, kDecode};
    return kKernels;
}

}  // namespace vq::cpu
