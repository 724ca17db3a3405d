// What a formula is written in. A formula is a template over a number type T, which is float, double or a Pack of them
// (cuda/device.cuh) on CUDA and at::vec::Vectorized<float> or <double> on the CPU. T brings + - * /, comparisons that give
// a mask, and these functions: exp, fast_exp (2 ulp), log, log1p, abs, minimum, sqrt, select(mask, yes, no), any(mask) and
// polynomial(coefficients from the constant on, at).
// A kernel declares them for its T before it includes the formulas (cpu/vec_math.h).
#pragma once

#include "macros.h"

namespace elbo_ext {
namespace {

// float or double: the precision that a T computes in.
template <class T>
struct RealOf {
  using type = T;
};
template <class T>
using Real = typename RealOf<T>::type;

}  // namespace
}  // namespace elbo_ext
