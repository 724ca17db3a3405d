// The kernels of a term that take any layout and any operands: the sums over rows, and the gradients that are gathered. And
// what they have in common with those that are faster and ask for more, of term_sum_dense.cuh and term_sum_columns.cuh.
#pragma once

#include <algorithm>

#include "../terms/traits.h"
#include "gather.cuh"

namespace elbo_ext {
namespace {

// The tensors of a term: its inputs and the weight, the upstream gradient, the gradients of inputs and weight, and the value
// of each element. Its sums: gradients, the value, the KL.
template <int kInputs>
struct Slots {
  static constexpr int kWeight = kInputs, kOperands = kInputs + 1;
  static constexpr int kUpstream = kOperands, kFirstSink = kUpstream + 1, kElement = kFirstSink + kOperands,
                       kCount = kElement + 1;
  static constexpr int kValueSum = kOperands, kKLSum = kValueSum + 1, kSums = kKLSum + 1;
};

template <int kInputs>
struct TermParams : Slots<kInputs> {
  using S = Slots<kInputs>;
  Layout<S::kCount> layout;
  Units units;
  SumPlan<S::kSums> sums;
  double constant[S::kOperands + 1];  // of the inputs, the weight and the upstream gradient
  double upstream_factor;
  int forms;
  // the ELBO
  Array kl, loss, reduced_kl, kl_factor_out;
  int64_t kl_count;
  double beta, kl_factor;
};

template <class R>
__device__ __forceinline__ bool is_finite(R number) {
  return number - number == R(0);
}

// The sums that a kernel over a term makes: of values, and of some gradients.
template <int kInputs>
constexpr unsigned used_sums(unsigned of_gradients) {
  return 1u << Slots<kInputs>::kValueSum | 1u << Slots<kInputs>::kKLSum | of_gradients;
}

// What the grid does once its elements are done.
template <class R, unsigned used, int kInputs>
__device__ __forceinline__ void finish(const TermParams<kInputs>& p, double (&sum)[Slots<kInputs>::kSums]) {
  constexpr int kValueSum = Slots<kInputs>::kValueSum, kKLSum = Slots<kInputs>::kKLSum;
  if (p.loss.data != nullptr)
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.kl_count;
         i += static_cast<int64_t>(gridDim.x) * kThreads)
      sum[kKLSum] += read<double>(p.kl, i);
  if (!total_sums<used>(p.sums, sum) || p.loss.data == nullptr) return;
  const double kl = sum[kKLSum] * p.kl_factor;
  write(p.loss, 0, p.beta * kl - static_cast<R>(sum[kValueSum]));
  write(p.reduced_kl, 0, kl);
  if (p.kl_factor_out.data != nullptr) write(p.kl_factor_out, 0, p.kl_factor);
}

// How many neighbours a thread works on at once.
template <class Term, class R>
constexpr int kTermGroup = std::min(kGroup<R>, elements_at_once<Term>());

template <class Term, class R>
constexpr int kGeneralBlocks = sizeof(R) == 8 || Term::kInputs > 3 ? 1 : 2;

// Any layout, any operands, in groups of kWidth neighbours.
template <template <class> class TermOf, class R, int kWidth>
__global__ void __launch_bounds__(kThreads, kGeneralBlocks<TermOf<R>, R>) general_kernel(
    const __grid_constant__ TermParams<TermOf<R>::kInputs> p) {
  using T = Pack<R, kWidth>;
  using Term = TermOf<T>;
  constexpr int kInputs = Term::kInputs, kTensors = tensors_of<Term>();
  using S = Slots<kInputs>;
  using Reader = AnyGroup<R, kWidth, S::kCount>;
  constexpr int kWeight = S::kWeight, kOperands = S::kOperands, kUpstream = S::kUpstream, kFirstSink = S::kFirstSink,
                kElement = S::kElement, kValueSum = S::kValueSum;
  constexpr unsigned used = used_sums<kInputs>((1u << kTensors) - 1 | 1u << kWeight);
  const auto is_number = [](int k) { return k >= kTensors && k < kInputs; };
  const bool weighted = p.layout.place[kWeight] != kAbsent;
  const R upstream = uniform_upstream<R>(p.layout, kUpstream, p.constant[kUpstream], p.upstream_factor);
  R uniform[kOperands];
  ELBO_UNROLL
  for (int k = 0; k < kOperands; ++k) uniform[k] = uniform_number<R>(p.layout, k, p.constant[k]);

  double sum[S::kSums] = {};
  for_each_unit<used>(p.units, p.sums, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    for (int64_t n = (first / kWidth + lane) * kWidth; n < end; n += lanes * kWidth) {
      const unsigned mask = Reader::members(n, first, end);
      Reader reader[kOperands + 1];
      T in[kOperands], grad;
      ELBO_UNROLL
      for (int k = 0; k <= kUpstream; ++k)
        if (!is_number(k)) reader[k].begin(p.layout, k, n, mask);
      ELBO_UNROLL
      for (int k = 0; k < kOperands; ++k) {
        if (is_number(k)) in[k] = T(uniform[k]);
        else reader[k].finish(p.layout, k, mask, in[k].x, uniform[k]);
      }
      reader[kUpstream].finish(p.layout, kUpstream, mask, grad.x, R(1));

      T d[kOperands], value = Term::gradient(Term::precompute(in, Forms{p.forms, p.constant}), in, d);
      if constexpr (IsCountTerm<Term>::value)
        if (p.layout.place[kFirstSink] != kAbsent || p.sums.kind[0] != kNoSum) d[0] = Term::data_gradient(in, p.forms);
      const T& weight = in[kWeight];
      ELBO_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        // A weight of zero leaves the element out, whatever stands there: 0 * inf must not become NaN.
        const bool inside = mask >> i & 1, counts = inside && weight.x[i] != R(0);
        const R g = grad.x[i] * upstream, factor = weighted ? g * weight.x[i] : g;
        ELBO_UNROLL
        for (int k = 0; k < kTensors; ++k) d[k].x[i] = counts ? d[k].x[i] * factor : R(0);
        // A term that is left out and is not finite says nothing about its weight.
        d[kWeight].x[i] = inside && (counts || is_finite(value.x[i])) ? value.x[i] * g : R(0);
        value.x[i] = counts ? (weighted ? value.x[i] * weight.x[i] : value.x[i]) : R(0);
      }
      ELBO_UNROLL
      for (int k = 0; k < kOperands; ++k) {
        if (is_number(k)) continue;
        if (p.layout.place[kFirstSink + k] != kAbsent) Reader::store(p.layout, kFirstSink + k, n, mask, d[k].x);
        else if (p.sums.kind[k] != kNoSum) sum[k] += static_cast<double>(sum_of(d[k]));
      }
      if (p.layout.place[kElement] != kAbsent) Reader::store(p.layout, kElement, n, mask, value.x);
      sum[kValueSum] += static_cast<double>(sum_of(value));
    }
  });
  finish<R, used>(p, sum);
}

