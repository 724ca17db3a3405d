// The tail of the normal distribution, and the bins of discretized distributions.
#pragma once

#include <limits>

#include "math.h"

namespace elbo_ext {
namespace {

constexpr double kLogRootTwoPi = 0.918938533204672741780329736406;
constexpr double kOverRootTwoPi = 0.398942280401432677939946059934;

// (1 + t) m(t), m the Mills ratio, as a polynomial of s = (t - 5) / (t + 5), which maps t >= 0 to [-1, 1) (M. M. Shepherd &
// J. G. Laframboise, "Chebyshev approximation of (1 + 2x) exp(x^2) erfc x in 0 <= x < inf", Math. Comp. 36, 1981): highest
// power first, interpolated at Chebyshev's points in 40 digits. The rest is 1.5e-8 and 1.1e-17.
template <class R>
struct MillsPolynomial {
  static constexpr int kCount = 25;
  double coefficient[kCount] = {
      6.1630471986551671e-11, -9.5452158844568583e-10, -1.0770966817867951e-09, 1.1020770424653135e-08,
      1.0062736292034490e-08, -7.7556892823196662e-08, -6.7352467072358908e-08, 4.9195580079427622e-07,
      3.2194150125726876e-07, -3.2772513658038686e-06, -1.7721527238693433e-07, 2.2709591493592911e-05,
      -2.4805466630979408e-05, -1.3437427041945409e-04, 4.5704382051160779e-04, 1.9530636365484052e-05,
      -4.2012903110784164e-03, 1.6348231281331425e-02, -3.8026592187718318e-02, 6.1505045840161206e-02,
      -6.6177600778995815e-02, 2.5072179301639779e-02, 7.7781598868735577e-02, -2.2948753825211318e-01,
      1.1568486282918946e+00};
};
template <>
struct MillsPolynomial<float> {
  static constexpr int kCount = 12;
  double coefficient[kCount] = {
      -8.124019626e-05, 3.837268672e-04, -3.532491340e-05, -4.119518884e-03,
      1.637554694e-02, -3.806878215e-02, 6.149877755e-02, -6.616774071e-02,
      2.507271113e-02, 7.778075493e-02, -2.294875456e-01, 1.156848640e+00};
};

// The Mills ratio m(t) = Q(t) / phi(t) of the standard normal distribution, Q(t) = 1 - Phi(t), for t >= 0: sqrt(pi / 2) at 0,
// like 1 / t far out, right to 2 ulp everywhere.
template <class T>
ELBO_INLINE T mills_ratio(T t) {
  using R = Real<T>;
  constexpr MillsPolynomial<R> kOf{};
  const T five = T(R(5)), inside = minimum(t, T(kLargest<T>));  // so that s is no quotient of infinities
  const T s = (inside - five) / (inside + five);
  T series = T(R(kOf.coefficient[0]));
  ELBO_UNROLL
  for (int k = 1; k < kOf.kCount; ++k) series = series * s + T(R(kOf.coefficient[k]));
  return series / (T(R(1)) + inside);
}

// The bins of a discretized distribution: x stands for [x - half, x + half]; but the lowest bin, of x <= low + half, begins at
// -inf, and the highest one, of x >= high - half, ends at +inf. Without outermost bins low is -inf and high is +inf.
template <class T>
struct Bins {
  T half, lowest, highest;

  // NaN is bounded, so that it comes through.
  template <class Number>
  ELBO_INLINE Number if_bounded_below(T x, Number yes, Number no) const { return select(x <= lowest, no, yes); }
  template <class Number>
  ELBO_INLINE Number if_bounded_above(T x, Number yes, Number no) const { return select(x >= highest, no, yes); }
  template <class Number>
  ELBO_INLINE Number if_bounded(T x, Number yes, Number no) const {
    return if_bounded_below(x, if_bounded_above(x, yes, no), no);
  }
};

template <class T>
ELBO_INLINE Bins<T> make_bins(T low, T high, T half) { return {half, low + half, high - half}; }

}  // namespace
}  // namespace elbo_ext
