// The instruction sets that this processor has and this build knows, for tests that force each of them.
#pragma once

#include <vector>

#include "cpu/dispatch.h"

inline std::vector<vq::cpu::Isa> InstructionSets() {
    using vq::cpu::Isa;
    std::vector<Isa> all{Isa::kPortable};
    const Isa best = vq::cpu::BestIsa();
    if (best >= Isa::kAvx512) all.push_back(Isa::kAvx2);
    if (best == Isa::kAvx512Vbmi) all.push_back(Isa::kAvx512);
    if (best != Isa::kPortable) all.push_back(best);
    return all;
}