// The gradients of operands whose elements are shared by elements here and there.
template <template <class> class TermOf, class R>
struct GatherTerm {
  static constexpr int kInputs = TermOf<R>::kInputs, kWeight = kInputs, kOperands = kInputs + 1, kUpstream = kOperands;
  static constexpr int kSlots = kUpstream + 2, kSums = kOperands;  // inputs, weight, upstream, the gradient
  struct Params {
    Gather<kSlots, kSums> gather;
    double constant[kOperands + 1];
    double upstream_factor;
    int forms;
  };

  static __device__ __forceinline__ void add(const Params& p, const int64_t (&offset)[kSlots], double (&sum)[kSums]) {
    using Term = TermOf<R>;
    const GatheredElement<R, kSlots> element{p.gather.layout.array, offset};
    R x[kInputs], d[kInputs];
    ELBO_UNROLL
    for (int k = 0; k < kInputs; ++k) x[k] = element.number(k, p.constant[k]);
    const R value = Term::gradient(Term::precompute(x, Forms{p.forms, p.constant}), x, d);
    if constexpr (IsCountTerm<Term>::value)
      if (p.gather.out[0].data != nullptr) d[0] = Term::data_gradient(x, p.forms);
    const R weight = element.number(kWeight, p.constant[kWeight]);
    const R grad = element.upstream(kUpstream, p.constant[kUpstream], p.upstream_factor);
    ELBO_UNROLL
    for (int k = 0; k < kInputs; ++k) sum[k] += weight != R(0) ? static_cast<double>(d[k] * (grad * weight)) : 0.0;
    if (weight != R(0) || is_finite(value)) sum[kWeight] += static_cast<double>(value * grad);
  }
};

}  // namespace
}  // namespace elbo_ext
