// The kernel of a term for inputs that all examples share, such as a scale for each pixel: it sums their gradients as it goes.
#pragma once

#include <type_traits>
#include <utility>

#include "term_sum.cuh"

namespace elbo_ext {
namespace {

template <class Term>
constexpr int kColumnsBlocks = Term::kInputs > 4 ? 1 : 2;
// So many times the blocks that the device holds at once share the rows: they are of uneven length where the numbers of
// columns and of multiprocessors do not divide.
constexpr int kWavesOfColumns = 4;

// The space as `rows` of `columns` elements: an input that is shared has one element for each column, and its gradient is a
// sum over the rows. A warp works on kWarp * kColumnWidth columns, its block's warps on rows in turn; several blocks may
// share the rows of the same columns, `rows_per_block` each.
constexpr int kColumnWidth = 4, kBlockColumns = kWarp * kColumnWidth;
template <int kInputs>
struct ColumnsParams : TermParams<kInputs> {
  int64_t rows, columns, rows_per_block;
  int column_blocks;
  Array column_sum[kInputs];  // [sharing blocks][columns]; null: not wanted
};

// Forward and backward where all examples share the inputs of kSharedInputs: each thread reads those once and keeps the sums of
// their gradients; the other inputs are contiguous or one number.
template <template <class> class TermOf, class R, int kFormClass>
__global__ void __launch_bounds__(kThreads, kColumnsBlocks<TermOf<R>>) columns_kernel(
    const __grid_constant__ ColumnsParams<TermOf<R>::kInputs> p) {
  constexpr int V = kColumnWidth, kPart = std::min(V, elements_at_once<TermOf<R>>()), kParts = V / kPart;
  using T = Pack<R, kPart>;
  using Term = TermOf<T>;
  constexpr int kInputs = Term::kInputs, kTensors = tensors_of<Term>(), kWarps = kThreads / kWarp;
  using S = Slots<kInputs>;
  constexpr int kUpstream = S::kUpstream, kFirstSink = S::kFirstSink, kValueSum = S::kValueSum;
  constexpr unsigned kSharedSet = shared_inputs_of<Term>();
  constexpr bool kIsCountTerm = IsCountTerm<Term>::value;
  const Forms forms{Term::template within<kFormClass>(p.forms), p.constant};
  const int64_t column_block = blockIdx.x % p.column_blocks, sharer = blockIdx.x / p.column_blocks;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = column_block * kBlockColumns + lane * V;
  const bool inside = column < p.columns;

  T known[kInputs][kParts];  // what does not depend on the row
  bool vectors[kInputs] = {};
  ELBO_UNROLL
  for (int k = 0; k < kInputs; ++k) {
    vectors[k] = k < kTensors && !(kSharedSet >> k & 1) && p.layout.place[k] == kContiguous;
    const R number = uniform_number<R>(p.layout, k, p.constant[k]);
    ELBO_UNROLL
    for (int part = 0; part < kParts; ++part) known[k][part] = T(number);
    if ((kSharedSet >> k & 1) && p.layout.place[k] == kRepeat && inside) {
      R x[V];
      convert<R, V>(load<R, V>(p.layout.array[k], column), p.layout.array[k].dtype, x);
      ELBO_UNROLL
      for (int i = 0; i < V; ++i) known[k][i / kPart].x[i % kPart] = x[i];
    }
  }
  constexpr bool kPrecomputedOnce = (Term::kPrecomputedFrom & ~kSharedSet & ((1u << kTensors) - 1)) == 0;
  typename Term::Precomputed precomputed_once[kParts];
  ELBO_UNROLL
  for (int part = 0; part < kParts; ++part) {
    T in[kInputs];
    ELBO_UNROLL
    for (int k = 0; k < kInputs; ++k) in[k] = known[k][part];
    precomputed_once[part] = Term::precompute(in, forms);
  }
  const bool of_rows = p.layout.place[kUpstream] > kUniform;
  R upstream = uniform_upstream<R>(p.layout, kUpstream, p.constant[kUpstream], p.upstream_factor);

  double sum[S::kSums] = {}, column_sum[kInputs][V] = {};
  const int64_t last = minimum((sharer + 1) * p.rows_per_block, p.rows);
  for (int64_t row = sharer * p.rows_per_block + warp; row < last && inside; row += kWarps) {
    const int64_t n = row * p.columns + column;
    Raw<R, V> raw[kInputs];  // later the gradients
    ELBO_UNROLL
    for (int k = 0; k < kTensors; ++k)
      if (vectors[k])
        raw[k] = kIsCountTerm && k == 0 ? load_data<R, V>(p.layout.array[k], n) : load<R, V>(p.layout.array[k], n);
    if (of_rows) upstream = per_unit_upstream<R>(p.layout, kUpstream, n, p.upstream_factor);
    R total = R(0);
    const auto part = [&](auto number) {
      constexpr int kOf = decltype(number)::value, kAt = kOf * kPart;
      T in[kInputs], d[kInputs];
      ELBO_UNROLL
      for (int k = 0; k < kInputs; ++k) {
        in[k] = known[k][kOf];
        if (!vectors[k]) continue;
        const DType dtype = p.layout.array[k].dtype;
        convert<R, V, kAt, kPart>(raw[k], kIsCountTerm && k == 0 ? dtype_in_registers<R>(dtype) : dtype, in[k].x);
      }
      typename Term::Precomputed precomputed = precomputed_once[kOf];
      if constexpr (!kPrecomputedOnce) precomputed = Term::precompute(in, forms);
      total += sum_of(Term::gradient(precomputed, in, d));
      ELBO_UNROLL
      for (int k = 0; k < kTensors; ++k) {
        if (kSharedSet >> k & 1) {
          ELBO_UNROLL
          for (int i = 0; i < kPart; ++i) column_sum[k][kAt + i] += static_cast<double>(d[k].x[i] * upstream);
        } else if (p.layout.place[kFirstSink + k] == kContiguous) {
          pack<R, V, kAt, kPart>((d[k] * T(upstream)).x, p.layout.array[kFirstSink + k].dtype, raw[k]);
        }
      }
    };
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (part(std::integral_constant<int, i>{}), ...);
    }(std::make_integer_sequence<int, kParts>{});
    sum[kValueSum] += static_cast<double>(total);
    ELBO_UNROLL
    for (int k = 0; k < kTensors; ++k)
      if (!(kSharedSet >> k & 1) && p.layout.place[kFirstSink + k] == kContiguous)
        store_raw<R, V>(p.layout.array[kFirstSink + k], n, raw[k]);
  }

  __shared__ double of_warp[kWarps][kBlockColumns];
  ELBO_UNROLL
  for (int k = 0; k < kTensors; ++k) {
    if (!(kSharedSet >> k & 1) || p.column_sum[k].data == nullptr) continue;
    __syncthreads();  // the sums before these have been read
    ELBO_UNROLL
    for (int i = 0; i < V; ++i) of_warp[warp][lane * V + i] = column_sum[k][i];
    __syncthreads();
    const int own = threadIdx.x;
    if (own >= kBlockColumns || column_block * kBlockColumns + own >= p.columns) continue;
    double number = 0.0;
    ELBO_UNROLL
    for (int of = 0; of < kWarps; ++of) number += of_warp[of][own];
    write(p.column_sum[k], sharer * p.columns + column_block * kBlockColumns + own, number);
  }
  finish<R, used_sums<kInputs>(0u)>(p, sum);
}

}  // namespace
}  // namespace elbo_ext
