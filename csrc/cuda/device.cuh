// The number types of the CUDA kernels, with the functions that terms/number.h asks for, and after them the
// formulas: float and double, and Pack, a few of them side by side in one thread. A formula that is evaluated for a pack
// takes each of its branches once instead of once for each number.
#pragma once

#include <cuda_runtime.h>

#include "../problem.h"
#include "../terms/number.h"

namespace elbo_ext {
namespace {

// expf is right to 2 ulp. __expf, whose error grows with its argument, is not good enough for sums that cancel.
__device__ __forceinline__ float fast_exp(float x) { return ::expf(x); }
__device__ __forceinline__ double fast_exp(double x) { return ::exp(x); }
__device__ __forceinline__ float exp(float x) { return ::expf(x); }
__device__ __forceinline__ double exp(double x) { return ::exp(x); }
__device__ __forceinline__ float log(float x) { return ::logf(x); }
__device__ __forceinline__ double log(double x) { return ::log(x); }
__device__ __forceinline__ float log1p(float x) { return ::log1pf(x); }
__device__ __forceinline__ double log1p(double x) { return ::log1p(x); }
__device__ __forceinline__ float sqrt(float x) { return ::sqrtf(x); }
__device__ __forceinline__ double sqrt(double x) { return ::sqrt(x); }
// For terms/noise.h: to 1 ulp, by an inverse root that is right to 2^-22 and one step of Newton's method, every operation
// rounded as written, so that all kernels make the same normals.
__device__ __forceinline__ float root(float x) {
  const float inverse = ::rsqrtf(x), near = __fmul_rn(x, inverse);
  return __fmaf_rn(__fmul_rn(0.5f, inverse), __fmaf_rn(-near, near, x), near);
}
__device__ __forceinline__ double root(double x) { return ::sqrt(x); }
__device__ __forceinline__ float abs(float x) { return ::fabsf(x); }
__device__ __forceinline__ double abs(double x) { return ::fabs(x); }
template <class R>
__device__ __forceinline__ R minimum(R a, R b) { return a > b ? b : a; }  // NaN where a is
template <class R>
__device__ __forceinline__ R select(bool mask, R yes, R no) { return mask ? yes : no; }
__device__ __forceinline__ bool any(bool mask) { return mask; }

template <class R, int kCount>
struct Pack {
  R x[kCount];
  Pack() = default;
  explicit __device__ __forceinline__ Pack(R number) {
    ELBO_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = number;
  }
};
template <int kCount>
struct PackMask {
  bool x[kCount];
};
template <class R, int kCount>
struct RealOf<Pack<R, kCount>> {
  using type = R;
};

#define ELBO_PACK_OPERATOR(RESULT, NAME, EXPRESSION)                                           \
  template <class R, int kCount>                                                               \
  __device__ __forceinline__ RESULT NAME(const Pack<R, kCount>& a, const Pack<R, kCount>& b) { \
    RESULT result;                                                                             \
    ELBO_UNROLL                                                                                \
    for (int i = 0; i < kCount; ++i) result.x[i] = EXPRESSION;                                 \
    return result;                                                                             \
  }
#define ELBO_PACK Pack<R, kCount>
ELBO_PACK_OPERATOR(ELBO_PACK, operator+, a.x[i] + b.x[i])
ELBO_PACK_OPERATOR(ELBO_PACK, operator-, a.x[i] - b.x[i])
ELBO_PACK_OPERATOR(ELBO_PACK, operator*, a.x[i] * b.x[i])
ELBO_PACK_OPERATOR(ELBO_PACK, operator/, a.x[i] / b.x[i])
ELBO_PACK_OPERATOR(ELBO_PACK, minimum, minimum(a.x[i], b.x[i]))
ELBO_PACK_OPERATOR(PackMask<kCount>, operator<, a.x[i] < b.x[i])
ELBO_PACK_OPERATOR(PackMask<kCount>, operator>, a.x[i] > b.x[i])
ELBO_PACK_OPERATOR(PackMask<kCount>, operator<=, a.x[i] <= b.x[i])
ELBO_PACK_OPERATOR(PackMask<kCount>, operator>=, a.x[i] >= b.x[i])
#undef ELBO_PACK_OPERATOR

#define ELBO_PACK_FUNCTION(NAME)                                  \
  template <class R, int kCount>                                  \
  __device__ __forceinline__ ELBO_PACK NAME(const ELBO_PACK& a) { \
    ELBO_PACK result;                                             \
    ELBO_UNROLL                                                   \
    for (int i = 0; i < kCount; ++i) result.x[i] = NAME(a.x[i]);  \
    return result;                                                \
  }
ELBO_PACK_FUNCTION(fast_exp)
ELBO_PACK_FUNCTION(exp)
ELBO_PACK_FUNCTION(log)
ELBO_PACK_FUNCTION(log1p)
ELBO_PACK_FUNCTION(sqrt)
ELBO_PACK_FUNCTION(abs)
#undef ELBO_PACK_FUNCTION
#undef ELBO_PACK

template <class R, int kCount>
__device__ __forceinline__ Pack<R, kCount> select(const PackMask<kCount>& mask, const Pack<R, kCount>& yes,
                                                  const Pack<R, kCount>& no) {
  Pack<R, kCount> result;
  ELBO_UNROLL
  for (int i = 0; i < kCount; ++i) result.x[i] = mask.x[i] ? yes.x[i] : no.x[i];
  return result;
}
template <int kCount>
__device__ __forceinline__ bool any(const PackMask<kCount>& mask) {
  bool result = false;
  ELBO_UNROLL
  for (int i = 0; i < kCount; ++i) result = result || mask.x[i];
  return result;
}

// Horner's scheme, which takes the fewest registers: other warps fill the waits.
template <class T, int kTerms>
__device__ __forceinline__ T polynomial(const Real<T> (&coefficient)[kTerms], T at) {
  T sum = T(coefficient[kTerms - 1]);
  ELBO_UNROLL
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * at + T(coefficient[k]);
  return sum;
}

// The numbers of a pack added up, from the first to the last.
template <class R, int kCount>
__device__ __forceinline__ R sum_of(const Pack<R, kCount>& pack) {
  R sum = pack.x[0];
  ELBO_UNROLL
  for (int i = 1; i < kCount; ++i) sum += pack.x[i];
  return sum;
}

}  // namespace
}  // namespace elbo_ext

