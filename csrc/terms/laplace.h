// log Laplace(x; mean, b) = -(|x - mean| / b + log b + log 2), the scale b given as log b or itself.
#pragma once

#include "forms.h"
#include "math.h"

namespace elbo_ext {
namespace {

template <class T>
struct Laplace : TwoForms<2> {
  static constexpr int kInputs = 3;
  static constexpr const char* kSignature = "x mean log_scale|scale";
  static constexpr unsigned kPrecomputedFrom = 1 << 2;  // the scale alone
  using R = Real<T>;
  struct Precomputed {
    T log_2b;
    T root;   // b^(-1/2), applied twice: the result is in range whenever it has a finite value. Kept finite, so that 0 / b is 0
    T slope;  // d log b / d(the scale as given)
  };

  ELBO_INLINE static Precomputed precompute(const T* in, int forms) {
    const T log_2 = T(R(0.693147180559945309)), largest = T(kLargest<T>);
    if (form_of(forms, 2) == 0) return {in[2] + log_2, minimum(fast_exp(in[2] * T(R(-0.5))), largest), T(R(1))};
    return {log(in[2]) + log_2, minimum(T(R(1)) / sqrt(in[2]), largest), T(R(1)) / in[2]};
  }

  ELBO_INLINE static T value(const Precomputed& scale, const T* in) {
    return T(R(0)) - (distance(scale, in[0] - in[1]) + scale.log_2b);
  }

  ELBO_INLINE static T gradient(const Precomputed& scale, const T* in, T* d) {
    const T zero = T(R(0)), difference = in[0] - in[1], per_b = scale.root * scale.root, away = distance(scale, difference);
    d[1] = select(difference > zero, per_b, select(difference < zero, zero - per_b, zero));  // d/dmean = sign(x - mean) / b
    d[0] = zero - d[1];                                                                      // d/dx    = -sign(x - mean) / b
    d[2] = (away - T(R(1))) * scale.slope;  // d/dlog b = |x - mean| / b - 1, chained to the form
    return zero - (away + scale.log_2b);
  }

 private:
  // |x - mean| / b
  ELBO_INLINE static T distance(const Precomputed& scale, T difference) { return abs(difference) * scale.root * scale.root; }
};

}  // namespace
}  // namespace elbo_ext
