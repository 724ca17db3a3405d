// log ZINB(x; m, t, g): a negative binomial (negative_binomial.h) where a gate that is open with probability g = sigmoid(a)
// makes zeros of its own, a being the gate's logits:
//   x = 0: ln(g + (1 - g) NB(0)),   x > 0: ln(1 - g) + ln NB(x).
#pragma once

#include "negative_binomial.h"

namespace elbo_ext {
namespace {

template <class T>
struct ZeroInflatedNegativeBinomial : CountTerm<ZeroInflatedNegativeBinomial<T>, T>, ManyForms {
  static constexpr int kInputs = 4, kElementsAtOnce = 2;
  static constexpr unsigned kSharedInputs = 1 << 2;  // theta
  static constexpr const char* kSignature = "x mean|log_mean|logits theta|log_theta gate_logits";
  using R = Real<T>;

  template <bool kGradient>
  ELBO_INLINE static T at_zero(const T* in, int forms, T* d) {
    const T zero = T(R(0)), one = T(R(1));
    T by_mean, by_theta;
    const T count = negative_binomial_at_zero<kGradient>(in, forms, by_mean, by_theta);  // ln NB(0) <= 0
    const Gate gate(in[3]);
    // The sum of two probabilities, s = g + (1 - g) NB(0) = 1 + (1 - g) (NB(0) - 1)
    const T nb = fast_exp(count);
    const T less = gate.closed * expm1_parts(count, nb).value, of_nb = gate.closed * nb, sum = gate.open + of_nb;
    const Log1p<T> log = log1p_parts(less, sum);
    T value = log.value;
    // Where both probabilities leave the range of T, ln s is the larger of their logarithms.
    const auto tiny = minimum(zero - in[3], zero - count) > T(kOrdinaryExponent<T>);
    const bool any_tiny = any(tiny);
    const T apart = count - in[3], ratio = any_tiny ? fast_exp(zero - abs(apart)) : zero;
    if (any_tiny) value = select(tiny, select(apart > zero, count, in[3]) + log1p_of_unit(ratio), value);
    if constexpr (kGradient) {
      T posterior = of_nb * log.slope;                  // the probability that the zero is the negative binomial's
      T by_gate = zero - less * gate.open * log.slope;  // g (1 - g) (1 - NB(0)) / s
      if (any_tiny) {
        const T most = one / (one + ratio), least = ratio * most;
        posterior = select(tiny, select(apart > zero, most, least), posterior);  // sigmoid(ln NB(0) - a)
        by_gate = select(tiny, select(apart > zero, least, most), by_gate);      // sigmoid(a - ln NB(0))
      }
      d[1] = posterior * by_mean;
      d[2] = posterior * by_theta;
      d[3] = by_gate;
    }
    return value;
  }

  template <bool kGradient>
  ELBO_INLINE static T above_zero(const T* in, int forms, T* d) {
    T by_mean, by_theta;
    const T value = negative_binomial_above_zero<kGradient>(in, forms, by_mean, by_theta);
    const Gate gate(in[3]);
    if constexpr (kGradient) d[1] = by_mean, d[2] = by_theta, d[3] = T(R(0)) - gate.open;  // d ln(1 - g)/da = -g
    return value - (positive_part(in[3]) + log1p_of_unit(gate.tail));                      // ln(1 - g) = -softplus(a)
  }

  // As a negative binomial's where x > 0. At x = 0, a jump, it has none.
  ELBO_INLINE static T data_gradient(const T* in, int forms) {
    return select(in[0] > T(R(0)), negative_binomial_data_gradient(in, forms), T(R(0)));
  }

 private:
  // The probabilities of a gate, g = sigmoid(a) and 1 - g, neither rounded from 1.
  struct Gate {
    T open, closed, tail;
    ELBO_INLINE explicit Gate(T a) : tail(fast_exp(T(R(0)) - abs(a))) {
      const T larger = T(R(1)) / (T(R(1)) + tail), smaller = tail * larger;
      const auto positive = a > T(R(0));
      open = select(positive, larger, smaller);
      closed = select(positive, smaller, larger);
    }
  };
};

}  // namespace
}  // namespace elbo_ext
