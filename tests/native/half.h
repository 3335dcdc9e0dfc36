// Half types for tests, by definition rather than by bits: slow, and sharing nothing with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vq/shape.h"

namespace half {

inline int MantissaBits(vq::Type type) { return type == vq::Type::kFloat32 ? 24 : type == vq::Type::kFloat16 ? 11 : 8; }

inline int MinExponent(vq::Type type) {
    return type == vq::Type::kFloat16 ? -13 : -125;
}  // of the smallest normal, as frexp says

// The spacing of T at a value.
inline double Spacing(double value, vq::Type type) {
    int exponent = 0;
    std::frexp(value, &exponent);
    return std::ldexp(1.0, std::max(exponent, MinExponent(type)) - MantissaBits(type));
}

// Half a unit in the last place of T at a value: what one rounding may lose.
inline double Rounding(double value, vq::Type type) { return 0.5 * Spacing(value, type); }

// The nearest number of T, ties to even.
inline float Rounded(double value, vq::Type type) {
    if (value == 0.0) return 0.0f;
    const double step = Spacing(value, type);
    return static_cast<float>(std::nearbyint(value / step) * step);
}

inline double Value(uint16_t bits, vq::Type type) {
    const int fraction_bits = MantissaBits(type) - 1, bias = type == vq::Type::kFloat16 ? 15 : 127;
    const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
    const double magnitude = exponent == 0
                                 ? std::ldexp(fraction, 1 - bias - fraction_bits)
                                 : std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
    return bits & 0x8000 ? -magnitude : magnitude;
}

// Numbers of T as bytes; values must be exact in T.
inline void Store(const std::vector<float>& values, vq::Type type, void* out) {
    if (values.empty()) return;  // whose data() may be null
    if (type == vq::Type::kFloat32) {
        std::memcpy(out, values.data(), values.size() * sizeof(float));
        return;
    }
    const int fraction_bits = MantissaBits(type) - 1, bias = type == vq::Type::kFloat16 ? 15 : 127;
    for (size_t i = 0; i < values.size(); ++i) {
        const double magnitude = std::abs(static_cast<double>(values[i]));
        int exponent = 0;
        std::frexp(magnitude, &exponent);
        uint16_t bits = 0;
        if (magnitude > 0.0 && exponent >= MinExponent(type)) {
            const auto mantissa = static_cast<uint16_t>(std::ldexp(magnitude, fraction_bits + 1 - exponent));
            bits = static_cast<uint16_t>(((exponent - 1 + bias) << fraction_bits) + mantissa - (1 << fraction_bits));
        } else if (magnitude > 0.0) {
            bits = static_cast<uint16_t>(std::ldexp(magnitude, fraction_bits + bias - 1));
        }
        if (std::signbit(values[i])) bits |= 0x8000;
        std::memcpy(static_cast<uint8_t*>(out) + 2 * i, &bits, sizeof bits);
    }
}

inline std::vector<float> Load(const void* bytes, size_t count, vq::Type type) {
    std::vector<float> values(count);
    for (size_t i = 0; i < count; ++i) {
        if (type == vq::Type::kFloat32) {
            std::memcpy(&values[i], static_cast<const uint8_t*>(bytes) + 4 * i, sizeof(float));
        } else {
            uint16_t bits;
            std::memcpy(&bits, static_cast<const uint8_t*>(bytes) + 2 * i, sizeof bits);
            values[i] = static_cast<float>(Value(bits, type));
        }
    }
    return values;
}

}  // namespace half
