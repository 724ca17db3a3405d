// float16 as CUDA has it, by hand: 1 sign bit, 5 bits of exponent, 10 of mantissa.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

inline float __half2float(__half half) {
  const int exponent = half.bits >> 10 & 31, mantissa = half.bits & 1023;
  const float sign = half.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa == 0 ? sign * INFINITY : NAN;
  return sign * ldexpf(static_cast<float>(exponent == 0 ? mantissa : mantissa + 1024), std::max(exponent, 1) - 25);
}

// To the nearest, and to the even one of two that are equally near.
inline __half __float2half_rn(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  if (isnan(x)) return {0x7FFF};
  const float size = fabsf(x);
  if (size == 0.0f) return {sign};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  int exponent;
  frexpf(size, &exponent);                        // size < 2^exponent
  const int unit = std::max(exponent - 11, -24);  // of the last bit: 2^unit
  const int units = static_cast<int>(nearbyintf(ldexpf(size, -unit)));  // up to 2048; the hidden bit counts the exponent up
  return {static_cast<uint16_t>(sign | ((unit + 24) * 1024 + units))};
}
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
