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
    __m512 series = _mm512_set1_ps(1.f / 5040);
    for (const float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
      series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(series, n);
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
template <class R>
ELBO_INLINE Vec<R> log(Vec<R> x) { return x.log(); }
template <class R>
ELBO_INLINE Vec<R> log1p(Vec<R> x) { return x.log1p(); }
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
