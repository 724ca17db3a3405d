// log t(x; n, mean, s) = lnG((n + 1) / 2) - lnG(n / 2) - 1/2 ln(n pi) - ln s - (n + 1) / 2 ln(1 + z^2 / n), z = (x - mean) / s,
// with n degrees of freedom, given also as ln n, and the scale s given as ln s or itself. The Gaussian for n -> inf.
#pragma once

#include "count.h"
#include "forms.h"
#include "scale.h"

namespace elbo_ext {
namespace {

template <class T>
struct StudentT : ManyForms {
  static constexpr int kInputs = 4, kElementsAtOnce = 2;
  static constexpr const char* kSignature = "x df|log_df mean log_scale|scale";
  static constexpr unsigned kPrecomputedFrom = 1 << 1 | 1 << 3;  // df and the scale
  static constexpr unsigned kSharedInputs = kPrecomputedFrom;
  using R = Real<T>;
  struct Precomputed {
    T df, over_df;
    T df_slope;     // d df / d(df as given)
    T over_scale;
    T scale_slope;  // d ln s / d(the scale as given)
    T normalizer;   // all that does not depend on z
    T normalizer_slope;  // d normalizer / d df
  };

  ELBO_INLINE static Precomputed precompute(const T* in, int forms) {
    const T zero = T(R(0)), one = T(R(1)), half = T(R(0.5));
    const bool log_df = form_of(forms, 1) != 0, log_scale = form_of(forms, 3) == 0;
    Precomputed p;
    // Beyond this it is the Gaussian to the last digit, and the square is still a number.
    p.df = minimum(log_df ? exponential(in[1], R(-70), R(70)).ordinary : in[1], T(R(std::numeric_limits<R>::digits > 24 ? 1e100 : 1e18)));
    p.df_slope = log_df ? p.df : one;
    p.over_df = one / p.df;
    const T log_s = log_scale ? in[3] : log(in[3]);
    p.over_scale = log_scale ? fast_exp(zero - in[3]) : one / in[3];
    p.scale_slope = log_scale ? one : one / in[3];
    // With t = n / 2 and Binet's remainder b: lnG(t + 1/2) - lnG(t) - 1/2 ln t = t ln(1 + 1 / (2 t)) - 1/2 + b(t + 1/2) - b(t),
    // where t ln(1 + u) - 1/2, u = 1 / (2 t) = 1 / n, is (ln(1 + u) - u) / (2 u).
    const T t = half * p.df, u = p.over_df;
    const Binet<T> above = binet(t + half), at = binet(t);
    const Log1p<T> log_ratio = log1p_parts(u, one + u);
    p.normalizer = (t * log_ratio.value - half) + (above.log_gamma - at.log_gamma) - log_s - T(R(0.5 * kLogTwoPi));
    // Half of d/dt: ln(1 + u) - u / (1 + u), from t ln(1 + u), and b'(t + 1/2) - b'(t)
    p.normalizer_slope = half * (log_ratio.beyond_slope + (above.digamma - at.digamma));
    return p;
  }

  ELBO_INLINE static T value(const Precomputed& p, const T* in) {
    const T z = (in[0] - in[2]) * p.over_scale, y = z * z * p.over_df;
    return p.normalizer - T(R(0.5)) * (p.df + T(R(1))) * log1p_parts(y, T(R(1)) + y).value;
  }

  ELBO_INLINE static T gradient(const Precomputed& p, const T* in, T* d) {
    const T zero = T(R(0)), one = T(R(1)), half = T(R(0.5));
    const T z = (in[0] - in[2]) * p.over_scale, y = z * z * p.over_df, over = one / (one + y);
    const Log1p<T> log = log1p_parts(y, one + y);
    const T pull = (one + p.over_df) * z * over;  // (n + 1) z / (n + z^2)
    d[2] = pull * p.over_scale;                   // d/dmean
    d[0] = zero - d[2];                           // d/dx
    d[3] = (pull * z - one) * p.scale_slope;      // d/dln s = (n + 1) z^2 / (n + z^2) - 1, chained to the form
    // d/dn: of the normalizer, and -1/2 (ln(1 + y) - y / (1 + y)) + y / (2 n (1 + y))
    d[1] = (p.normalizer_slope + half * (y * over * p.over_df - log.beyond_slope)) * p.df_slope;
    return p.normalizer - half * (p.df + one) * log.value;
  }
};

}  // namespace
}  // namespace elbo_ext
