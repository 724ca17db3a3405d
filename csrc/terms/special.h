// The gamma function and its derivative, for arguments above 0; and the two as differences, which keep their digits where
// lgamma(x + t) - lgamma(t) cancels (t = 1e5, x = 3).
//
// All of it rests on Binet's remainder, what Stirling's formula leaves, and its derivative
//   b(z)  = lgamma(z) - ((z - 1/2) ln z - z + 1/2 ln 2 pi) =  1/(12 z)   - 1/(360 z^3) + ...
//   b'(z) = digamma(z) - (ln z - 1/(2 z))                  = -1/(12 z^2) + 1/(120 z^4) - ...
// which are smooth functions of w = 1/z, for z >= 1 polynomials in v = 2 w - 1: b = w P(v), b' = w^2 Q(v). Smaller z are
// carried to z + 1 by gamma(z + 1) = z gamma(z).
#pragma once

#include "math.h"

namespace elbo_ext {
namespace {

// The coefficients of P and Q, from the constant on: interpolation in Chebyshev's points, to 8e-9 and 7e-8 of the value, ...
template <class R>
struct BinetSeries {
  static constexpr int kTerms = 9;
  R log_gamma[kTerms] = {
      0.0826813919108,
      -0.00123001517584,
      -0.000485102756654,
      0.000100836373355,
      -1.28421104313e-6,
      -6.64817602336e-6,
      2.62948688074e-6,
      -1.06838975643e-7,
      -2.3422764806e-7,
  };
  R digamma[kTerms] = {
      -0.0814513818459,
      0.00343026484974,
      0.00115299166198,
      -0.00039850005267,
      3.85535821371e-5,
      2.48136645149e-5,
      -1.56509522569e-5,
      2.25991332024e-6,
      9.86854643719e-7,
  };
};
// ... and to 1e-17 and 2e-16.
template <>
struct BinetSeries<double> {
  using R = double;
  static constexpr int kTerms = 25;
  R log_gamma[kTerms] = {
      0.082681391910818588188,
      -0.0012300100649059150969,
      -0.00048510438810101621432,
      0.00010076829937245676648,
      -1.2621643045707667953e-6,
      -6.4040423649447440968e-6,
      2.5473662570349741698e-6,
      -4.2740702170682143999e-7,
      -1.1717344867709891476e-7,
      1.2998037825932056412e-7,
      -5.9881142450875001956e-8,
      1.540488628215613658e-8,
      1.207250491714462122e-9,
      -4.2395792599034523039e-9,
      3.0259855482251435059e-9,
      -1.3344406556745197175e-9,
      2.9989947224895308127e-10,
      -1.6927760823482270885e-11,
      -8.3783873454121701607e-12,
      1.2157905455752323576e-10,
      -1.6342688391675844068e-10,
      5.2206812204841866919e-11,
      2.9255106741027435599e-11,
      -2.2185660166261299338e-11,
      3.6660404921702116323e-12,
  };
  R digamma[kTerms] = {
      -0.081451381845912680095,
      0.0034302289060138482664,
      0.0011530082661877827306,
      -0.00039802454027055756437,
      0.000038331033243392616059,
      0.000023140056629300087059,
      -0.000014839712634372782694,
      4.3566438884053083889e-6,
      -1.1528240054548676894e-7,
      -7.009925622921796963e-7,
      4.8935618539830217723e-7,
      -1.9934742732544355382e-7,
      3.8985263558709705464e-8,
      1.700192789359367481e-8,
      -2.4313596614470910722e-8,
      1.6520702226069297709e-8,
      -6.5297279433603461579e-9,
      5.0481583492772662456e-10,
      -3.1061058324460282367e-10,
      7.9274508261733234852e-10,
      1.0878338755220063167e-9,
      -1.7706076011849689574e-9,
      3.2299624194424004271e-10,
      4.4004542737642862099e-10,
      -1.7426061487801036061e-10,
  };
};

// lgamma(z) / ((z - 1) (z - 2)) for 1 <= z <= 3, in powers of z - 2, around two roots and a minimum; to 1e-8 ...
template <class R>
struct RootsOfLogGamma {
  static constexpr int kTerms = 13;
  R coefficient[kTerms] = {
      0.422784335098,
      -0.100317274636,
      0.0329649878424,
      -0.0123849432184,
      0.0049989960888,
      -0.00210224243198,
      0.000912594483918,
      -0.000425154130996,
      0.000191739686686,
      -5.28397356122e-5,
      2.38816072692e-5,
      -3.85804751925e-5,
      1.80915131045e-5,
  };
};
// ... and to 1e-17.
template <>
struct RootsOfLogGamma<double> {
  static constexpr int kTerms = 28;
  double coefficient[kTerms] = {
      0.42278433509846713663,
      -0.10031730167435391981,
      0.032965000621156908764,
      -0.012384192193371804342,
      0.0049986411646271282266,
      -0.0021081308339216706726,
      0.00091537692403869071436,
      -0.00040570739837751511159,
      0.00018255261539826382389,
      -0.000083095114777095615987,
      0.000038169076582760812003,
      -0.000017661767658452518613,
      8.2212344759429058757e-6,
      -3.8468580915330143467e-6,
      1.8113906873056683887e-6,
      -8.5456090897588298568e-7,
      3.9589404593674680815e-7,
      -1.8784426446437580391e-7,
      1.0420418266082639707e-7,
      -4.9827532071170234718e-8,
      5.9105658535078691771e-9,
      -2.7296358592514825817e-9,
      1.6194359237484172678e-8,
      -7.842557720538355431e-9,
      -4.3124957703508173871e-9,
      2.0986002157033105261e-9,
      1.574660698277730178e-9,
      -7.6392923458362009061e-10,
  };
};

template <class T, int kTerms>
ELBO_INLINE T polynomial(const Real<T> (&coefficient)[kTerms], T at) {
  T sum = T(coefficient[kTerms - 1]);
  ELBO_UNROLL
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * at + T(coefficient[k]);
  return sum;
}

// The difference of a polynomial at two places over that of the places, without its cancellation: Horner's scheme for
// (p(a) - p(b)) / (a - b).
template <class T, int kTerms>
ELBO_INLINE T divided_difference(const Real<T> (&coefficient)[kTerms], T a, T b) {
  T at_b = T(coefficient[kTerms - 1]), quotient = at_b;
  ELBO_UNROLL
  for (int k = kTerms - 2; k >= 1; --k) {
    at_b = at_b * b + T(coefficient[k]);
    quotient = quotient * a + at_b;
  }
  return quotient;
}

// b and b' for z > 0.
template <class T>
struct Binet {
  T log_gamma, digamma;
};

template <class T>
ELBO_INLINE Binet<T> binet(T z) {
  using R = Real<T>;
  constexpr BinetSeries<R> kSeries;
  const T one = T(R(1)), half = T(R(0.5));
  const auto small = z < one;
  const bool any_small = any(small);
  const T shifted = any_small ? select(small, z + one, z) : z;
  const T w = one / shifted, v = w + w - one;
  Binet<T> result{w * polynomial(kSeries.log_gamma, v), w * w * polynomial(kSeries.digamma, v)};
  if (any_small) {
    const T over_z = one / z, log_ratio = log1p(over_z);  // ln((z + 1) / z)
    // b(z) = b(z + 1) + (z + 1/2) ln((z + 1) / z) - 1, and its derivative
    result.log_gamma = select(small, result.log_gamma + ((z + half) * log_ratio - one), result.log_gamma);
    result.digamma = select(small, result.digamma + (log_ratio - half * (w + over_z)), result.digamma);
  }
  return result;
}

// lgamma(x + t) - lgamma(t) for t > 0 and x > -t; for t >= 1 from
//   (t - 1/2) ln(1 + x / t) + x (ln(x + t) - 1) + b(x + t) - b(t).
template <class T>
ELBO_INLINE T lgamma_difference(T x, T t) {
  using R = Real<T>;
  constexpr BinetSeries<R> kSeries;
  const T zero = T(R(0)), one = T(R(1)), half = T(R(0.5));
  const auto small = t < one;
  const T s = select(small, t + one, t), z = x + s;
  const T w = one / z, ws = one / s, v = w + w - one, vs = ws + ws - one, dw = zero - x * w * ws;
  const T remainders =
      dw * (polynomial(kSeries.log_gamma, v) + (ws + ws) * divided_difference(kSeries.log_gamma, v, vs));
  const T result = (s - half) * log1p(x / s) + x * (log(z) - one) + remainders;
  // gamma(x + t) / gamma(t) = gamma(x + t + 1) / gamma(t + 1) * t / (x + t)
  return any(small) ? result - select(small, log1p(x / t), zero) : result;
}

// digamma(x + t) - digamma(t) for t > 0 and x > -t; for t >= 1 from ln(1 + x / t) + x / (2 t (x + t)) + b'(x + t) - b'(t),
// none of which has another sign than x.
template <class T>
ELBO_INLINE T digamma_difference(T x, T t) {
  using R = Real<T>;
  constexpr BinetSeries<R> kSeries;
  const T zero = T(R(0)), one = T(R(1)), half = T(R(0.5));
  const auto small = t < one;
  const T s = select(small, t + one, t), z = x + s;
  const T w = one / z, ws = one / s, v = w + w - one, vs = ws + ws - one, dw = zero - x * w * ws;
  const T remainders = dw * ((w + ws) * polynomial(kSeries.digamma, v) +
                             ws * (ws + ws) * divided_difference(kSeries.digamma, v, vs));
  const T result = log1p(x / s) + (remainders - half * dw);
  // digamma(t) = digamma(t + 1) - 1 / t
  return any(small) ? result + select(small, x / (t * (x + t)), zero) : result;
}

// lgamma(z) for z > 0.
template <class T>
ELBO_INLINE T lgamma(T z) {
  using R = Real<T>;
  constexpr RootsOfLogGamma<R> kSeries;
  const T zero = T(R(0)), one = T(R(1)), two = T(R(2));
  const auto small = z < one;
  const T shifted = select(small, z + one, z);
  const T from_one = select(small, z, z - one), from_two = from_one - one;  // exact where they are small, as z + 1 is not
  const T near = from_one * from_two * polynomial(kSeries.coefficient, from_two);
  const T result = select(shifted < T(R(3)), near, lgamma_difference(from_two, two));
  return any(small) ? result - select(small, log(z), zero) : result;
}

// digamma(z) for z > 0, as a difference to its root.
template <class T>
ELBO_INLINE T digamma(T z) {
  using R = Real<T>;
  constexpr double kRoot = 1.461632144968362341262659542325721328468;
  constexpr R kHigh = R(kRoot), kLow = sizeof(R) == 8 ? R(9.549995429965697715184e-17) : R(kRoot - double(kHigh));
  const T zero = T(R(0)), one = T(R(1));
  const auto small = z < one;
  const T from_root = select(small, z - T(R(kHigh - R(1))), z - T(kHigh)) - T(kLow);
  return digamma_difference(from_root, T(kHigh)) - select(small, one / z, zero);
}

// ln(1 + u) and ln(1 + u) - u / (1 + u), which is half of u^2 for small u; given also 1 + u, so that neither loses digits
// where u is close to -1.
template <class T>
struct Log1p {
  T value, beyond_slope;
};

template <class T>
ELBO_INLINE Log1p<T> log1p_parts(T u, T one_plus_u) {
  using R = Real<T>;
  constexpr int kTerms = std::numeric_limits<R>::digits > 24 ? 17 : 8;
  const T one = T(R(1)), two = T(R(2));
  const T over = one / ((two + u) * one_plus_u);
  // Near 0 by ln(1 + u) = 2 artanh(s), s = u / (2 + u), as in log1p_of_unit; u / (1 + u) = 2 s / (1 + s).
  const T s = u * one_plus_u * over, s2 = s * s, over_one_plus_s = T(R(0.5)) * (two + u) * (two + u) * over;
  T series = T(R(1) / R(2 * kTerms - 1));
  ELBO_UNROLL
  for (int k = kTerms - 2; k >= 1; --k) series = series * s2 + T(R(1) / R(2 * k + 1));
  const T far = log(one_plus_u);
  const auto near = abs(u) < T(R(0.5));
  return {select(near, (s + s) + (s + s) * (s2 * series), far),
          select(near, (s2 + s2) * (over_one_plus_s + s * series), far - (one - (two + u) * over))};
}

}  // namespace
}  // namespace elbo_ext
