// Values that move as one load or store, and the floating-point types' ways to and from float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

namespace vq::device {

// N values that move as one load or store.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
    T x[N];
};

template <int kBytes>
struct RawType;
template <>
struct RawType<1> {
    using Type = unsigned char;
};
template <>
struct RawType<2> {
    using Type = unsigned short;
};
template <>
struct RawType<4> {
    using Type = unsigned;
};
template <>
struct RawType<8> {
    using Type = uint2;
};
template <>
struct RawType<16> {
    using Type = uint4;
};

// Through one raw value: compilers cut copies of a Pack<float, N> into single floats.
template <typename P, typename T>
__device__ __forceinline__ P LoadConstant(const T* from) {
    const auto raw = __ldg(reinterpret_cast<const typename RawType<sizeof(P)>::Type*>(from));
    P out;
    memcpy(&out, &raw, sizeof(P));
    return out;
}

template <typename P>
__device__ __forceinline__ P LoadShared(const P* from) {
    const auto raw = *reinterpret_cast<const typename RawType<sizeof(P)>::Type*>(from);
    P out;
    memcpy(&out, &raw, sizeof(P));
    return out;
}

template <typename P, typename T>
__device__ __forceinline__ void StoreShared(const P& value, T* to) {
    typename RawType<sizeof(P)>::Type raw;
    memcpy(&raw, &value, sizeof(P));
    *reinterpret_cast<typename RawType<sizeof(P)>::Type*>(to) = raw;
}

// Streaming: the logits may well be many times the L2 cache, and shall not drive codes and code logits out of it.
template <typename P, typename T>
__device__ __forceinline__ void StoreGlobal(const P& value, T* to) {
    typename RawType<sizeof(P)>::Type raw;
    memcpy(&raw, &value, sizeof(P));
    __stcs(reinterpret_cast<typename RawType<sizeof(P)>::Type*>(to), raw);
}

__device__ __forceinline__ float Widen(float x) { return x; }
__device__ __forceinline__ float Widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float Widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void Round(float x, float* out) { *out = x; }
__device__ __forceinline__ void Round(float x, __half* out) { *out = __float2half_rn(x); }
__device__ __forceinline__ void Round(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

// Two neighbours, in one instruction where there is one.
__device__ __forceinline__ void RoundPair(float a, float b, float* out) {
    out[0] = a;
    out[1] = b;
}
__device__ __forceinline__ void RoundPair(float a, float b, __half* out) {
    const __half2 pair = __floats2half2_rn(a, b);
    out[0] = pair.x;
    out[1] = pair.y;
}
__device__ __forceinline__ void RoundPair(float a, float b, __nv_bfloat16* out) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    out[0] = pair.x;
    out[1] = pair.y;
}

}  // namespace vq::device
