// Any processor: plain C++.
#include "cpu/isa.h"

namespace vq::cpu {
namespace {

#include "cpu/decode.inl"
#include "cpu/generic.inl"

}  // namespace

const Kernels& PortableKernels() {
    static constexpr Kernels kKernels{OneRowByLoads, EightRows, Interleave, Widen, Narrow, kDecode};
    return kKernels;
}

}  // namespace vq::cpu
