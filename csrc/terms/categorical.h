// Terms over a dimension: each element of the data has a vector of parameters, one for each class. A kernel goes through the
// classes in sweeps: first for the largest of each operand, then kSweeps times for sums, and once more for the gradients. It
// keeps one term for each row of classes, which learns from sweep to sweep:
//   given_largest(largest)      of each operand; only those of kSoftmax are looked for
//   given_own(logit)            of the class that a label names, where kLabels
//   add<sweep>(in, sum)         adds what the classes of `in` contribute to the sums
//   given_sums<sweep>(sum)
//   value()
//   gradient(in, d)             the derivatives by the operands of these classes
// Nothing is kept of a class but in the caches, so that no memory of the parameters' size is needed.
//
// In each, e_c = exp(l_c - m), m the largest l, S = sum_c e_c, and the probabilities are s_c = e_c / S.
#pragma once

#include "importance.h"
#include "special.h"

namespace elbo_ext {
namespace {

constexpr int kClassInputs = 2;
// Numbers that a term is told: the share of the uniform distribution in the probabilities (unimix).
struct ClassConstants {
  double unimix, classes;
};

// log p(x) = l_x - log sum_c e^l_c. The first input is 1 for the class x and 0 for the others, as a kernel makes it from x.
template <class T>
struct Categorical {
  static constexpr int kInputs = kClassInputs;
  static constexpr const char* kSignature = "x logits";
  static constexpr bool kLabels = true;  // the first input is a number for each row, the class
  static constexpr unsigned kSoftmax = 0b10;
  static constexpr int kSweeps = 1, kSums = 1;
  using R = Real<T>;
  T largest, own, rest, own_minus_largest, over_sum;

  ELBO_INLINE explicit Categorical(const ClassConstants&) {}
  ELBO_INLINE void given_largest(const T (&of)[kClassInputs]) { largest = finite_reference(of[1]); }

  template <int kSweep>
  ELBO_INLINE void add(const T (&in)[kClassInputs], T (&sum)[kSums]) const {
    const T zero = T(R(0));
    sum[0] = sum[0] + select(in[0] > zero, zero, exp(in[1] - largest));
  }
  // The logit of the class x, after the largest one.
  ELBO_INLINE void given_own(T logit) {
    own_minus_largest = logit - largest;
    own = exp(own_minus_largest);
  }
  template <int kSweep>
  ELBO_INLINE void given_sums(const T (&sum)[kSums]) {
    rest = sum[0];
    over_sum = T(R(1)) / (own + rest);
  }

  // l_x - m - log S, S = own + rest. Where x is the most probable class own = 1, and the others may be as small as they like.
  ELBO_INLINE T value() const { return own_minus_largest - log1p((own - T(R(1))) + rest); }
  // d/dl_c = [c = x] - s_c, and 1 - s_x as the sum of the others, which does not cancel.
  ELBO_INLINE void gradient(const T (&in)[kClassInputs], T (&d)[kClassInputs]) const {
    const T zero = T(R(0)), e = exp(in[1] - largest);
    d[0] = zero;
    d[1] = select(in[0] > zero, rest, zero - e) * over_sum;
  }
};

// sum_c x_c log s_c, without the coefficient, which is a constant of the data.
template <class T>
struct Multinomial {
  static constexpr int kInputs = kClassInputs;
  static constexpr const char* kSignature = "x logits";
  static constexpr bool kLabels = false;
  static constexpr unsigned kSoftmax = 0b10;
  static constexpr int kSweeps = 1, kSums = 3;
  using R = Real<T>;
  T largest, log_sum, over_sum, total, weighted;

  ELBO_INLINE explicit Multinomial(const ClassConstants&) {}
  ELBO_INLINE void given_largest(const T (&of)[kClassInputs]) { largest = finite_reference(of[1]); }

  template <int kSweep>
  ELBO_INLINE void add(const T (&in)[kClassInputs], T (&sum)[kSums]) const {
    const T zero = T(R(0)), difference = in[1] - largest;
    sum[0] = sum[0] + exp(difference);
    sum[1] = sum[1] + in[0];
    sum[2] = sum[2] + select(abs(in[0]) <= zero, zero, in[0] * difference);  // 0 of an impossible class adds nothing
  }
  template <int kSweep>
  ELBO_INLINE void given_sums(const T (&sum)[kSums]) {
    log_sum = log(sum[0]);
    over_sum = T(R(1)) / sum[0];
    total = sum[1];
    weighted = sum[2];
  }

  ELBO_INLINE T value() const { return weighted - total * log_sum; }
  // d/dx_c = log s_c, d/dl_c = x_c - total s_c
  ELBO_INLINE void gradient(const T (&in)[kClassInputs], T (&d)[kClassInputs]) const {
    const T difference = in[1] - largest;
    d[0] = difference - log_sum;
    d[1] = in[0] - total * (exp(difference) * over_sum);
  }
};

// KL(p || q) = sum_c p_c (log p_c - log q_c), where p_c = (1 - u) s_c + u / C is of `logits` and q of `prior_logits` in the
// same way, u = unimix (Hafner et al. 2023, "Mastering diverse domains through world models").
//
// With r = log p - log q and sum p = sum q = 1 it is sum_c p_c (exp(-r_c) - 1 + r_c), of which no term is negative and which
// keeps its digits as p -> q. For that, p - q is computed as such: with k_c = (l_c - m) - (l'_c - m') of logits and prior,
//   S - S' = sum_c e'_c (exp(k_c) - 1),   log s_c - log s'_c = k_c - log(S / S'),   s_c - s'_c = s'_c (exp(that) - 1).
template <class T>
struct CategoricalKL {
  static constexpr int kInputs = kClassInputs;
  static constexpr const char* kSignature = "logits prior_logits";
  static constexpr bool kLabels = false;
  static constexpr unsigned kSoftmax = 0b11;
  static constexpr int kSweeps = 2, kSums = 3;
  using R = Real<T>;
  T largest[2], over_sum[2], log_sum_ratio;
  T kl, mean_log_ratio, mean_difference;
  T kept, uniform;  // 1 - u and u / C
  bool mixed;

