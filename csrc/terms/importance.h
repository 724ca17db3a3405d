// The importance-weighted bound of K log-weights, log 1/K sum_k w_k, and its gradient, the normalized weights:
// Burda, Grosse & Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016. In two passes: the largest log-weight,
// then the weights relative to it, none of which overflows.
#pragma once

#include <limits>

#include "number.h"

namespace elbo_ext {
namespace {

template <class T>
ELBO_INLINE T larger(T a, T b) {
  return select(a > b, a, b);
}

// What the log-weights are taken relative to: the largest, but 0 if it is infinite, where inf - inf would be NaN.
template <class T>
ELBO_INLINE T finite_reference(T largest) {
  using R = Real<T>;
  return select(abs(largest) > T(std::numeric_limits<R>::max()), T(R(0)), largest);
}

// 1 / sum_k w_k, given the sum of the weights relative to the reference: what normalizes them. Where all weights are zero,
// 0, so that no sample has one; the limit depends on how they got there.
template <class T>
ELBO_INLINE T normalizer(T sum) {
  using R = Real<T>;
  return select(abs(sum) > T(R(0)), T(R(1)) / sum, sum);
}

// log 1/K sum_k w_k, given the sum of the weights relative to the reference. No weight at all is log 0.
template <class T>
ELBO_INLINE T log_mean_weight(T sum, T reference, Real<T> log_count) {
  return log(sum) + (reference - T(log_count));
}

}  // namespace
}  // namespace elbo_ext
