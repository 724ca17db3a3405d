// log CB(x; logits) = a x - log((e^a - 1) / a), a = logits, for x in [0, 1].
// Loaiza-Ganem & Cunningham, "The continuous Bernoulli: fixing a pervasive error in variational autoencoders", NeurIPS 2019.
#pragma once

#include "forms.h"
#include "math.h"

namespace elbo_ext {
namespace {

// B_2n / (2n)! of the Bernoulli numbers, n >= 1.
struct BernoulliNumbers {
  static constexpr int kCount = 17;
  double over_factorial[kCount] = {8.33333333333333287e-02, -1.38888888888888894e-03, 3.30687830687830710e-05, -8.26719576719576754e-07,
                                   2.08767569878681002e-08, -5.28419013868749322e-10, 1.33825365306846789e-11, -3.38968029632258272e-13,
                                   8.58606205627784517e-15, -2.17486869855806192e-16, 5.50900282836022953e-18, -1.39544646858125223e-19,
                                   3.53470703962946728e-21, -8.95351742703754628e-23, 2.26795245233768293e-24, -5.74479066887220246e-26,
                                   1.45517247561486496e-27};
};

// Written around the middle, a (x - 1/2) - L(a), L(a) = log(sinh(a / 2) / (a / 2)), an even function. For |a| < 2 by Taylor
// series,
//   L(a) = sum_n B_2n / (2n (2n)!) a^2n,    L'(a) = sum_n B_2n / (2n)! a^(2n - 1),
// whose terms fall at least tenfold; elsewhere a / 2 is taken out of both.
template <class T>
struct ContinuousBernoulli : OneForm {
  static constexpr int kInputs = 2, kElementsAtOnce = 2;
  static constexpr const char* kSignature = "x logits";
  static constexpr unsigned kPrecomputedFrom = 0;
  using R = Real<T>;
  struct Precomputed {};

  ELBO_INLINE static Precomputed precompute(const T*, int) { return {}; }

  ELBO_INLINE static T value(const Precomputed&, const T* in) {
    const T a = in[1], size = abs(a), near = near_zero(in);
    const auto is_far = size > T(R(2));
    if (!any(is_far)) return near;
    const T t = fast_exp(T(R(0)) - size);
    return select(is_far, far_from_zero(in, size, t), near);
  }

  ELBO_INLINE static T gradient(const Precomputed&, const T* in, T* d) {
    const T one = T(R(1)), a = in[1], size = abs(a);
    const auto is_far = size > T(R(2));
    d[0] = a;
    d[1] = in[0] - T(R(0.5)) - slope_near_zero(a);  // x - the mean of x
    const T near = near_zero(in);
    if (!any(is_far)) return near;
    const T t = fast_exp(T(R(0)) - size);
    const T inner = one / size - t / (one - t);  // the mean's distance from 1, or from 0 where a < 0
    d[1] = select(is_far, select(a > T(R(0)), (in[0] - one) + inner, in[0] - inner), d[1]);
    return select(is_far, far_from_zero(in, size, t), near);
  }

 private:
  static constexpr int kTerms = std::numeric_limits<R>::digits > 24 ? BernoulliNumbers::kCount : 8;

  ELBO_INLINE static T near_zero(const T* in) {
    const T a = in[1], a2 = a * a;
    constexpr BernoulliNumbers kOf{};
    T series = T(R(0));
    ELBO_UNROLL
    for (int n = kTerms; n >= 1; --n) series = series * a2 + T(R(kOf.over_factorial[n - 1] / (2 * n)));
    return a * (in[0] - T(R(0.5))) - a2 * series;
  }
  ELBO_INLINE static T slope_near_zero(T a) {
    const T a2 = a * a;
    constexpr BernoulliNumbers kOf{};
    T series = T(R(0));
    ELBO_UNROLL
    for (int n = kTerms; n >= 1; --n) series = series * a2 + T(R(kOf.over_factorial[n - 1]));
    return a * series;
  }
  // a (x - [a > 0]) + log(|a| / (1 - e^-|a|))
  ELBO_INLINE static T far_from_zero(const T* in, T size, T t) {
    const T one = T(R(1)), step = select(in[1] > T(R(0)), one, T(R(0)));
    return in[1] * (in[0] - step) + log(size / (one - t));
  }
};

}  // namespace
}  // namespace elbo_ext
