// KL( N(mu, sigma^2) || N(prior_mu, prior_sigma^2) ) = 1/2 ( u^2 + expm1(d) - d ),
//   u = (mu - prior_mu) / prior_sigma,  d = log sigma^2 - log prior_sigma^2.
// Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix B, for two diagonal Gaussians. In this form
// both parts are non-negative and keep full relative precision as the posterior collapses onto the prior.
#pragma once

#include "scale.h"

namespace elbo_ext {
namespace {

template <class T>
struct GaussianKL : ScaleForms<1, 3> {
  static constexpr int kInputs = 4;
  static constexpr const char* kSignature =
      "mu logvar|log_std|std|var prior_mu prior_logvar|prior_log_std|prior_std|prior_var";
  static constexpr unsigned kPrecomputedFrom = 1 << 3;  // the prior's scale alone
  static constexpr unsigned kUsualInputs = 0b0011;   // mu and its scale
  static constexpr unsigned kSharedInputs = 0b1100;  // the prior
  using R = Real<T>;
  struct Precomputed {
    Scale<T> prior;
    int form, prior_form;
  };

  ELBO_INLINE static Precomputed precompute(const T* in, int forms) {
    return {make_scale(form_of(forms, 3), in[3]), form_of(forms, 1), form_of(forms, 3)};
  }

  ELBO_INLINE static T value(const Precomputed& known, const T* in) {
    return (known.prior.standardize(in[0] - in[2]).z2 + ratio_parts(known, in).minus_d) * T(R(0.5));
  }

  ELBO_INLINE static T gradient(const Precomputed& known, const T* in, T* d) {
    const Standardized<T> u = known.prior.standardize(in[0] - in[2]);
    const Expm1<T> ratio = ratio_parts(known, in);
    const T half = T(R(0.5));
    d[0] = u.over_var;                                                   // d/dmu = (mu - prior_mu) / prior_sigma^2
    d[2] = T(R(0)) - d[0];                                               // d/dprior_mu
    d[1] = ratio.value * (half * log_variance_slope(known.form, in[1]));  // d/dlogvar = expm1(d) / 2
    d[3] = (T(R(0)) - ratio.value - u.z2) * (half * known.prior.slope);   // d/dprior_logvar
    return (u.z2 + ratio.minus_d) * half;
  }

 private:
  // d is taken from the numbers as given, before any logarithm is rounded: the difference of two neighbours is exact.
  ELBO_INLINE static Expm1<T> ratio_parts(const Precomputed& known, const T* in) {
    if (known.form != known.prior_form) {
      const T d = log_variance(known.form, in[1]) - known.prior.logvar;
      return expm1_parts(d, exp(d));
    }
    const T difference = in[1] - in[3];
    switch (known.form) {
      case kLogvar: return expm1_parts(difference, exp(difference));
      case kLogStd: return expm1_parts(difference * T(R(2)), exp(difference * T(R(2))));
      case kStd: {
        const T quotient = in[1] / in[3];
        return expm1_parts(log_quotient(in[1], in[3], difference, quotient) * T(R(2)), quotient * quotient);
      }
      default: {
        const T quotient = in[1] / in[3];
        return expm1_parts(log_quotient(in[1], in[3], difference, quotient), quotient);
      }
    }
  }
  // log(a / b), given a - b, which is the more exact start where a is near b, and a / b, which may have left the range of T.
  ELBO_INLINE static T log_quotient(T a, T b, T difference, T quotient) {
    constexpr R kSmall = std::numeric_limits<R>::min() / std::numeric_limits<R>::epsilon();
    constexpr R kLarge = std::numeric_limits<R>::max() * std::numeric_limits<R>::epsilon();
    const T relative = difference / b;
    const T result = select(abs(relative) < T(R(0.5)), log1p(relative), log(quotient));
    const auto small = quotient<T(kSmall), large = quotient> T(kLarge);
    if (!any(small) && !any(large)) return result;
    const T of_both = log(a) - log(b);
    return select(small, of_both, select(large, of_both, result));
  }
};

}  // namespace
}  // namespace elbo_ext
