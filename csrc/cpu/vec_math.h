// The number type of the CPU kernels, at::vec::Vectorized, dressed with the functions that terms/number.h asks for, and
// behind them the formulas.
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
ELBO_INLINE Vec<R> exp(Vec<R> x) { return x.exp(); }
template <class R>
ELBO_INLINE Vec<R> fast_exp(Vec<R> x) {
  if constexpr (std::is_same_v<R, float>) return x.exp_u20();  // measured: 1.7 ulp, and without a call
  else return x.exp();
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

// The lanes added up in double, in the order of memory.
template <class R>
ELBO_INLINE double sum_lanes(Vec<R> x) {
  R lane[Vec<R>::size()];
  x.store(lane);
  double sum = 0;
  for (R value : lane) sum += value;
  return sum;
}

}  // namespace
}  // namespace elbo_ext

#include "../terms/terms.h"
