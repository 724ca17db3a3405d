// log Bernoulli(x; logits) = x * logits - softplus(logits), continued to any x in [0, 1].
// Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix C.1, with p = sigmoid(logits).
#pragma once

#include "forms.h"
#include "math.h"

namespace elbo_ext {
namespace {

template <class T>
struct Bernoulli : OneForm {
  static constexpr int kInputs = 2;
  static constexpr const char* kSignature = "x logits";
  static constexpr unsigned kPrecomputedFrom = 0;
  static constexpr unsigned kFastPathInputs = 0b11;
  using R = Real<T>;
  struct Precomputed {};

  ELBO_INLINE static Precomputed precompute(const T*, int) { return {}; }

  ELBO_INLINE static T value(const Precomputed&, const T* in) { return from_tail(in, tail(in[1])); }

  ELBO_INLINE static T gradient(const Precomputed&, const T* in, T* d) {
    const T one = T(R(1)), t = tail(in[1]);
    const T larger = one / (one + t), smaller = t * larger;  // sigmoid of +-|logits|, neither rounded from 1
    const auto positive = in[1] > T(R(0));
    const T p = select(positive, larger, smaller), not_p = select(positive, smaller, larger);
    d[0] = in[1];                                // d/dx = logits
    d[1] = in[0] * not_p - (one - in[0]) * p;    // d/dlogits = x - p, without its cancellation where x is 0 or 1
    return from_tail(in, t);
  }

 private:
  ELBO_INLINE static T tail(T logits) { return fast_exp(T(R(0)) - abs(logits)); }
  // softplus(l) = max(l, 0) + log1p(exp(-|l|)); the first part is joined to x * l, where it cancels exactly.
  ELBO_INLINE static T from_tail(const T* in, T t) {
    const T step = select(in[1] > T(R(0)), T(R(1)), T(R(0)));
    return in[1] * (in[0] - step) - log1p_of_unit(t);
  }
};

}  // namespace
}  // namespace elbo_ext
