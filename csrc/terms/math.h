// Mathematics that several formulas share.
#pragma once

#include <limits>

#include "number.h"

namespace elbo_ext {
namespace {

template <class T>
constexpr Real<T> kLargest = std::numeric_limits<Real<T>>::max();

// exp of +- this, three quarters of the largest exponent (66 for float), is ordinary, and so is its square root.
template <class T>
constexpr Real<T> kOrdinaryExponent = Real<T>(std::numeric_limits<Real<T>>::max_exponent * 0.693 * 0.75);

// 1/n! for n < count.
template <int count>
struct InverseFactorials {
  double factorial[count];
  constexpr InverseFactorials() : factorial{} {
    double last = 1.0;
    for (int n = 0; n < count; ++n) factorial[n] = last = n < 2 ? 1.0 : last / n;
  }
};

// expm1(d) and expm1(d) - d, given also exp(d): both to full relative precision for every d, most of all near 0, where
// the textbook difference exp(d) - 1 - d loses every digit. Inside |d| < 1 the Taylor series
//   expm1(d) - d = d^2 (1/2! + d/3! + d^2/4! + ...),
// cut where the rest is below the rounding of T; outside, the difference loses no more than a bit.
template <class T>
struct Expm1 {
  T value;       // exp(d) - 1
  T minus_d;     // exp(d) - 1 - d, never negative
};

template <class T>
ELBO_INLINE Expm1<T> expm1_parts(T d, T exp_d) {
  using R = Real<T>;
  constexpr int kTerms = std::numeric_limits<R>::digits > 24 ? 18 : 10;
  constexpr InverseFactorials<kTerms + 2> kOver;
  T series = T(R(kOver.factorial[kTerms + 1]));
  ELBO_UNROLL
  for (int k = kTerms; k >= 2; --k) series = series * d + T(R(kOver.factorial[k]));
  const T near = d * d * series;
  const T far = exp_d - T(R(1));
  const auto is_near = abs(d) < T(R(1));
  // Where d is infinite, so is far - d.
  return {select(is_near, d + near, far), select(is_near, near, select(far > T(kLargest<T>), far, far - d))};
}

// log(1 + t) for 0 <= t <= 1, to full relative precision: 2 artanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...) with
// s = t / (2 + t) <= 1/3, cut where the rest is below the rounding of T.
template <class T>
ELBO_INLINE T log1p_of_unit(T t) {
  using R = Real<T>;
  constexpr int kTerms = std::numeric_limits<R>::digits > 24 ? 17 : 8;
  const T s = t / (T(R(2)) + t), s2 = s * s;
  T series = T(R(1) / R(2 * kTerms - 1));
  ELBO_UNROLL
  for (int k = kTerms - 2; k >= 1; --k) series = series * s2 + T(R(1) / R(2 * k + 1));
  return (s + s) + (s + s) * (s2 * series);  // the first term apart, so that the series' rounding hardly counts
}

// softplus(x) = log(1 + exp(x)) and its derivative sigmoid(x), each to full relative precision for every x whose result has
// a normal number.
template <class T>
struct Softplus {
  T value;
  T slope;
};

template <class T>
ELBO_INLINE Softplus<T> softplus(T x) {
  using R = Real<T>;
  const T zero = T(R(0)), one = T(R(1)), t = exp(zero - abs(x)), tail = log1p_of_unit(t);
  const auto positive = x > zero;
  return {select(positive, x + tail, tail), select(positive, one, t) / (one + t)};
}

// softplus(x) - 1, which keeps its digits where it vanishes, at x = log(e - 1), here in two parts: softplus there is 1, so
// that softplus(x) - 1 = log1p(sigmoid * expm1(x - log(e - 1))), sigmoid(log(e - 1)) = 1 - 1 / e.
template <class T>
ELBO_INLINE T softplus_minus_1(T x) {
  using R = Real<T>;
  constexpr bool kDouble = std::numeric_limits<R>::digits > 24;
  constexpr R kRoot = kDouble ? R(0.5413248546129181) : R(0x1.152888p-1), kRest = kDouble ? R(-1.8138570925507325e-17) : R(7.158233824158564e-10);
  const T from_root = (x - T(kRoot)) - T(kRest);
  return log1p(T(R(0.632120558828557678404476229839)) * expm1_parts(from_root, exp(from_root)).value);
}

}  // namespace
}  // namespace elbo_ext
