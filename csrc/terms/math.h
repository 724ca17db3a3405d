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

// The coefficients of a polynomial S in v = 2 t - 1 with log(1 + t) = t + t S for 0 <= t <= 1: interpolation in Chebyshev's
// points, to 6e-9 of the value, ...
template <class R>
struct Log1pOfUnit {
  static constexpr int kTerms = 10;
  R coefficient[kTerms] = {
      -0.189069780087,
      -0.144263550686,
      0.0331522539443,
      -0.00846102370675,
      0.0022897021354,
      -0.000642599451005,
      0.000180901330975,
      -5.3031382437e-5,
      2.05088698362e-5,
      -6.20323636412e-6,
  };
};
// ... and to 2e-18.
template <>
struct Log1pOfUnit<double> {
  static constexpr int kTerms = 22;
  double coefficient[kTerms] = {
      -0.18906978378367123488,
      -0.14426354954966209766,
      0.033152438438550704424,
      -0.0084610804138595379077,
      0.0022882409076980346467,
      -0.00064215037271096684963,
      0.00018490300170501334127,
      -0.000054260895873032936451,
      0.000016156949749191341775,
      -4.8668902660090661194e-6,
      1.4798658355874778576e-6,
      -4.5350124389217370289e-7,
      1.3990900677866793855e-7,
      -4.3400243859836511279e-8,
      1.349266592612413865e-8,
      -4.2234065792800728702e-9,
      1.3697591156206335705e-9,
      -4.3200524829206146279e-10,
      1.0474044079305816782e-10,
      -3.3117086253499810637e-11,
      2.3933095852051189762e-11,
      -7.6390346172038045337e-12,
  };
};

// log(1 + t) for 0 <= t <= 1, to full relative precision.
template <class T>
ELBO_INLINE T log1p_of_unit(T t) {
  using R = Real<T>;
  constexpr Log1pOfUnit<R> kSeries;
  return t * polynomial(kSeries.coefficient, t + t - T(R(1))) + t;
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