  ELBO_INLINE explicit CategoricalKL(const ClassConstants& constants)
      : kept(T(R(1.0 - constants.unimix))), uniform(T(R(constants.unimix / constants.classes))), mixed(constants.unimix > 0) {}
  ELBO_INLINE void given_largest(const T (&of)[kClassInputs]) {
    largest[0] = finite_reference(of[0]);
    largest[1] = finite_reference(of[1]);
  }

  // Of some classes.
  struct Class {
    T s, prior;          // s_c and s'_c
    T difference;        // s_c - s'_c
    T log_ratio;         // log p_c - log q_c, 0 where p_c is
    T kl;                // what they add to the KL
    T prior_over_q;      // s'_c / q_c: 1 without unimix
  };

  ELBO_INLINE T log_e_ratio(const T (&in)[kClassInputs]) const {
    return (in[0] - in[1]) - (largest[0] - largest[1]);
  }
  // exp(k) - 1 for |k| < 1
  ELBO_INLINE static T small_expm1(T k) { return expm1_parts(k, T(R(1))).value; }

  ELBO_INLINE Class of(const T (&in)[kClassInputs]) const {
    const T zero = T(R(0)), one = T(R(1));
    Class c;
    c.s = exp(in[0] - largest[0]) * over_sum[0];
    c.prior = exp(in[1] - largest[1]) * over_sum[1];
    const T log_s_ratio = log_e_ratio(in) - log_sum_ratio;
    const auto near = abs(log_s_ratio) < one;
    c.difference = select(near, c.prior * small_expm1(select(near, log_s_ratio, zero)), c.s - c.prior);
    T p = c.s, q = c.prior, p_minus_q = c.difference;
    if (mixed) {
      p = kept * c.s + uniform;
      q = kept * c.prior + uniform;
      p_minus_q = kept * c.difference;
      c.log_ratio = log1p_parts(p_minus_q / q, p / q).value;
      c.prior_over_q = c.prior / q;
    } else {
      c.log_ratio = select(p > zero, log_s_ratio, zero);
      c.prior_over_q = one;
    }
    const auto small = abs(c.log_ratio) < one;
    const T remainder = expm1_parts(zero - select(small, c.log_ratio, zero), one).minus_d;
    c.kl = select(small, select(p > zero, p * remainder, zero - p_minus_q), p * c.log_ratio - p_minus_q);
    return c;
  }

  template <int kSweep>
  ELBO_INLINE void add(const T (&in)[kClassInputs], T (&sum)[kSums]) const {
    if constexpr (kSweep == 0) {
      const T zero = T(R(0)), e = exp(in[0] - largest[0]), prior = exp(in[1] - largest[1]), k = log_e_ratio(in);
      const auto near = abs(k) < T(R(1));
      sum[0] = sum[0] + e;
      sum[1] = sum[1] + prior;
      sum[2] = sum[2] + select(near, prior * small_expm1(select(near, k, zero)), e - prior);
    } else {
      add(of(in), sum);
    }
  }
  // The second sweep, of classes that a kernel may keep for the gradients.
  ELBO_INLINE void add(const Class& c, T (&sum)[kSums]) const {
    sum[0] = sum[0] + c.kl;
    sum[1] = sum[1] + c.s * c.log_ratio;
    sum[2] = sum[2] + c.prior_over_q * c.difference;
  }
  template <int kSweep>
  ELBO_INLINE void given_sums(const T (&sum)[kSums]) {
    if constexpr (kSweep == 0) {
      over_sum[0] = T(R(1)) / sum[0];
      over_sum[1] = T(R(1)) / sum[1];
      log_sum_ratio = log1p_parts(sum[2] * over_sum[1], sum[0] * over_sum[1]).value;
    } else {
      kl = sum[0];
      mean_log_ratio = sum[1];
      mean_difference = sum[2];
    }
  }

  ELBO_INLINE T value() const { return kl; }
  // By ds_c/dl_k = s_c ([c = k] - s_k):
  //   dKL/dl_k  = (1 - u) s_k (r_k - sum_c s_c r_c)
  //   dKL/dl'_k = -(1 - u) s'_k (w_k - sum_c s'_c w_c),   w_c = (p_c - q_c) / q_c = (1 - u) (s_c - s'_c) / q_c
  ELBO_INLINE void gradient(const T (&in)[kClassInputs], T (&d)[kClassInputs]) const { gradient(of(in), d); }
  ELBO_INLINE void gradient(const Class& c, T (&d)[kClassInputs]) const {
    d[0] = kept * (c.s * (c.log_ratio - mean_log_ratio));
    d[1] = kept * kept * (c.prior * mean_difference - c.prior_over_q * c.difference);
  }
};

}  // namespace
}  // namespace elbo_ext

// The list of them, as that of terms/list.h, whose numbers these do not repeat.
#define ELBO_FOR_EACH_CLASS_TERM(X) \
  X(32, Categorical, "categorical") \
  X(33, Multinomial, "multinomial") \
  X(34, CategoricalKL, "categorical_kl")
