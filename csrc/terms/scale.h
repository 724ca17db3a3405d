// The scale of a Gaussian, in any of the four forms users keep it in.
#pragma once

#include <limits>

#include "forms.h"
#include "math.h"

namespace elbo_ext {
namespace {

// What the scale tensor holds. The numbers are part of the operator schema.
enum Form : int {
  kLogvar = 0,
  kLogStd = 1,
  kStd = 2,
  kVar = 3
};

// The classes of forms of a term whose inputs with these numbers are such scales: exponential (logvar and log_std), and
// direct (std and var).
template <int... scales>
struct ScaleForms {
  static constexpr int kFormClasses = 2;
  ELBO_INLINE static constexpr int form_class(int forms) {
    const int direct = ((form_of(forms, scales) >= kStd ? 1 : 0) + ...);
    return direct == 0 ? 0 : direct == static_cast<int>(sizeof...(scales)) ? 1
                                                                           : kAnyForms;
  }
  template <int kClass>
  ELBO_INLINE static constexpr int within(int forms) {
    return (((kClass == 0   ? (form_of(forms, scales) == kLogStd ? kLogStd : kLogvar)
              : kClass == 1 ? (form_of(forms, scales) == kStd ? kStd : kVar)
                            : form_of(forms, scales))
             << (4 * scales)) |
            ...);
  }
};

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

// A squared distance in units of sigma, and its half derivative.
template <class T>
struct Standardized {
  T z2;        // (difference / sigma)^2
  T over_var;  // difference / sigma^2
};

// Everything that a density with this scale needs and that does not depend on where it is evaluated.
//
// In the ordinary regime `factor` is 1 / sigma^2. Where that leaves, or nearly leaves, the range of T (`extreme`, for any
// of the numbers in a register), it is sigma^(-1/2) instead, applied twice: the result is then right as long as it has a
// finite value, and 0 / sigma stays 0, because factor is kept finite.
template <class T>
struct Scale {
  T logvar;
  T slope;  // d logvar / d(the scale as given)
  T factor;
  bool extreme;

  ELBO_INLINE Standardized<T> standardize(T difference) const {
    if (!extreme) {
      const T over_var = difference * factor;
      return {difference * over_var, over_var};
    }
    const T z = difference * factor * factor;
    return {z * z, z * factor * factor};
  }
};

template <class T>
ELBO_INLINE Scale<T> make_scale(int form, T s) {
  using R = Real<T>;
  Scale<T> scale;
  scale.logvar = log_variance(form, s);
  scale.slope = log_variance_slope(form, s);
  scale.extreme = any(abs(scale.logvar) > T(kOrdinaryExponent<T>));
  if (scale.extreme) {
    switch (form) {
      case kLogvar:
      case kLogStd: scale.factor = fast_exp(scale.logvar * T(R(-0.25))); break;
      case kStd: scale.factor = T(R(1)) / sqrt(s); break;
      default: scale.factor = T(R(1)) / sqrt(sqrt(s)); break;
    }
    scale.factor = minimum(scale.factor, T(kLargest<T>));
  } else {
    switch (form) {
      case kLogvar:
      case kLogStd: scale.factor = fast_exp(T(R(0)) - scale.logvar); break;
      case kStd: scale.factor = T(R(1)) / (s * s); break;
      default: scale.factor = T(R(1)) / s; break;
    }
  }
  return scale;
}

}  // namespace
}  // namespace elbo_ext
