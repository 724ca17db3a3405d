// The scale of a Gaussian, in any of the forms users keep it in. The four ordinary ones are here; floored_scale.h has
// rho and the floors.
#pragma once

#include <limits>

#include "floored_scale.h"

namespace elbo_ext {
namespace {

// The classes of forms of a term whose inputs with these numbers are such scales: exponential (logvar and log_std), and
// direct (std and var). All others are for kernels that look at run time.
template <int... scales>
struct ScaleForms {
  static constexpr int kFormClasses = 2;
  ELBO_INLINE static constexpr int form_class(int forms) {
    const bool exponential = ((form_of(forms, scales) <= kLogStd) && ...);
    const bool direct = ((form_of(forms, scales) == kStd || form_of(forms, scales) == kVar) && ...);
    return exponential ? 0 : direct ? 1
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
ELBO_INLINE T log_variance(const ScaleForm<Real<T>>& form, T s) {
  if (!form.ordinary()) return floored_scale(form, s).logvar;
  return log_variance_without_floor(form.number, s);
}

// sigma, the standard deviation, and its derivative by the scale as given.
template <class T>
ELBO_INLINE T standard_deviation(const ScaleForm<Real<T>>& form, T s) {
  using R = Real<T>;
  if (!form.ordinary()) return floored_sigma(form, s).value;
  switch (form.number) {
    case kLogvar: return fast_exp(s * T(R(0.5)));
    case kLogStd: return fast_exp(s);
    case kStd: return s;
    default: return sqrt(s);
  }
}
template <class T>
ELBO_INLINE T standard_deviation_slope(const ScaleForm<Real<T>>& form, T s, T sigma) {
  using R = Real<T>;
  if (!form.ordinary()) return floored_sigma(form, s).slope;
  switch (form.number) {
    case kLogvar: return sigma * T(R(0.5));  // d exp(s/2) / ds
    case kLogStd: return sigma;              // d exp(s) / ds
    case kStd: return T(R(1));
    default: return T(R(0.5)) / sigma;       // d sqrt(s) / ds
  }
}

template <class T>
ELBO_INLINE SigmaAndSlope<T> sigma_and_slope(const ScaleForm<Real<T>>& form, T s) {
  if (!form.ordinary()) return floored_sigma(form, s);
  const T sigma = standard_deviation(form, s);
  return {sigma, standard_deviation_slope(form, s, sigma)};
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
ELBO_INLINE Scale<T> make_scale(const ScaleForm<Real<T>>& form, T s) {
  using R = Real<T>;
  Scale<T> scale;
  if (!form.ordinary()) {
    const FlooredScale<T> floored = floored_scale(form, s);
    scale.logvar = floored.logvar;
    scale.slope = floored.logvar_slope;
    scale.extreme = any(abs(scale.logvar) > T(kOrdinaryExponent<T>));
    if (scale.extreme) scale.factor = minimum(fast_exp(scale.logvar * T(R(-0.25))), T(kLargest<T>));
    else scale.factor = T(R(1)) / (floored.sigma.value * floored.sigma.value);
    return scale;
  }
  scale.logvar = log_variance_without_floor(form.number, s);
  scale.slope = log_variance_slope_without_floor(form.number, s);
  scale.extreme = any(abs(scale.logvar) > T(kOrdinaryExponent<T>));
  if (scale.extreme) {
    switch (form.number) {
      case kLogvar:
      case kLogStd: scale.factor = fast_exp(scale.logvar * T(R(-0.25))); break;
      case kStd: scale.factor = T(R(1)) / sqrt(s); break;
      default: scale.factor = T(R(1)) / sqrt(sqrt(s)); break;
    }
    scale.factor = minimum(scale.factor, T(kLargest<T>));
  } else {
    switch (form.number) {
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
