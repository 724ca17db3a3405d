// The number type of the CPU kernels, at::vec::Vectorized, with the functions that terms/number.h asks for, and
// after them the formulas.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include "../terms/number.h"

namespace elbo_ext {
namespace {

template <class R>
using Vec = at::vec::Vectorized<R>;

template <class R>
struct RealOf<Vec<R>> {
  using type = R;
};

// Powers above the fourth apart, and of those even and odd ones: one chain of dependent steps would leave most of a
// processor waiting.
template <class R, int kTerms>
ELBO_INLINE Vec<R> polynomial(const R (&coefficient)[kTerms], Vec<R> at) {
  const Vec<R> square = at * at;
  const auto part = [&](int first, int end) __attribute__((always_inline)) {
    Vec<R> even(coefficient[first + (end - first - 1) / 2 * 2]), odd(coefficient[first + (end - first) / 2 * 2 - 1]);
    ELBO_UNROLL
    for (int k = first + (end - first - 1) / 2 * 2 - 2; k >= first; k -= 2) even = at::vec::fmadd(even, square, Vec<R>(coefficient[k]));
    ELBO_UNROLL
    for (int k = first + (end - first) / 2 * 2 - 3; k > first; k -= 2) odd = at::vec::fmadd(odd, square, Vec<R>(coefficient[k]));
    return at::vec::fmadd(odd, at, even);
  };
  if constexpr (kTerms < 8) return part(0, kTerms);
  else {
    const Vec<R> fourth = square * square;
    return at::vec::fmadd(part(4, kTerms), fourth, part(0, 4));
  }
}

template <class R>
ELBO_INLINE Vec<R> fast_exp(Vec<R> x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<R, float>) {
    // 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2; at::vec's exp_u20 spends as much again on its range checks,
    // which scalef does by itself. Taylor series: the rest, r^8 / 8!, is below 1e-8. Measured: within 1 ulp.
    const __m512 inside = _mm512_max_ps(_mm512_set1_ps(-120.f), _mm512_min_ps(_mm512_set1_ps(120.f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(inside, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), inside);  // ln 2 in two parts, the first exact in n * part
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    constexpr float kSeries[] = {0.5f, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
    const __m512 beyond_1 = _mm512_fmadd_ps(polynomial<float>(kSeries, r), _mm512_mul_ps(r, r), r);
    return _mm512_scalef_ps(_mm512_add_ps(beyond_1, _mm512_set1_ps(1.f)), n);
  }
#endif
  if constexpr (std::is_same_v<R, float>) return x.exp_u20();  // measured: 1.7 ulp, and without a call
  else return x.exp();
}
template <class R>
ELBO_INLINE Vec<R> exp(Vec<R> x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<R, float>) return fast_exp(x);
#endif
  return x.exp();
}
#if defined(CPU_CAPABILITY_AVX512)
// x = 2^exponent m, m in [sqrt(1/2), sqrt(2)), and log x = exponent log 2 + log1p(m - 1); exact also for subnormal numbers.
// 0 and infinity have an infinite exponent and m = 1, and x < 0 has no m. at::vec's logarithms are calls of Sleef, around
// which the caller's registers go to memory.
struct BinaryParts {
  __m512 m, exponent;
  ELBO_INLINE explicit BinaryParts(__m512 x)
      : m(_mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_nan)), exponent(_mm512_getexp_ps(x)) {
    const __mmask16 upper = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
    m = _mm512_mask_mul_ps(m, upper, m, _mm512_set1_ps(0.5f));
    exponent = _mm512_mask_add_ps(exponent, upper, exponent, _mm512_set1_ps(1.f));
  }
  // log(2^exponent (1 + f)); measured: within 1 ulp.
  ELBO_INLINE __m512 log(__m512 f) const {
    // log1p(f) = f + f^2 p(f), of the least worst error (Remez), to 5e-9 of its size
    constexpr float kP[] = {-0.4999998835f, 0.3333332569f, -0.2500158296f, 0.2000197393f, -0.1660908251f,
                            0.1418182502f, -0.1324298832f, 0.1290443466f, -0.0762177846f};
    const __m512 p = polynomial<float>(kP, f);
    return _mm512_fmadd_ps(exponent, _mm512_set1_ps(0.693147181f), _mm512_fmadd_ps(p, _mm512_mul_ps(f, f), f));
  }
};
#endif

template <class R>
ELBO_INLINE Vec<R> log(Vec<R> x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<R, float>) {
    const BinaryParts parts(x);
    return parts.log(_mm512_sub_ps(parts.m, _mm512_set1_ps(1.f)));
  }
#endif
  return x.log();
}
template <class R>
ELBO_INLINE Vec<R> log1p(Vec<R> x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<R, float>) {
    const __m512 one = _mm512_set1_ps(1.f), sum = _mm512_add_ps(x, one);
    const BinaryParts parts(sum);
    // What the sum has lost, in units of 2^exponent: nothing where it is 0 or infinite.
    const __mmask16 finite = _mm512_mask_cmp_ps_mask(
        _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_GT_OQ), sum,
        _mm512_set1_ps(std::numeric_limits<float>::infinity()), _CMP_LT_OQ);
    const __m512 lost = _mm512_sub_ps(x, _mm512_sub_ps(sum, one));
    const __m512 rest = _mm512_maskz_scalef_ps(finite, lost, _mm512_sub_ps(_mm512_setzero_ps(), parts.exponent));
    return parts.log(_mm512_add_ps(_mm512_sub_ps(parts.m, one), rest));
  }
#endif
  return x.log1p();
}
template <class R>
ELBO_INLINE Vec<R> abs(Vec<R> x) { return x.abs(); }
template <class R>
ELBO_INLINE Vec<R> sqrt(Vec<R> x) { return x.sqrt(); }
using at::vec::minimum;
template <class R>
ELBO_INLINE Vec<R> select(Vec<R> mask, Vec<R> yes, Vec<R> no) { return Vec<R>::blendv(no, yes, mask); }

// Is the mask set in any lane?
template <class R>
ELBO_INLINE bool any(Vec<R> mask) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<R, float>) return _mm512_movepi32_mask(_mm512_castps_si512(mask)) != 0;
#endif
  return mask.zero_mask() != (1 << Vec<R>::size()) - 1;
}

// A store that goes past the caches. The address is a multiple of the register's size; flush_streams() comes after the
// last one, before another thread reads what was stored.
template <class R>
ELBO_INLINE void stream(R* to, Vec<R> x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<R, float>) return _mm512_stream_ps(to, x);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<R, float>) return _mm256_stream_ps(to, x);
#endif
  x.store(to);
}
inline void flush_streams() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// The lanes added up in double, always in the same order: four sums side by side, so that none waits for the one before.
template <class R>
ELBO_INLINE double sum_lanes(Vec<R> x) {
  R lane[Vec<R>::size()];
  x.store(lane);
  double sum[4] = {0, 0, 0, 0};
  for (int i = 0; i < Vec<R>::size(); ++i) sum[i % 4] += lane[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace
}  // namespace elbo_ext

#include "../terms/terms.h"
