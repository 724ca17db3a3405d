// log(S(hi) - S(lo)), S the logistic function: the mass that a logistic distribution gives to a bin of width 2 h around x,
//   hi = (x - mean + h) / b,   lo = (x - mean - h) / b,
// the scale b given as log b or itself. The outermost bins reach to infinity (Bins). Salimans, Karpathy, Chen & Kingma,
// "PixelCNN++", ICLR 2017, who take the density where the mass is small; this is the mass, however small.
#pragma once

#include "forms.h"
#include "math.h"
#include "tails.h"

namespace elbo_ext {
namespace {

template <class T>
struct DiscretizedLogistic : TwoForms<2> {
  static constexpr int kInputs = 6, kTensors = 3, kElementsAtOnce = 2;
  static constexpr const char* kSignature = "x mean log_scale|scale low high half_bin";
  static constexpr unsigned kPrecomputedFrom = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5, kSharedInputs = 1 << 2;
  using R = Real<T>;
  struct Precomputed {
    Bins<T> bins;
    T factor;          // 1 / b, kept finite, so that 0 / b stays 0
    T slope;           // d log b / d(the scale as given)
    T width;           // 2 h / b = hi - lo
    T tail, rest;      // e^-width and 1 - e^-width
    T half_over_rest;  // width / 2 over the latter
    T log_rest;        // log of the latter, where the width nearly leaves the range of T (`flat`, for any of a register)
    bool flat;
  };

  ELBO_INLINE static Precomputed precompute(const T* in, int forms) {
    const T zero = T(R(0)), one = T(R(1)), s = in[2], bin = in[5] + in[5];
    const bool is_log = form_of(forms, 2) == 0;
    Precomputed p;
    p.bins = make_bins(in[3], in[4], in[5]);
    p.factor = minimum(is_log ? fast_exp(zero - s) : one / s, T(kLargest<T>));
    p.slope = is_log ? one : one / s;
    p.width = minimum(bin * p.factor, T(kLargest<T>));
    p.tail = fast_exp(zero - p.width);
    p.rest = zero - expm1_parts(zero - p.width, p.tail).value;
    p.half_over_rest = T(R(0.5)) * select(p.width > zero, p.width / p.rest, one);
    p.log_rest = zero;
    const auto is_flat = p.width < T(kFlat);
    p.flat = any(is_flat);
    if (p.flat) p.log_rest = select(is_flat, log(bin) - (is_log ? s : log(s)), log(p.rest));
    return p;
  }

  ELBO_INLINE static T value(const Precomputed& p, const T* in) { return from_ends(p, in, make_ends(p, in)); }

  ELBO_INLINE static T gradient(const Precomputed& p, const T* in, T* d) {
    const T zero = T(R(0)), one = T(R(1)), two = T(R(2)), four = T(R(4));
    const Ends e = make_ends(p, in);
    const T over = one / ((one + e.below_hi) * (one + e.above_lo));

    // Between two ends, with centre c = (x - mean) / b and half width r: the mass is sinh r / (cosh c + cosh r), and
    //   d log mass / dc = -sinh c / (cosh c + cosh r),   d log mass / dr = (cosh c cosh r + 1) / (sinh r (cosh c + cosh r)),
    // both divided by the largest of their exponentials. `near` is the end next to the mean, beyond it where |c| > r.
    const T difference = in[0] - in[1], c = minimum(abs(difference) * p.factor, T(kLargest<T>));
    const auto right = difference > zero;
    const T near = select(right, e.lo, zero - e.hi);
    const T at_near = select(right, e.above_lo, e.below_hi), at_far = select(right, e.below_hi, e.above_lo);
    const auto beyond = near > zero;
    const T scaled = select(beyond, one, at_near);
    const T sinh_c = scaled * (zero - expm1_parts(zero - two * c, fast_exp(zero - two * c)).value);
    const T cosh_c_r = scaled * (one + at_far * (four + at_far)) + select(beyond, p.tail, at_far) * (one + at_near * at_near);
    const T of_centre = select(right, zero - sinh_c, sinh_c);
    const T of_log_scale = c * sinh_c - p.half_over_rest * cosh_c_r;

    // Of an outermost bin, S(hi) or 1 - S(lo): the tail beyond its one end.
    const T of_end = p.bins.if_bounded_above(in[0], select(e.hi > zero, e.below_hi, one),
                                             select(e.lo > zero, zero - one, zero - e.above_lo));
    const T end = p.bins.if_bounded_above(in[0], e.hi, e.lo);

    d[0] = p.bins.if_bounded(in[0], of_centre, of_end) * over * p.factor;
    d[1] = zero - d[0];
    d[2] = p.bins.if_bounded(in[0], of_log_scale, zero - end * of_end) * over * p.slope;
    d[3] = d[4] = d[5] = zero;  // numbers, never tensors
    return from_ends(p, in, e);
  }

 private:
  static constexpr R kFlat = std::numeric_limits<R>::min() * R(1e8);

  struct Ends {
    T hi, lo;
    T below_hi, above_lo;  // e^-|hi| and e^-|lo|; 0 for an end at infinity
  };

  ELBO_INLINE static Ends make_ends(const Precomputed& p, const T* in) {
    const T zero = T(R(0)), difference = in[0] - in[1];
    Ends e;
    e.hi = (difference + p.bins.half) * p.factor;
    e.lo = (difference - p.bins.half) * p.factor;
    e.below_hi = p.bins.if_bounded_above(in[0], fast_exp(zero - abs(e.hi)), zero);
    e.above_lo = p.bins.if_bounded_below(in[0], fast_exp(zero - abs(e.lo)), zero);
    return e;
  }

  // log(1 - e^-(hi - lo)) - softplus(-hi) - softplus(lo), the logarithms in one. None of the parts is positive.
  ELBO_INLINE static T from_ends(const Precomputed& p, const T* in, const Ends& e) {
    const T zero = T(R(0)), one = T(R(1));
    const T reach = p.bins.if_bounded_above(in[0], select(e.hi < zero, zero - e.hi, zero), zero) +
                    p.bins.if_bounded_below(in[0], select(e.lo > zero, e.lo, zero), zero);
    const T both = e.below_hi + e.above_lo + e.below_hi * e.above_lo;
    if (p.flat) return p.bins.if_bounded(in[0], p.log_rest, zero) - log1p(both) - reach;
    const T tail = p.bins.if_bounded(in[0], p.tail, zero), rest = p.bins.if_bounded(in[0], p.rest, one);
    return zero - reach - log1p((both + tail) / rest);
  }
};

}  // namespace
}  // namespace elbo_ext
