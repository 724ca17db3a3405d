// Standard normal noise as a pure function of (seed, element index). Normals 4c .. 4c + 3 of the stream `seed` come from
// Philox4x32-10 with counter (lo32(c), hi32(c), 0, 0) and key (lo32(seed), hi32(seed)): words 0 and 1 make the first
// two by Box-Muller, words 2 and 3 the others. Box-Muller is scalar code without branches: the CPU kernels call it in
// loops that the compiler vectorizes, the CUDA kernels once per thread. Who includes this file declares root(F), the square
// root of a number between 2^-32 and 45, before it.
//
// Source: Box, Muller, "A note on the generation of random normal deviates", Ann. Math. Statist. 29 (1958).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace elbo_ext {
namespace {

constexpr int kNormalsPerCounter = 4;

// What the formulas below need of ln, sin and cos. In single precision: polynomials of the least worst error (Remez) over the
// interval, rounded to float; a normal made with them is within 1e-6 of the exact one. In double: power series, cut where
// the rest is below the rounding.
template <class F>
struct Polynomials;

template <>
struct Polynomials<float> {
  // ln(1 + f) = f + f^2 p(f), |f| < sqrt(2) - 1, to 3e-8 of its size
  static ELBO_INLINE float log1p(float f) {
    constexpr float kP[] = {-0.4999999106f, 0.3333395123f, -0.2500175536f, 0.1996207237f,
                            -0.1657050848f, 0.1491797417f, -0.1430751830f, 0.0873483643f};
    float p = kP[7];
    ELBO_UNROLL
    for (int k = 6; k >= 0; --k) p = p * f + kP[k];
    return p * (f * f) + f;
  }
  // of x in [-pi/4, pi/4], given x^2; to 3e-9 and 5e-11
  static ELBO_INLINE float sine(float x, float x2) {
    const float p = (-0.00019504022202f * x2 + 0.0083320364356f) * x2 - 0.16666650772f;
    return p * (x2 * x) + x;
  }
  static ELBO_INLINE float cosine(float x2) {
    return (((2.4379929528e-5f * x2 - 0.0013886619126f) * x2 + 0.041666615764f) * x2 - 0.5f) * x2 + 1.f;
  }
};

template <>
struct Polynomials<double> {
  // ln(1 + f) = 2 artanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...), s = f / (2 + f), |s| < 0.172
  static ELBO_INLINE double log1p(double f) {
    const double s = f / (2.0 + f), s2 = s * s;
    double series = 0.0;
    ELBO_UNROLL
    for (int k = 11; k >= 0; --k) series = series * s2 + 1.0 / (2 * k + 1);
    return 2.0 * s * series;
  }
  static ELBO_INLINE double sine(double x, double x2) {
    constexpr double kSeries[] = {1., -1. / 6, 1. / 120, -1. / 5040, 1. / 362880, -1. / 39916800, 1. / 6227020800,
                                  -1. / 1307674368000, 1. / 355687428096000};
    double s = 0.0;
    ELBO_UNROLL
    for (int k = 8; k >= 0; --k) s = s * x2 + kSeries[k];
    return s * x;
  }
  static ELBO_INLINE double cosine(double x2) {
    constexpr double kSeries[] = {1., -1. / 2, 1. / 24, -1. / 720, 1. / 40320, -1. / 3628800, 1. / 479001600,
                                  -1. / 87178291200, 1. / 20922789888000, -1. / 6402373705728000};
    double c = 0.0;
    ELBO_UNROLL
    for (int k = 9; k >= 0; --k) c = c * x2 + kSeries[k];
    return c;
  }
};

// x = mantissa * 2^exponent, mantissa in [sqrt(1/2), sqrt(2)): exponent, and 2^-exponent. Single precision decides the split for
// every F.
struct Split {
  int32_t exponent;
  float scale;
};
ELBO_INLINE Split split(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  Split result;
  result.exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;  // 0x3F3504F3 = sqrt(1/2)
  const uint32_t scale_bits = static_cast<uint32_t>(127 - result.exponent) << 23;
  std::memcpy(&result.scale, &scale_bits, sizeof result.scale);
  return result;
}
constexpr double kLogTwo = 0.693147180559945309417232121458;

// ln u for u = odd * 2^-32, odd in [1, 2^32): to full relative precision also where u is next to 1.
template <class F>
ELBO_INLINE F log_uniform(uint32_t odd) {
  // With the sign of int32(odd) the smaller of u and 1 - u is converted, without loss near either end.
  const int32_t as_signed = static_cast<int32_t>(odd);
  const bool upper = as_signed < 0;  // u > 1/2
  const F nearest = static_cast<F>(upper ? -as_signed : as_signed) * F(0x1p-32);
  const F u = upper ? F(1) - nearest : nearest;
  const Split parts = split(static_cast<float>(u));
  // f = mantissa - 1, which for u next to 1 is -(1 - u), known exactly.
  const F f = upper && parts.exponent == 0 ? -nearest : u * static_cast<F>(parts.scale) - F(1);
  return static_cast<F>(parts.exponent) * F(kLogTwo) + Polynomials<F>::log1p(f);
}

// cos and sin of 2 pi word / 2^32.
template <class F>
ELBO_INLINE void cos_sin_turn(uint32_t word, F& cosine, F& sine) {
  constexpr uint32_t kEighth = 1u << 29;
  const uint32_t quadrant = (word + kEighth) >> 30;
  const int32_t rest = static_cast<int32_t>((word + kEighth) & (2 * kEighth - 1)) - static_cast<int32_t>(kEighth);
  const F x = static_cast<F>(rest) * F(1.57079632679489661923132169164 * 0x1p-30);  // in [-pi/4, pi/4)
  const F x2 = x * x;
  const F s = Polynomials<F>::sine(x, x2), c = Polynomials<F>::cosine(x2);
  const F along = quadrant & 1 ? s : c, across = quadrant & 1 ? c : s;
  cosine = (quadrant + 1) & 2 ? -along : along;
  sine = quadrant & 2 ? -across : across;
}

// Two independent standard normals from two words.
template <class F>
ELBO_INLINE void box_muller(uint32_t radius_word, uint32_t angle_word, F& first, F& second) {
  const F radius = root(F(-2) * log_uniform<F>(radius_word | 1u));
  F cosine, sine;
  cos_sin_turn<F>(angle_word, cosine, sine);
  first = radius * cosine;
  second = radius * sine;
}

// A number of the standard Gumbel distribution, -ln(-ln u), from a word.
template <class F>
ELBO_INLINE F gumbel(uint32_t word) {
  const F exponential = -log_uniform<F>(word | 1u);  // between 2^-32 and 23
  const Split parts = split(static_cast<float>(exponential));
  const F f = exponential * static_cast<F>(parts.scale) - F(1);
  return -(static_cast<F>(parts.exponent) * F(kLogTwo) + Polynomials<F>::log1p(f));
}

}  // namespace
}  // namespace elbo_ext
