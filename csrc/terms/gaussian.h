// log N(x; mean, sigma^2) = -1/2 (z^2 + log sigma^2 + log 2 pi),  z = (x - mean) / sigma.
// Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix C.2.
#pragma once

#include "scale.h"

namespace elbo_ext {
namespace {

template <class T>
struct Gaussian {
  static constexpr int kInputs = 3;                 // x, mean, scale
  static constexpr unsigned kSharedInputs = 1 << 2;  // Shared is made from the scale alone
  using R = Real<T>;
  using Shared = Scale<T>;

  ELBO_INLINE static Shared share(const T* in, int form, int /*prior_form*/) { return make_scale(form, in[2]); }

  ELBO_INLINE static T value(const Shared& scale, const T* in) {
    const T z = scale.over_sigma(in[0] - in[1]);
    return (z * z + scale.logvar + T(R(kLogTwoPi))) * T(R(-0.5));
  }

  ELBO_INLINE static T gradient(const Shared& scale, const T* in, T* d) {
    const T z = scale.over_sigma(in[0] - in[1]);
    const T z2 = z * z;
    d[1] = scale.over_sigma(z);                                  // d/dmean = z / sigma
    d[0] = T(R(0)) - d[1];                                       // d/dx    = -z / sigma
    d[2] = (z2 - T(R(1))) * T(R(0.5)) * scale.slope;             // d/dlogvar = (z^2 - 1) / 2, chained to the form
    return (z2 + scale.logvar + T(R(kLogTwoPi))) * T(R(-0.5));
  }
};

}  // namespace
}  // namespace elbo_ext
