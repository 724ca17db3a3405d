// Standard normal noise as a pure function of (seed, element index). Normals 4c .. 4c + 3 of the stream `seed` come from
// Philox4x32-10 with counter (lo32(c), hi32(c), 0, 0) and key (lo32(seed), hi32(seed)): words 0 and 1 make the first
// two by Box-Muller, words 2 and 3 the others. Box-Muller is scalar code without branches: the CPU kernels call it in
// loops that the compiler vectorizes, the CUDA kernels once per thread.
//
// Sources: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox);
// Box, Muller, "A note on the generation of random normal deviates", Ann. Math. Statist. 29 (1958).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.h"

namespace elbo_ext {
namespace {

constexpr int kNormalsPerCounter = 4;

// high and low half of the 64-bit product; vector types of 32-bit words bring an overload of their own.
ELBO_INLINE void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// Philox4x32-10: the counter (four 32-bit words) is replaced by the random words. Word is uint32_t or a vector of them.
template <class Word>
ELBO_INLINE void philox4x32_10(Word (&counter)[4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  ELBO_UNROLL
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high2, low2;
    multiply_wide(counter[0], 0xD2511F53u, high0, low0);
    multiply_wide(counter[2], 0xCD9E8D57u, high2, low2);
    counter[0] = high2 ^ counter[1] ^ key0;
    counter[1] = low2;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Terms of the power series below that reach the rounding of F (float: 2^-24, double: 2^-53).
template <class F>
struct SeriesLength;
template <>
struct SeriesLength<float> {
  static constexpr int log = 5, sin = 5, cos = 6;
};
template <>
struct SeriesLength<double> {
  static constexpr int log = 12, sin = 9, cos = 10;
};

// ln u for u = odd * 2^-32, odd in [1, 2^32): to full relative precision also where u is next to 1.
template <class F>
ELBO_INLINE F log_uniform(uint32_t odd) {
  // With the sign of int32(odd) the smaller of u and 1 - u is converted, without loss near either end.
  const int32_t as_signed = static_cast<int32_t>(odd);
  const bool upper = as_signed < 0;  // u > 1/2
  const F nearest = static_cast<F>(upper ? -as_signed : as_signed) * F(0x1p-32);
  const F u = upper ? F(1) - nearest : nearest;
  // u = mantissa * 2^exponent, mantissa in [sqrt(1/2), sqrt(2)); single precision decides the split for every F.
  const float rough = static_cast<float>(u);
  uint32_t bits;
  std::memcpy(&bits, &rough, sizeof bits);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;  // 0x3F3504F3 = sqrt(1/2)
  const uint32_t scale_bits = static_cast<uint32_t>(127 - exponent) << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof scale);
  // f = mantissa - 1, which for u next to 1 is -(1 - u), known exactly.
  const F f = upper && exponent == 0 ? -nearest : u * static_cast<F>(scale) - F(1);
  // ln(1 + f) = 2 artanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...), s = f / (2 + f), |s| < 0.172
  const F s = f / (F(2) + f), s2 = s * s;
  F series = F(0);
  ELBO_UNROLL
  for (int k = SeriesLength<F>::log - 1; k >= 0; --k) series = series * s2 + F(1.0 / (2 * k + 1));
  return static_cast<F>(exponent) * F(0.693147180559945309417232121458) + F(2) * s * series;
}

// cos and sin of 2 pi word / 2^32.
template <class F>
ELBO_INLINE void cos_sin_turn(uint32_t word, F& cosine, F& sine) {
  constexpr uint32_t kEighth = 1u << 29;
  const uint32_t quadrant = (word + kEighth) >> 30;
  const int32_t rest = static_cast<int32_t>((word + kEighth) & (2 * kEighth - 1)) - static_cast<int32_t>(kEighth);
  const F x = static_cast<F>(rest) * F(1.57079632679489661923132169164 * 0x1p-30);  // in [-pi/4, pi/4)
  const F x2 = x * x;
  // sin x / x and cos x by their Taylor series in x^2
  constexpr double kSin[] = {1., -1. / 6, 1. / 120, -1. / 5040, 1. / 362880, -1. / 39916800, 1. / 6227020800,
                             -1. / 1307674368000, 1. / 355687428096000};
  constexpr double kCos[] = {1., -1. / 2, 1. / 24, -1. / 720, 1. / 40320, -1. / 3628800, 1. / 479001600,
                             -1. / 87178291200, 1. / 20922789888000, -1. / 6402373705728000};
  F s = F(0), c = F(0);
  ELBO_UNROLL
  for (int k = SeriesLength<F>::sin - 1; k >= 0; --k) s = s * x2 + F(kSin[k]);
  ELBO_UNROLL
  for (int k = SeriesLength<F>::cos - 1; k >= 0; --k) c = c * x2 + F(kCos[k]);
  s *= x;
  const F along = quadrant & 1 ? s : c, across = quadrant & 1 ? c : s;
  cosine = (quadrant + 1) & 2 ? -along : along;
  sine = quadrant & 2 ? -across : across;
}

// Two independent standard normals from two words.
template <class F>
ELBO_INLINE void box_muller(uint32_t radius_word, uint32_t angle_word, F& first, F& second) {
  const F radius = std::sqrt(F(-2) * log_uniform<F>(radius_word | 1u));
  F cosine, sine;
  cos_sin_turn<F>(angle_word, cosine, sine);
  first = radius * cosine;
  second = radius * sine;
}

}  // namespace
}  // namespace elbo_ext
