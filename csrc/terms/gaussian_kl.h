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
  static constexpr const char* kSignature = "mu " ELBO_SCALE("") " prior_mu " ELBO_SCALE("prior_");
  static constexpr unsigned kPrecomputedFrom = 1 << 3;  // the prior's scale alone
  static constexpr unsigned kFastPathInputs = 0b0011;  // mu and its scale
  static constexpr unsigned kSharedInputs = 0b1100;    // the prior
  using R = Real<T>;
  struct Precomputed {
    Scale<T> prior;
    ScaleForm<R> form;
    bool ordinary, same_form;  // of the posterior's scale; as the prior's
  };

  ELBO_INLINE static Precomputed precompute(const T* in, const Forms& forms) {
    const ScaleForm<R> form(forms, 1), prior_form(forms, 3);
    return {make_scale(prior_form, in[3]), form, form.ordinary(), form == prior_form};
  }

  ELBO_INLINE static T value(const Precomputed& known, const T* in) {
    return (known.prior.standardize(in[0] - in[2]).z2 + ratio_of(known, in).minus_1.minus_d) * T(R(0.5));
  }

  ELBO_INLINE static T gradient(const Precomputed& known, const T* in, T* d) {
    const Standardized<T> u = known.prior.standardize(in[0] - in[2]);
    const Ratio ratio = ratio_of(known, in);
    const T half = T(R(0.5));
    d[0] = u.over_var;                                                   // d/dmu = (mu - prior_mu) / prior_sigma^2
    d[2] = T(R(0)) - d[0];                                               // d/dprior_mu
    d[1] = ratio.minus_1.value * (half * ratio.slope);                   // d/dlogvar = expm1(d) / 2
    d[3] = (T(R(0)) - ratio.minus_1.value - u.z2) * (half * known.prior.slope);  // d/dprior_logvar
    return (u.z2 + ratio.minus_1.minus_d) * half;
  }

 private:
  struct Ratio {
    Expm1<T> minus_1;
    T slope;  // d log sigma^2 / d(the scale as given)
  };
  ELBO_INLINE static Ratio ratio_of(const Precomputed& known, const T* in) {
    if (!known.ordinary) return ratio_of_floored(known.form, known.same_form, known.prior.logvar, in[1], in[3]);
    return {ratio_parts(known, in), log_variance_slope_without_floor(known.form.number, in[1])};
  }
  ELBO_NOINLINE static Ratio ratio_of_floored(ScaleForm<R> form, bool same_form, T prior_logvar, T scale, T prior_scale) {
    const FlooredScale<T> own = floored_scale(form, scale);
    const T d = own.logvar - prior_logvar;
    return {same_form ? floored_ratio(form, scale, prior_scale, d) : expm1_parts(d, exp(d)), own.logvar_slope};
  }

  // d is taken from the numbers as given, before any logarithm is rounded: the difference of two neighbours is exact.
  ELBO_INLINE static Expm1<T> ratio_parts(const Precomputed& known, const T* in) {
    if (!known.same_form) {
      const T d = log_variance_without_floor(known.form.number, in[1]) - known.prior.logvar;
      return expm1_parts(d, exp(d));
    }
    const T difference = in[1] - in[3];
    switch (known.form.number) {
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
    const T log_ratio = log(a) - log(b);
    return select(small, log_ratio, select(large, log_ratio, result));
  }
};

}  // namespace
}  // namespace elbo_ext
