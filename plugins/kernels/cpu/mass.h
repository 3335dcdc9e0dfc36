// Sums of exponentials, block by block, so that neither threads nor the order of blocks show in a result.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/isa.h"

namespace vq::cpu {

// exp(scale * x) summed over some x: exp(scale * peak) * sum. `peak` is the largest x, sum is 1 or more; no x, or only
// -infinity: -infinity and 0. An infinite x counts 1 and others nothing; NaN among the x: sum is NaN.
struct Mass {
    double peak;
    double sum;

    // log of it, off by less than (2^-24) * (2 R + 64) for one block: exponentials are off by 4 units of 2^-24 and by
    // two roundings of their exponent, at most R = 88 (those of smaller numbers add up to nothing), and 33 sums follow.
    double Log(double scale) const;

    // What the sum is multiplied by where a mass of a peak no lower is the unit.
    double Factor(const Mass& unit, double scale) const {
        return peak == unit.peak ? 1.0 : std::exp((peak - unit.peak) * scale);
    }
};

// x [count], count at most kBlock, becomes exp(scale * (x - peak)).
Mass MassOf(const Decode& decode, float* x, int64_t count, float scale);

// All of masses [count] together.
Mass Total(const Mass* masses, int64_t count, double scale);

}  // namespace vq::cpu
