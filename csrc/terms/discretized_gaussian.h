// log(Phi(hi) - Phi(lo)): the mass that a Gaussian gives to a bin of width 2 h around x,
//   hi = (x - mean + h) / sigma,   lo = (x - mean - h) / sigma,
// the outermost bins reaching to infinity (Bins). The rate term of learned compression (Ballé, Minnen, Singh, Hwang &
// Johnston, "Variational image compression with a scale hyperprior", ICLR 2018), there with a floor; here there is none.
#pragma once

#include "scale.h"
#include "tails.h"

namespace elbo_ext {
namespace {

// The standard normal's mass between c - r and c + r is 2 r phi(c) S, S = sum_k r^2k He_2k(c) / (2k + 1)!, with Hermite's
// polynomials. For r (|c| + 2) < 1, where the difference of two tails would lose digits, and its derivatives all of them.
template <class T>
struct NarrowBin {
  T sum;         // S
  T of_centre;   // dS / dc, over r
  T of_width;    // r dS / dr
};

template <class T>
ELBO_INLINE NarrowBin<T> narrow_bin(T c, T r) {
  using R = Real<T>;
  constexpr int kTerms = std::numeric_limits<R>::digits > 24 ? 9 : 5;
  constexpr InverseFactorials<2 * kTerms + 2> kOver;
  const T rc = r * c, r2 = r * r;
  // r^n He_n(c): He_(n+1) = c He_n - n He_(n-1), He_n' = n He_(n-1).
  T before = T(R(1)), last = rc;
  NarrowBin<T> bin{T(R(1)), T(R(0)), T(R(0))};
  ELBO_UNROLL
  for (int k = 1; k <= kTerms; ++k) {
    const T even = rc * last - T(R(2 * k - 1)) * r2 * before;
    bin.of_centre = bin.of_centre + last * T(R(2 * k * kOver.factorial[2 * k + 1]));
    bin.sum = bin.sum + even * T(R(kOver.factorial[2 * k + 1]));
    bin.of_width = bin.of_width + even * T(R(2 * k * kOver.factorial[2 * k + 1]));
    before = even;
    last = rc * even - T(R(2 * k)) * r2 * last;
  }
  return bin;
}

template <class T>
struct DiscretizedGaussian : ScaleForms<2> {
  static constexpr int kInputs = 6, kTensors = 3, kElementsAtOnce = 2;
  static constexpr const char* kSignature = "x mean " ELBO_SCALE("") " low high half_bin";
  static constexpr unsigned kPrecomputedFrom = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5, kSharedInputs = 1 << 2;
  using R = Real<T>;
  struct Precomputed {
    Bins<T> bins;
    T factor;     // 1 / sigma, kept finite, so that 0 / sigma stays 0
    T slope;      // d log sigma / d(the scale as given)
    T radius;     // h / sigma
    T log_width;  // log(2 h / sigma), where the radius nearly leaves the range of T (`flat`, for any of a register)
    bool flat;
  };

  ELBO_INLINE static Precomputed precompute(const T* in, const Forms& forms) {
    const T s = in[2], half = T(R(0.5));
    const ScaleForm<R> form(forms, 2);
    FlooredScale<T> scale;
    if (form.ordinary()) {
      scale.sigma.value = standard_deviation(form, s);
      scale.logvar_slope = log_variance_slope_without_floor(form.number, s);
    } else {
      scale = floored_scale(form, s);
    }
    Precomputed p;
    p.bins = make_bins(in[3], in[4], in[5]);
    p.factor = minimum(T(R(1)) / scale.sigma.value, T(kLargest<T>));
    p.slope = half * scale.logvar_slope;
    p.radius = minimum(in[5] * p.factor, T(kLargest<T>));
    p.log_width = T(R(0));
    p.flat = any(p.radius < T(kFlat));
    if (p.flat) {
      if (form.ordinary()) scale.logvar = log_variance_without_floor(form.number, s);
      p.log_width = log(in[5] + in[5]) - half * scale.logvar;
    }
    return p;
  }

