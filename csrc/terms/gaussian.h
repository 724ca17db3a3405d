// log N(x; mean, sigma^2) = -1/2 (z^2 + log sigma^2 + log 2 pi),  z = (x - mean) / sigma.
// Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix C.2.
#pragma once

#include "scale.h"

namespace elbo_ext {
namespace {

template <class T>
struct Gaussian : ScaleForms<2> {
  static constexpr int kInputs = 3;
  static constexpr const char* kSignature = "x mean " ELBO_SCALE("");
  static constexpr unsigned kPrecomputedFrom = 1 << 2;  // the inputs that Precomputed is made from: the scale alone
  static constexpr unsigned kFastPathInputs = 0b111, kSharedInputs = 0b100;
  using R = Real<T>;
  using Precomputed = Scale<T>;

  ELBO_INLINE static Precomputed precompute(const T* in, const Forms& forms) { return make_scale({forms, 2}, in[2]); }

  ELBO_INLINE static T value(const Precomputed& scale, const T* in) {
    return from_z2(scale, scale.standardize(in[0] - in[1]).z2);
  }

  ELBO_INLINE static T gradient(const Precomputed& scale, const T* in, T* d) {
    const Standardized<T> standardized = scale.standardize(in[0] - in[1]);
    d[1] = standardized.over_var;                                      // d/dmean = (x - mean) / sigma^2
    d[0] = T(R(0)) - d[1];                                             // d/dx    = -(x - mean) / sigma^2
    d[2] = (standardized.z2 - T(R(1))) * (T(R(0.5)) * scale.slope);    // d/dlogvar = (z^2 - 1) / 2, chained to the form
    return from_z2(scale, standardized.z2);
  }

 private:
  ELBO_INLINE static T from_z2(const Precomputed& scale, T z2) {
    return (z2 + (scale.logvar + T(R(kLogTwoPi)))) * T(R(-0.5));
  }
};

}  // namespace
}  // namespace elbo_ext
