// log Poisson(x; r) = x ln r - r - ln x!, the rate r given as ln r or itself.
//
// With ln x! by Binet's remainder b (special.h), the large parts are one: -(r - x) - x ln(x / r) - 1/2 ln(2 pi x) - b(x),
// which keeps its digits for large x close to r (Loader 2000, "Fast and accurate computation of binomial probabilities").
#pragma once

#include "count.h"
#include "forms.h"
#include "scale.h"

namespace elbo_ext {
namespace {

template <class T>
struct Poisson : CountTerm<Poisson<T>, T>, ManyForms {
  static constexpr int kInputs = 2, kElementsAtOnce = 2;
  static constexpr const char* kSignature = "x log_rate|rate";
  using R = Real<T>;

  template <bool kGradient>
  ELBO_INLINE static T at_zero(const T* in, int forms, T* d) {
    const bool is_log = form_of(forms, 1) == 0;
    const T rate = is_log ? fast_exp(in[1]) : in[1];
    if constexpr (kGradient) d[1] = is_log ? T(R(0)) - rate : T(R(-1));
    return T(R(0)) - rate;
  }

  template <bool kGradient>
  ELBO_INLINE static T above_zero(const T* in, int forms, T* d) {
    const bool is_log = form_of(forms, 1) == 0;
    const T x = in[0], one = T(R(1));
    const T rate = is_log ? fast_exp(in[1]) : in[1];
    const Exponential<T> scaled = is_log ? exponential(in[1], -kOrdinaryExponent<T>, kOrdinaryExponent<T>)
                                         : Exponential<T>{in[1], T(R(0))};
    const T over = one / scaled.ordinary, ratio = x * over;
    const T log_ratio = log1p_parts((x - scaled.ordinary) * over, ratio).value - scaled.beyond;  // ln(x / r)
    if constexpr (kGradient) d[1] = is_log ? x - rate : ratio - one;  // d/dln r = x - r, d/dr = x / r - 1
    return (x - rate) - x * log_ratio - T(R(0.5)) * log(x * T(R(kTwoPi))) - binet(x).log_gamma;
  }

  // d/dx = ln r - psi(x + 1)
  ELBO_INLINE static T data_gradient(const T* in, int forms) {
    const T log_rate = form_of(forms, 1) == 0 ? in[1] : log(in[1]);
    return select(in[0] < T(R(0)), T(R(0)), log_rate - digamma(in[0] + T(R(1))));
  }
};

}  // namespace
}  // namespace elbo_ext
