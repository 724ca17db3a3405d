// log NB(x; m, t) = lnG(x + t) - lnG(t) - ln x! + t ln(t / (t + m)) + x ln(m / (t + m)), with mean m and dispersion t (theta):
// variance m + m^2 / t, the Poisson for t -> inf. The mean is also given as ln m or as logits l, m = t e^l; t also as ln t.
//
// In this form it is a sum of large numbers that cancel. With Binet's remainder b (special.h) it is a product of two
// deviations, 1 at m = x, and of what is left there (Loader 2000, "Fast and accurate computation of binomial probabilities"):
//   -t ln((t + m) / (t + x)) - x ln(x (t + m) / (m (t + x))) - 1/2 ln(2 pi (x + x^2 / t)) + b(x + t) - b(x) - b(t),
// of which the first alone is left for x = 0, and all of which keeps its digits for t -> inf.
#pragma once

#include "count.h"
#include "forms.h"

namespace elbo_ext {
namespace {

// The mean and theta of a negative binomial, inputs 1 and 2.
template <class T>
struct MeanAndTheta {
  enum MeanForm {
    kMean,
    kLogMean,
    kLogits
  };
  using R = Real<T>;
  int mean_form;
  bool log_theta;
  T theta, over_theta;  // t, and 1 / t
  T mean, odds;         // m, and m / t
  T beyond;             // the mean is e^beyond times what odds say, where it is extreme

