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
// ... and to 1e-18 and 2e-17, so that their derivatives, too, are right to the last digit.
template <>
struct BinetSeries<double> {
  using R = double;
  static constexpr int kTerms = 29;
  R log_gamma[kTerms] = {
      0.082681391910818588188,
      -0.0012300100649059082082,
      -0.00048510438810102613677,
      0.00010076829937175281373,
      -1.2621643035432956391e-6,
      -6.4040423440461289692e-6,
      2.5473662257449176678e-6,
      -4.2740730259937594983e-7,
      -1.1717301021504343845e-7,
      1.2998242162756373017e-7,
      -5.9884549115188605983e-8,
      1.5396184977057751312e-8,
      1.2233934137661052303e-9,
      -4.2177485047759887532e-9,
      2.9770030366685933356e-9,
      -1.3626940517932269947e-9,
      3.9656017924715061319e-10,
      -1.6262885103573853993e-11,
      -1.2978008430369542305e-10,
      1.8271720147665101097e-10,
      -7.553675252155657021e-11,
      -5.2076369256514215149e-11,
      7.4667008530743630494e-12,
      6.4161672033147907523e-11,
      -1.3016645859874062394e-11,
      -3.7209670808504084021e-11,
      1.4556038841740369288e-11,
      6.6837669504932589883e-12,
      -3.3960243609481743403e-12,
  };
  R digamma[kTerms] = {
      -0.081451381845912680095,
      0.0034302289060138722706,
      0.0011530082661878674914,
      -0.00039802454027330064418,
      0.000038331033234708238667,
      0.000023140056727461288538,
      -0.000014839712375161193278,
      4.3566421899660121717e-6,
      -1.1528591675106920797e-7,
      -7.009756173811577875e-7,
      4.8938215728146550752e-7,
      -1.9945416033477758159e-7,
      3.8871695716929461256e-8,
      1.7448878759388541784e-8,
      -2.4013244158395982027e-8,
      1.5239583488516109508e-8,
      -6.9789669070235843126e-9,
      3.0510528696741064714e-9,
      -8.3273005429428308015e-11,
      -2.709068983420596688e-9,
      1.5193839679076706407e-9,
      1.4962287078196837715e-9,
      -6.462126870952466484e-10,
      -1.5314876808446240963e-9,
      6.9141835784594033041e-10,
      6.9398347213614321486e-10,
      -3.8644546714650048684e-10,
      -1.0815067982994428471e-10,
      7.083582062707602534e-11,
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

// b and b' for z > 0, given also 1 / z.
template <class T>
struct Binet {
  T log_gamma, digamma;
};

template <class T>
ELBO_INLINE Binet<T> binet(T z, T over_z) {
  using R = Real<T>;
  constexpr BinetSeries<R> kSeries;
  const T one = T(R(1)), half = T(R(0.5));
  const auto small = z < one;
  const bool any_small = any(small);
  const T w = any_small ? select(small, one / (z + one), over_z) : over_z, v = w + w - one;
  Binet<T> result{w * polynomial(kSeries.log_gamma, v), w * w * polynomial(kSeries.digamma, v)};
  if (any_small) {
    const T log_ratio = log1p(over_z);  // ln((z + 1) / z)
    // b(z) = b(z + 1) + (z + 1/2) ln((z + 1) / z) - 1, and its derivative
    result.log_gamma = select(small, result.log_gamma + ((z + half) * log_ratio - one), result.log_gamma);
    result.digamma = select(small, result.digamma + (log_ratio - half * (w + over_z)), result.digamma);
  }
  return result;
}

template <class T>
ELBO_INLINE Binet<T> binet(T z) {
  return binet(z, T(Real<T>(1)) / z);
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

// 1/3, 1/5, 1/7, ...: (artanh(s) - s) / s^3 in powers of s^2, cut where the rest is below the rounding for s <= 1/3.
template <class R>
struct ArtanhSeries {
  static constexpr int kTerms = std::numeric_limits<R>::digits > 24 ? 16 : 7;
  R coefficient[kTerms];
  constexpr ArtanhSeries() : coefficient{} {
    for (int n = 0; n < kTerms; ++n) coefficient[n] = R(1) / R(2 * n + 3);
  }
};

// ln(1 + u), its derivative 1 / (1 + u), and ln(1 + u) - u / (1 + u), which is half of u^2 for small u; given also 1 + u, so
// that none loses digits where u is close to -1.
template <class T>
struct Log1p {
  T value, slope, beyond_slope;
};

template <class T>
ELBO_INLINE Log1p<T> log1p_parts(T u, T one_plus_u) {
  using R = Real<T>;
  constexpr ArtanhSeries<R> kSeries;
  const T one = T(R(1)), two = T(R(2));
  const T over = one / ((two + u) * one_plus_u);
  // Near 0 by ln(1 + u) = 2 artanh(s), s = u / (2 + u); u / (1 + u) = 2 s / (1 + s).
  const T s = u * one_plus_u * over, s2 = s * s, over_one_plus_s = T(R(0.5)) * (two + u) * (two + u) * over;
  const T series = polynomial(kSeries.coefficient, s2);
  const T far = log(one_plus_u), slope = (two + u) * over;
  const auto near = abs(u) < T(R(0.5));
  return {select(near, (s + s) + (s + s) * (s2 * series), far), slope,
          select(near, (s2 + s2) * (over_one_plus_s + s * series), far - (one - slope))};
}

}  // namespace
}  // namespace elbo_ext
