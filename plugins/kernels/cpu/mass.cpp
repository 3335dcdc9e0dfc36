#include "cpu/mass.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace vq::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// With infinities among x: they hold all the mass there is.
double CountInfinite(float* x, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        x[i] = std::isnan(x[i]) ? x[i] : static_cast<float>(x[i] == kInfinity);
        sum += static_cast<double>(x[i]);
    }
    return sum;
}

}  // namespace

double Mass::Log(double scale) const { return peak * scale + std::log(sum); }

Mass MassOf(const Decode& decode, float* x, int64_t count, float scale) {
    const float peak = decode.largest(x, count);
    if (peak == kInfinity) return {static_cast<double>(peak), CountInfinite(x, count)};
    // Without a finite number there is nothing to take off, and -infinity less itself would be NaN.
    const float base = peak == -kInfinity ? 0.0f : peak;
    return {static_cast<double>(peak), static_cast<double>(decode.exponentials(x, count, base, scale))};
}

Mass Total(const Mass* masses, int64_t count, double scale) {
    Mass total{-std::numeric_limits<double>::infinity(), 0.0};
    for (int64_t i = 0; i < count; ++i) total.peak = std::max(total.peak, masses[i].peak);
    for (int64_t i = 0; i < count; ++i) total.sum += masses[i].sum * masses[i].Factor(total, scale);
    return total;
}

}  // namespace vq::cpu