  ELBO_INLINE MeanAndTheta(const T* in, int forms) : mean_form(form_of(forms, 1)), log_theta(form_of(forms, 2) != 0) {
    // A theta beyond this is a Poisson's to the last digit, and its inverse and its square are still numbers.
    const T largest = T(R(std::numeric_limits<R>::digits > 24 ? 1e100 : 1e18));
    theta = minimum(log_theta ? exponential(in[2], R(-70), R(70)).ordinary : in[2], largest);
    over_theta = T(R(1)) / theta;
    beyond = T(R(0));
    if (mean_form == kLogits) {
      // Logits above 40 make the value linear in them. A mean may need more before it is large or small compared to theta.
      const Exponential<T> exp = exponential(in[1], R(-70), R(40));
      odds = exp.ordinary;
      beyond = exp.beyond;
      mean = odds * theta;
      return;
    }
    mean = in[1];
    if (mean_form == kLogMean) {
      const Exponential<T> exp = exponential(in[1], R(-70), R(70));
      mean = exp.ordinary;
      beyond = exp.beyond;
    }
    odds = mean * over_theta;
  }
};

// ln(x (t + m) / (m (t + x))), whose argument is 1 + t (x - m) / (m (t + x)), but for the part of an extreme mean; `over` is
// 1 / (t + x). The difference to the mean is taken as such: x t / m - t loses digits of a large t. With logits it is not at
// hand, as m may be 0.
template <class T>
ELBO_INLINE Log1p<T> log_of_shares(const MeanAndTheta<T>& p, T x, T over, T over_mean) {
  if (p.mean_form == MeanAndTheta<T>::kLogits) {
    const T over_odds = x / p.odds;  // x t / m
    return log1p_parts((over_odds - p.theta) * over, (over_odds + x) * over);
  }
  return log1p_parts((x - p.mean) * over_mean * (p.theta * over), x * over_mean * ((p.theta + p.mean) * over));
}

// x = 0: -t ln(1 + m / t), with its derivatives by mean and theta as they were given.
template <bool kGradient, class T>
ELBO_INLINE T negative_binomial_at_zero(const T* in, int forms, T& by_mean, T& by_theta) {
  using M = MeanAndTheta<T>;
  const T zero = T(Real<T>(0)), one = T(Real<T>(1));
  const M p(in, forms);
  const Log1p<T> log = log1p_parts(p.odds, one + p.odds);
  const T beyond = positive_part(p.beyond), log_ratio = log.value + beyond;
  if constexpr (kGradient) {
    const T share = log.slope;                                                      // t / (t + m)
    by_mean = zero - (p.mean_form == M::kMean ? share : p.theta * p.odds * share);  // d/dm, or d/dln m = -m t / (t + m)
    // d/dt = -ln(1 + m / t) + m / (t + m), and without the last for constant logits
    by_theta = zero - (p.mean_form == M::kLogits ? log_ratio : log.beyond_slope + beyond);
    if (p.log_theta) by_theta = by_theta * p.theta;
  }
  return zero - p.theta * log_ratio;
}

template <bool kGradient, class T>
ELBO_INLINE T negative_binomial_above_zero(const T* in, int forms, T& by_mean, T& by_theta) {
  using R = Real<T>;
  using M = MeanAndTheta<T>;
  const T zero = T(R(0)), one = T(R(1)), half = T(R(0.5));
  const M p(in, forms);
  const T x = in[0], mean = p.mean, sum = x + p.theta, over = one / sum, x_over_theta = x * p.over_theta;
  const T over_mean = one / mean;
  // ln((t + m) / (t + x))
  const Log1p<T> first = log1p_parts((mean - x) * over, (p.theta + mean) * over);
  const T log_first = first.value + positive_part(p.beyond);
  const T log_second = log_of_shares(p, x, over, over_mean).value + positive_part(zero - p.beyond);
  const Binet<T> of_sum = binet(sum, over), of_x = binet(x, one / x), of_theta = binet(p.theta, p.over_theta);
  if constexpr (kGradient) {
    by_mean = (x - mean) / (one + p.odds);                    // d/dln m = t (x - m) / (t + m)
    if (p.mean_form == M::kMean) by_mean = by_mean * over_mean;  // d/dm
    // d/dt = psi(x + t) - psi(t) - ln((t + m) / t) + (m - x) / (t + m), and without the last for constant logits, in two
    // parts: psi(x + t) - psi(t) - ln((t + x) / t), and what is left of the logarithm
    by_theta = half * x_over_theta * over + (of_sum.digamma - of_theta.digamma) -
               (p.mean_form == M::kLogits ? log_first : first.beyond_slope + positive_part(p.beyond));
    if (p.log_theta) by_theta = by_theta * p.theta;
  }
  return (of_sum.log_gamma - of_x.log_gamma - of_theta.log_gamma) - p.theta * log_first - x * log_second -
         half * log(T(R(kTwoPi)) * (x + x * x_over_theta));
}

// d/dx = psi(x + t) - psi(x + 1) + ln(m / (t + m))
template <class T>
ELBO_INLINE T negative_binomial_data_gradient(const T* in, int forms) {
  using R = Real<T>;
  const T zero = T(R(0)), one = T(R(1));
  const MeanAndTheta<T> p(in, forms);
  const T log_share = (zero - log1p(one / p.odds)) - positive_part(zero - p.beyond);
  return select(in[0] < zero, zero, digamma(in[0] + p.theta) - digamma(in[0] + one) + log_share);
}

template <class T>
struct NegativeBinomial : CountTerm<NegativeBinomial<T>, T>, ManyForms {
  static constexpr int kInputs = 3, kElementsAtOnce = 2;
  static constexpr unsigned kSharedInputs = 1 << 2;  // theta
  static constexpr const char* kSignature = "x mean|log_mean|logits theta|log_theta";

  template <bool kGradient>
  ELBO_INLINE static T at_zero(const T* in, int forms, T* d) {
    T by_mean, by_theta;
    const T value = negative_binomial_at_zero<kGradient>(in, forms, by_mean, by_theta);
    if constexpr (kGradient) d[1] = by_mean, d[2] = by_theta;
    return value;
  }

  template <bool kGradient>
  ELBO_INLINE static T above_zero(const T* in, int forms, T* d) {
    T by_mean, by_theta;
    const T value = negative_binomial_above_zero<kGradient>(in, forms, by_mean, by_theta);
    if constexpr (kGradient) d[1] = by_mean, d[2] = by_theta;
    return value;
  }

  ELBO_INLINE static T data_gradient(const T* in, int forms) { return negative_binomial_data_gradient(in, forms); }
};

}  // namespace
}  // namespace elbo_ext
