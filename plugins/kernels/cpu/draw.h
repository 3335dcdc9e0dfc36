// Inverting a cumulative distribution: which of some weights a number in [0, 1) falls on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/mass.h"

namespace vq::cpu {

// What was drawn, and how far into its stretch, 0 to 1.
struct Drawn {
    int64_t index;
    double share;
};

// The first of weight(0 .. count - 1) whose cumulative sum exceeds `target`. Weight 0 is never drawn, also where
// rounding leaves the sum short of the target; if there is no other, or all is NaN, index 0 is.
template <typename Weight>
Drawn Draw(int64_t count, double target, const Weight& weight) {
    Drawn drawn{0, 0.0};
    double before = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        const double w = weight(i);
        if (!(w > 0.0)) continue;
        const double left = target - before;
        drawn = {i, left > 0.0 ? std::min(left / w, 1.0) : 0.0};
        before += w;
        if (before > target) break;
    }
    return drawn;
}

// Of masses [count] that make `total` together. One whose largest number is 0 in float32 beside the largest of all has
// no chance; neither has such a number below.
inline Drawn DrawMass(const Mass* masses, int64_t count, const Mass& total, double scale, double uniform) {
    return Draw(count, uniform * total.sum, [&](int64_t i) {
        const double factor = masses[i].Factor(total, scale);
        return static_cast<float>(factor) > 0.0f ? masses[i].sum * factor : 0.0;
    });
}

// Of the numbers that MassOf left behind, which made `mass`, a part of `total`.
inline Drawn DrawFrom(const float* numbers, int64_t count, const Mass& mass, const Mass& total, double scale,
                      double uniform) {
    const double factor = mass.Factor(total, scale);
    return Draw(count, uniform * mass.sum * factor,
                [numbers, factor](int64_t i) { return static_cast<double>(static_cast<float>(numbers[i] * factor)); });
}

}  // namespace vq::cpu
