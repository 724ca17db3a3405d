// log Laplace(x; mean, b) = -(|x - mean| / b + log b + log 2), the scale b given as log b or itself.
#pragma once

#include "forms.h"
#include "math.h"

namespace elbo_ext {
namespace {

template <class T>
struct Laplace : TwoForms<2> {
  static constexpr int kInputs = 3, kElementsAtOnce = 2;
  static constexpr const char* kSignature = "x mean log_scale|scale";
  static constexpr unsigned kPrecomputedFrom = 1 << 2;  // the scale alone
  static constexpr unsigned kSharedInputs = 0b100;
  using R = Real<T>;
  struct Precomputed {
    T log_2b;
    T slope;  // d log b / d(the scale as given)
    // 1 / b; or, where that nearly leaves the range of T (`extreme`, for any of the numbers in a register), b^(-1/2), applied
    // twice: the result is then in range whenever it has a finite value. Kept finite, so that 0 / b stays 0.
    T factor;
    bool extreme;
    T b;  // unless the scale is given as log b
    bool is_log;

    ELBO_INLINE T over_b(T number) const { return extreme ? number * factor * factor : number * factor; }
    // |x - mean| / b - 1, without its cancellation where b is known exactly
    ELBO_INLINE T excess(T difference, T distance) const { return is_log ? distance - T(R(1)) : over_b(abs(difference) - b); }
  };

  ELBO_INLINE static Precomputed precompute(const T* in, int forms) {
    const T s = in[2], one = T(R(1));
    const bool is_log = form_of(forms, 2) == 0;
    const T log_b = is_log ? s : log(s);
    Precomputed scale{log_b + T(R(0.693147180559945309)), is_log ? one : one / s, one,
                      any(abs(log_b) > T(kOrdinaryExponent<T>)), s, is_log};
    if (is_log) scale.factor = fast_exp(scale.extreme ? s * T(R(-0.5)) : T(R(0)) - s);
    else scale.factor = one / (scale.extreme ? sqrt(s) : s);
    scale.factor = minimum(scale.factor, T(kLargest<T>));
    return scale;
  }

  ELBO_INLINE static T value(const Precomputed& scale, const T* in) {
    return T(R(0)) - (scale.over_b(abs(in[0] - in[1])) + scale.log_2b);
  }

  ELBO_INLINE static T gradient(const Precomputed& scale, const T* in, T* d) {
    const T zero = T(R(0)), one = T(R(1)), difference = in[0] - in[1], distance = scale.over_b(abs(difference));
    const T sign = select(difference > zero, one, select(difference < zero, zero - one, zero));
    d[1] = scale.over_b(sign);                                  // d/dmean = sign(x - mean) / b
    d[0] = zero - d[1];                                         // d/dx    = -sign(x - mean) / b
    d[2] = scale.excess(difference, distance) * scale.slope;    // d/dlog b = |x - mean| / b - 1, chained to the form
    return zero - (distance + scale.log_2b);
  }
};

}  // namespace
}  // namespace elbo_ext
