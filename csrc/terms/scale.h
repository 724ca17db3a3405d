// The scale of a Gaussian, in any of the four forms users keep it in.
#pragma once

#include "math.h"

namespace elbo_ext {
namespace {

// What the scale tensor holds. The numbers are part of the operator schema.
enum Form : int { kLogvar = 0, kLogStd = 1, kStd = 2, kVar = 3 };

constexpr double kLogTwoPi = 1.83787706640934548356065947281;

template <class T>
ELBO_INLINE T log_variance(int form, T s) {
  using R = Real<T>;
  switch (form) {
    case kLogvar: return s;
    case kLogStd: return s * T(R(2));
    case kStd: return log(s) * T(R(2));
    default: return log(s);
  }
}

// sigma, the standard deviation, and its derivative by the scale as given.
template <class T>
ELBO_INLINE T standard_deviation(int form, T s) {
  using R = Real<T>;
  switch (form) {
    case kLogvar: return fast_exp(s * T(R(0.5)));
    case kLogStd: return fast_exp(s);
    case kStd: return s;
    default: return sqrt(s);
  }
}
template <class T>
ELBO_INLINE T standard_deviation_slope(int form, T sigma) {
  using R = Real<T>;
  switch (form) {
    case kLogvar: return sigma * T(R(0.5));  // d exp(s/2) / ds
    case kLogStd: return sigma;              // d exp(s) / ds
    case kStd: return T(R(1));
    default: return T(R(0.5)) / sigma;       // d sqrt(s) / ds
  }
}

// d log(sigma^2) / d(the scale as given)
template <class T>
ELBO_INLINE T log_variance_slope(int form, T s) {
  using R = Real<T>;
  switch (form) {
    case kLogvar: return T(R(1));
    case kLogStd: return T(R(2));
    case kStd: return T(R(2)) / s;
    default: return T(R(1)) / s;
  }
}

// Everything that a density with this scale needs and that does not depend on where it is evaluated.
//
// 1 / sigma is kept as root * rest. Wherever 1 / sigma is an ordinary number, rest is 1. Where a logarithmic form asks
// for a 1 / sigma beyond the range of T, each factor is its square root: (x - mean) * root * rest is right as long as
// the result has a finite value, and 0 * root stays 0 because root is never infinite.
template <class T>
struct Scale {
  T logvar;
  T root;
  T rest;
  T slope;  // d logvar / d(the scale as given)

  ELBO_INLINE T over_sigma(T difference) const { return difference * root * rest; }
};

template <class T>
ELBO_INLINE Scale<T> make_scale(int form, T s) {
  using R = Real<T>;
  const T one = T(R(1));
  Scale<T> scale;
  scale.logvar = log_variance(form, s);
  scale.slope = log_variance_slope(form, s);
  scale.rest = one;
  if (form == kLogvar || form == kLogStd) {
    // exp(-logvar / 2) leaves the range of T a little beyond the bound; past it the exponent is halved once more.
    constexpr R kBound = std::numeric_limits<R>::max_exponent * R(1.25);  // 160 for float, 1280 for double
    const auto extreme = abs(scale.logvar) > T(kBound);
    const T exponent = scale.logvar * select(extreme, T(R(-0.25)), T(R(-0.5)));
    scale.root = minimum(fast_exp(exponent), T(kLargest<T>));
    scale.rest = select(extreme, scale.root, one);
  } else {
    scale.root = minimum(one / (form == kStd ? s : sqrt(s)), T(kLargest<T>));
  }
  return scale;
}

}  // namespace
}  // namespace elbo_ext