#include "../terms/noise.h"
#include "../terms/terms.h"

namespace elbo_ext {
namespace {

// The long formulas of rho and of floors one number at a time: a kernel has not the registers for several.
template <class R, int kCount>
__device__ __forceinline__ SigmaAndSlope<Pack<R, kCount>> floored_sigma(ScaleForm<R> form, Pack<R, kCount> s) {
  SigmaAndSlope<Pack<R, kCount>> result;
  ELBO_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const SigmaAndSlope<R> one = floored_sigma(form, s.x[i]);
    result.value.x[i] = one.value;
    result.slope.x[i] = one.slope;
  }
  return result;
}
template <class R, int kCount>
__device__ __forceinline__ FlooredScale<Pack<R, kCount>> floored_scale(ScaleForm<R> form, Pack<R, kCount> s) {
  FlooredScale<Pack<R, kCount>> result;
  ELBO_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const FlooredScale<R> one = floored_scale(form, s.x[i]);
    result.sigma.value.x[i] = one.sigma.value;
    result.sigma.slope.x[i] = one.sigma.slope;
    result.logvar.x[i] = one.logvar;
    result.logvar_slope.x[i] = one.logvar_slope;
  }
  return result;
}
template <class R, int kCount>
__device__ __forceinline__ Expm1<Pack<R, kCount>> floored_ratio(ScaleForm<R> form, Pack<R, kCount> a, Pack<R, kCount> b,
                                                                Pack<R, kCount> log_ratio) {
  Expm1<Pack<R, kCount>> result;
  ELBO_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const Expm1<R> one = floored_ratio(form, a.x[i], b.x[i], log_ratio.x[i]);
    result.value.x[i] = one.value;
    result.minus_d.x[i] = one.minus_d;
  }
  return result;
}

}  // namespace
}  // namespace elbo_ext