  ELBO_INLINE static T value(const Precomputed& p, const T* in) {
    T unused[2];
    return evaluate<false>(p, in, unused);
  }

  ELBO_INLINE static T gradient(const Precomputed& p, const T* in, T* d) {
    T by[2];
    const T value = evaluate<true>(p, in, by);
    d[0] = by[0] * p.factor;
    d[1] = T(R(0)) - d[0];
    d[2] = by[1] * p.slope;
    d[3] = d[4] = d[5] = T(R(0));  // numbers, never tensors
    return value;
  }

 private:
  static constexpr R kFlat = std::numeric_limits<R>::min() * R(1e8);

  // The value; by[0] its derivative by the centre (x - mean) / sigma, by[1] by log sigma.
  template <bool kGradient>
  ELBO_INLINE static T evaluate(const Precomputed& p, const T* in, T* by) {
    const T zero = T(R(0)), one = T(R(1)), two = T(R(2)), half = T(R(0.5)), largest = T(kLargest<T>);
    const T difference = in[0] - in[1], r = p.radius;
    // By symmetry the mean lies left of the centre, and the mass of an outermost bin is Q(near).
    const T sign = p.bins.if_bounded(in[0], select(difference < zero, zero - one, one),
                                     p.bins.if_bounded_above(in[0], zero - one, one));
    const T distance = sign * difference;
    const T c = minimum(distance * p.factor, largest);
    const T measure = p.bins.if_bounded(in[0], r * (c + two), two);
    const auto is_narrow = measure < one;

    T value = zero;
    if constexpr (kGradient) by[0] = by[1] = zero;
    if (any(is_narrow)) {
      const NarrowBin<T> bin = narrow_bin(c, r);
      const T log_mass = p.flat ? p.log_width + log(bin.sum) : log(two * r * bin.sum);
      value = log_mass - (T(R(kLogRootTwoPi)) + half * c * c);
      if constexpr (kGradient) {
        const T over = one / bin.sum;
        by[0] = r * bin.of_centre * over - c;
        by[1] = c * c - one - (r * c * bin.of_centre + bin.of_width) * over;
      }
    }
    if (any(select(is_narrow, zero, one) > zero)) {
      // Where the mean lies outside, phi(near) (m(near) - e m(far)), e = phi(far) / phi(near) and m the Mills ratio; else 1
      // minus both tails.
      const T near = zero - minimum(zero - (distance - p.bins.half) * p.factor, largest), size = abs(near);
      const T far = p.bins.if_bounded(in[0], minimum((distance + p.bins.half) * p.factor, largest), zero);
      const T between = zero - two * (r * c);
      const T e = p.bins.if_bounded(in[0], fast_exp(between), zero);
      const T of_near = mills_ratio(size), of_far = e * mills_ratio(far);
      const auto is_inside = near < zero;
      const T log_phi = zero - half * size * size;
      const T phi = T(R(kOverRootTwoPi)) * fast_exp(log_phi);
      const T tails = phi * (of_near + of_far), inside = one - tails;
      const T mass = select(is_inside, inside, of_near - of_far);
      const T wide = log(mass) + select(is_inside, ((one - inside) - tails) / inside,  // log1p(-tails)
                                        log_phi - T(R(kLogRootTwoPi)));
      value = select(is_narrow, value, wide);
      if constexpr (kGradient) {
        const T at_near = select(is_inside, phi, one) / mass;
        const T fallen = p.bins.if_bounded(in[0], zero - expm1_parts(between, e).value, one);
        by[0] = select(is_narrow, by[0], zero - at_near * fallen);
        by[1] = select(is_narrow, by[1], at_near * (near - far * e));
      }
    }
    if constexpr (kGradient) by[0] = sign * by[0];
    return value;
  }
};

}  // namespace
}  // namespace elbo_ext
