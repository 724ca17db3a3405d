// bfloat16 as CUDA has it, by hand: the upper half of a float.
#pragma once

#include <cuda_runtime.h>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

// To the nearest, and to the even one of two that are equally near.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (isnan(x)) return {0x7FFF};
  const uint32_t bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
