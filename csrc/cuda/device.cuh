// The number types of the CUDA kernels, float and double, dressed with the functions that terms/number.h asks for, and
// behind them the formulas. A thread computes on single numbers, so that a mask is a bool.
#pragma once

#include <cuda_runtime.h>

#include "../ops/problem.h"
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
__device__ __forceinline__ float abs(float x) { return ::fabsf(x); }
__device__ __forceinline__ double abs(double x) { return ::fabs(x); }
template <class R>
__device__ __forceinline__ R minimum(R a, R b) { return a > b ? b : a; }  // NaN where a is
template <class R>
__device__ __forceinline__ R select(bool mask, R yes, R no) { return mask ? yes : no; }
__device__ __forceinline__ bool any(bool mask) { return mask; }

}  // namespace
}  // namespace elbo_ext

#include "../terms/noise.h"
#include "../terms/terms.h"
