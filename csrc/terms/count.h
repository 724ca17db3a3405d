// What the likelihoods of counts share. Most counts are 0, where the gamma functions cancel, so that a term of counts has two
// formulas: one for x = 0, and one for x > 0, which a kernel may evaluate for those elements alone. A term writes
//   at_zero<kGradient>(in, forms, d)   the value, or with kGradient the value and the derivatives
//   above_zero<kGradient>(in, forms, d)
//   data_gradient(in, forms)           the derivative by x, which is rarely wanted; d[0] is left alone
// and gets from CountTerm<Self, T> what every term has.
//
// Outside of the support, x < 0, the value is -inf and its derivatives are 0; where x is NaN, all of them are. An x that is no
// integer is taken by the gamma function.
#pragma once

#include "special.h"

namespace elbo_ext {
namespace {

constexpr double kTwoPi = 6.28318530717958647692528676656;

// Whether a term is a CountTerm. Kernels then read vectors of integers, too, and ask for the derivative by x if it is wanted.
template <class Term, class = void>
struct IsCountTerm {
  static constexpr bool value = false;
};
template <class Term>
struct IsCountTerm<Term, typename Term::Counts> {
  static constexpr bool value = true;
};

template <class Self, bool kGradient, class T>
ELBO_INLINE T at_most_zero(const T* in, int forms, T* d);

template <class Self, class T>
struct CountTerm {
  using Counts = void;
  static constexpr unsigned kPrecomputedFrom = 0;
  using R = Real<T>;
  struct Precomputed {
    int forms;
  };

  ELBO_INLINE static Precomputed precompute(const T*, int forms) { return {forms}; }

  ELBO_INLINE static T value(const Precomputed& p, const T* in) { return whole<false>(p, in, nullptr); }
  // All derivatives but the one by x, in whose place there is 0.
  ELBO_INLINE static T gradient(const Precomputed& p, const T* in, T* d) { return whole<true>(p, in, d); }

 private:
  template <bool kGradient>
  ELBO_INLINE static T whole(const Precomputed& p, const T* in, T* d) {
    const T zero = T(R(0));
    const auto positive = in[0] > zero;
    T value = at_most_zero<Self, kGradient>(in, p.forms, d);
    if (any(positive)) {
      T above[Self::kInputs];
      value = select(positive, Self::template above_zero<kGradient>(in, p.forms, above), value);
      if constexpr (kGradient)
        for (int k = 1; k < Self::kInputs; ++k) d[k] = select(positive, above[k], d[k]);
    }
    return value;
  }
};

// The value and the derivatives where x <= 0; 0 elsewhere.
template <class Self, bool kGradient, class T>
ELBO_INLINE T at_most_zero(const T* in, int forms, T* d) {
  using R = Real<T>;
  const T zero = T(R(0)), infinity = T(std::numeric_limits<R>::infinity());
  const auto outside = in[0]<zero, positive = in[0]> zero;
  const T nan_of_x = in[0] * zero;  // 0, but for x that is none of the three
  T value = Self::template at_zero<kGradient>(in, forms, d) + nan_of_x;
  value = select(positive, zero, select(outside, zero - infinity, value));
  if constexpr (kGradient) {
    d[0] = zero;
    for (int k = 1; k < Self::kInputs; ++k) d[k] = select(positive, zero, select(outside, zero, d[k] + nan_of_x));
  }
  return value;
}

// A number given by its logarithm, in two factors, number = e^beyond * ordinary, of which the second one is in the range of
// the dtype with its inverse; beyond is 0 but for extreme numbers.
template <class T>
struct Exponential {
  T ordinary, beyond;
};

template <class T>
ELBO_INLINE Exponential<T> exponential(T logarithm, Real<T> least, Real<T> most) {
  const T clamped = minimum(select(logarithm < T(least), T(least), logarithm), T(most));
  return {fast_exp(clamped), logarithm - clamped};
}

template <class T>
ELBO_INLINE T positive_part(T number) {
  const T zero = T(Real<T>(0));
  return select(number > zero, number, zero);
}

}  // namespace
}  // namespace elbo_ext
