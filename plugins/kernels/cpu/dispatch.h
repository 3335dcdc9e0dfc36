// What all CPU kernels take: the instruction set, and threads from the caller.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "vq/shape.h"

namespace vq::cpu {

enum class Isa { kPortable, kNeon, kAvx2, kAvx512, kAvx512Vbmi };

// The best instruction set that this build and this processor share; the environment variable EXPORT_VQ_ISA
// (portable, neon, avx2, avx512, avx512vbmi) may ask for a lesser one. Throws std::invalid_argument for what is not
// there.
Isa BestIsa();
const char* IsaName(Isa isa);

// Runs body(i) for i in [0, count), in any order, on any threads; returns when all are done.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

// One after the other, on the caller's thread.
void Serial(int64_t count, const std::function<void(int64_t)>& body);

// Runs body(begin, end, part) over [0, count), cut into `parts` ranges.
template <typename Body>
void ForParts(int64_t count, int64_t parts, const ParallelFor& parallel, const Body& body) {
    const auto part = [&](int64_t i) { body(count * i / parts, count * (i + 1) / parts, i); };
    if (parts == 1) return part(0);
    parallel(parts, part);
}

// Into how many parts to cut `count` pieces of work that make `lookups` table look-ups together.
int64_t PartsFor(int64_t count, int64_t lookups, int64_t threads);

// `count` numbers of T as float32: exact.
void Widen(const void* in, Type type, int64_t count, float* out);

struct Kernels;
const Kernels& KernelsOf(Isa isa);

// `count` numbers of T as float32, copied only where they are not float32 already.
class Widened {
public:
    Widened(const Kernels& kernels, const void* in, Type type, int64_t count);
    const float* data() const { return data_; }

private:
    std::vector<float> copy_;
    const float* data_;
};

}  // namespace vq::cpu
