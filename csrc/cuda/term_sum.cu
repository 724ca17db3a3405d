// Sums of a term over rows, forward, backward, and both in one pass. Compiled once for each compute type, ELBO_REAL.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "../terms/traits.h"
#include "entries.h"
#include "work.h"

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

// What a dense kernel is compiled for. On the fast path nothing in its loop asks what an operand is: `vector_inputs`
// has a bit for each input that is read element by element, and those, and the gradients written so, are all of one dtype.
// With kAnyInputs each operand may also repeat or be one number, and be of any dtype.
constexpr unsigned kAnyInputs = 0;
template <int vector, unsigned vector_inputs = kAnyInputs, DType dtype = DType::kFloat>
struct Specialization {
  static constexpr int kVector = vector;
  static constexpr unsigned kVectorInputs = vector_inputs;
  static constexpr DType kDType = dtype;
};

// The inputs that a term's dense kernels are compiled for: those of its fast path, which the term declares (terms/traits.h),
// and those without its scale, which may be one number.
template <class Term>
constexpr unsigned kFastPath = fast_path_inputs_of<Term>();
template <class Term>
constexpr unsigned kFastPathWithoutScale = kFastPath<Term> & ~Term::kPrecomputedFrom;

// How many blocks of the dense kernel a multiprocessor is to hold at least: as many as its registers allow without spills.
template <class Term, class Spec, bool kGradient, int kFormClass>
constexpr int kDenseBlocks = [] {
  const bool any = Spec::kVectorInputs == kAnyInputs;
  if (any && Spec::kVector == 8 && Term::kInputs > 3) return 1;
  return std::max(2, 4 - any - (any && Spec::kVector == 8) - (kFormClass > 0) - (Term::kInputs > 3) -
                         (elements_at_once<Term>() < 4) - HasParts<Term>::value);
}();

// The ordinary case, in which a kernel has to keep up with the memory: each operand is dense, also if it then repeats, or
// one number; scales and the upstream gradient may be one number per unit; there is no weight. The vectors of all
// operands are in flight at once; they are worked on in parts of kPart elements, which bounds the registers that a thread
// needs (terms/traits.h).
template <template <class> class TermOf, class R, class Spec, bool kGradient, int kFormClass>
__global__ void __launch_bounds__(kThreads, kDenseBlocks<TermOf<R>, Spec, kGradient, kFormClass>) dense_kernel(
    const __grid_constant__ TermParams<TermOf<R>::kInputs> p) {
  constexpr int V = Spec::kVector, kPart = std::min(V, elements_at_once<TermOf<R>>());
  constexpr bool kAny = Spec::kVectorInputs == kAnyInputs;
  using T = Pack<R, kPart>;
  using Term = TermOf<T>;
  constexpr int kInputs = Term::kInputs, kTensors = tensors_of<Term>();
  using S = Slots<kInputs>;
  constexpr int kUpstream = S::kUpstream, kFirstSink = S::kFirstSink, kElement = S::kElement, kValueSum = S::kValueSum;
  // The inputs whose gradients may be sums, and those whose gradients may be written element by element.
  constexpr unsigned kTensorSet = (1u << kTensors) - 1, kSummed = !kGradient ? 0u : kAny ? kTensorSet
                                                                                         : kFastPath<Term> & ~Spec::kVectorInputs;
  constexpr unsigned kWritten = kAny ? kTensorSet : Spec::kVectorInputs, used = used_sums<kInputs>(kSummed);
  constexpr bool kInParts = HasParts<Term>::value;  // terms/count.h
  const Forms forms{Term::template within<kFormClass>(p.forms), p.constant};
  const auto array = [&](int slot) { return kAny ? p.layout.array[slot] : Array{p.layout.array[slot].data, Spec::kDType}; };
  T uniform[kInputs];
  bool vectors[kInputs] = {}, recompute = false;
  ELBO_UNROLL
  for (int k = 0; k < kInputs; ++k) {
    if (k < kTensors) vectors[k] = kAny ? reads_vectors(p.layout.place[k]) : Spec::kVectorInputs >> k & 1;
    uniform[k] = T(elbo_ext::uniform_number<R>(p.layout, k, p.constant[k]));
    recompute = recompute || (vectors[k] && (Term::kPrecomputedFrom >> k & 1));
  }
  // What is made from scales that are one number, for all or for a unit, is computed once.
  typename Term::Precomputed precomputed_once = Term::precompute(uniform, forms);
  T upstream(kGradient ? uniform_upstream<R>(p.layout, kUpstream, p.constant[kUpstream], p.upstream_factor) : R(0));

  double sum[S::kSums] = {};
  for_each_unit<used>(p.units, p.sums, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    if (p.layout.units_differ) {
      ELBO_UNROLL
      for (int k = 0; k < kTensors; ++k)
        if ((Term::kPrecomputedFrom >> k & 1) && p.layout.place[k] == kPerUnit)
          uniform[k] = T(per_unit<R>(p.layout, k, first));
      precomputed_once = Term::precompute(uniform, forms);
      if (kGradient && p.layout.place[kUpstream] == kPerUnit)
        upstream = T(per_unit_upstream<R>(p.layout, kUpstream, first, p.upstream_factor));
    }
    for (int64_t n = first + lane * V; n < end; n += lanes * V) {
      Raw<R, V> raw[kInputs];  // later the gradients
      ELBO_UNROLL
      for (int k = 0; k < kTensors; ++k)
        if (vectors[k]) {
          const int64_t offset = kAny ? p.layout.vector_offset(p.layout.place[k], n) : n;
          raw[k] = kInParts && k == 0 ? load_data<R, V>(array(k), offset) : load<R, V>(array(k), offset);
        }
      R total = R(0), sink_sum[kInputs] = {};
      const auto part = [&](auto at) {
        constexpr int kAt = decltype(at)::value;
        T in[kInputs], value;
        ELBO_UNROLL
        for (int k = 0; k < kInputs; ++k) {
          if (vectors[k]) {
            const DType dtype = array(k).dtype;
            convert<R, V, kAt, kPart>(raw[k], kInParts && k == 0 ? dtype_in_registers<R>(dtype) : dtype, in[k].x);
          } else in[k] = uniform[k];
        }
        typename Term::Precomputed precomputed = precomputed_once;
        if (recompute) precomputed = Term::precompute(in, forms);
        if constexpr (kGradient) {
          T d[kInputs];
          value = Term::gradient(precomputed, in, d);
          ELBO_UNROLL
          for (int k = 0; k < kTensors; ++k) {
            if ((kWritten >> k & 1) && p.layout.place[kFirstSink + k] == kContiguous)
              pack<R, V, kAt, kPart>((d[k] * upstream).x, array(kFirstSink + k).dtype, raw[k]);
            else if ((kSummed >> k & 1) && p.sums.kind[k] != kNoSum) sink_sum[k] += sum_of(d[k] * upstream);
          }
        } else {
          value = Term::value(precomputed, in);
          // The only result that may be wider than the operands: by parts.
          if (p.layout.place[kElement] == kContiguous)
            store_vector<R, kPart>(p.layout.array[kElement], n + kAt, value.x);
        }
        total += sum_of(value);
      };
      [&]<int... i>(std::integer_sequence<int, i...>) {
        (part(std::integral_constant<int, i * kPart>{}), ...);
      }(std::make_integer_sequence<int, V / kPart>{});
      sum[kValueSum] += static_cast<double>(total);
      if constexpr (kGradient) {
        ELBO_UNROLL
        for (int k = 0; k < kTensors; ++k) {
          if ((kWritten >> k & 1) && p.layout.place[kFirstSink + k] == kContiguous)
            store_raw<R, V>(array(kFirstSink + k), n, raw[k]);
          else if ((kSummed >> k & 1) && p.sums.kind[k] != kNoSum) sum[k] += static_cast<double>(sink_sum[k]);
        }
      }
    }
  });
  finish<R, used>(p, sum);
}

// ---- inputs that all examples share ----

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
  constexpr bool kInParts = HasParts<Term>::value;
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
        raw[k] = kInParts && k == 0 ? load_data<R, V>(p.layout.array[k], n) : load<R, V>(p.layout.array[k], n);
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
        convert<R, V, kAt, kPart>(raw[k], kInParts && k == 0 ? dtype_in_registers<R>(dtype) : dtype, in[k].x);
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

// Of the kernel for any layout.
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
      if constexpr (HasParts<Term>::value)
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
    if constexpr (HasParts<Term>::value)
      if (p.gather.out[0].data != nullptr) d[0] = Term::data_gradient(x, p.forms);
    const R weight = element.number(kWeight, p.constant[kWeight]);
    const R grad = element.upstream(kUpstream, p.constant[kUpstream], p.upstream_factor);
    ELBO_UNROLL
    for (int k = 0; k < kInputs; ++k) sum[k] += weight != R(0) ? static_cast<double>(d[k] * (grad * weight)) : 0.0;
    if (weight != R(0) || is_finite(value)) sum[kWeight] += static_cast<double>(value * grad);
  }
};

// ---- on the host ----

// The widest vectors of the dense kernel: 16 bytes of half precision, but for terms in parts and those of many inputs, which
// would spill registers.
template <class Term>
constexpr int kWidest = HasParts<Term>::value || (Term::kInputs > 3 && kFastPath<Term> == kAnyInputs) ? 4 : 8;

// The kernel that serves a problem.
struct Choice {
  int width = 0;  // of the dense kernel's vectors; 0: the kernel for any layout
  unsigned vector_inputs = kAnyInputs;
};

// The inputs that are read element by element, if the fast path has these and all are of the dtype; else kAnyInputs.
template <class Term, int kCount>
unsigned fast_path_inputs(const Layout<kCount>& layout, const TermSumProblem& p, DType dtype) {
  using S = Slots<Term::kInputs>;
  unsigned read = 0;
  for (int k = 0; k < Term::kInputs; ++k) {
    if (layout.place[k] == kRepeat || (p.gradient[k].wanted() && !(kFastPath<Term> >> k & 1))) return kAnyInputs;
    if (layout.place[k] == kContiguous) read |= 1u << k;
    const bool written = layout.place[S::kFirstSink + k] != kAbsent;
    if ((layout.place[k] == kContiguous && layout.array[k].dtype != dtype) ||
        (written && layout.array[S::kFirstSink + k].dtype != dtype))
      return kAnyInputs;
  }
  return read == kFastPath<Term> || read == kFastPathWithoutScale<Term> ? read : kAnyInputs;
}

// Lays the tensors out for the kernel that it chooses: the vectors of a dense kernel are 16 bytes of what all operands are,
// or of the narrowest, and `widest` elements at most.
template <template <class> class TermOf, class R, int kCount>
Choice lay_out(Layout<kCount>& layout, const TermSumProblem& p, const Dimensions& dims, int64_t segment, int widest) {
  using S = Slots<TermOf<R>::kInputs>;
  constexpr int kUpstream = S::kUpstream, kFirstSink = S::kFirstSink, kElement = S::kElement;
  constexpr bool kInParts = HasParts<TermOf<R>>::value;
  const auto for_width = [&](int width, bool dense = true) {
    layout = {};
    LayoutBuilder<kCount> builder(layout, dims, segment, width, p.compute_double);
    for (int k = 0; k < S::kOperands; ++k) {
      builder.set(k, p.operand[k], /*written=*/false, /*base_step=*/0, /*integer_vectors=*/dense && kInParts && k == 0);
      if (!p.gradient[k].summed) builder.set(kFirstSink + k, p.gradient[k], /*written=*/true);
    }
    builder.set(kUpstream, p.upstream);
    builder.set(kElement, dense_view(p.values.element, compute_type(p.compute_double)), /*written=*/true);
  };
  // Each of these would double the kernels there are to compile: weights, float64, forms of several classes, and the
  // derivative by data of terms in parts.
  const bool may_be_dense = !p.operand[S::kWeight].present() && !p.compute_double &&
                            TermOf<R>::form_class(p.forms) != kAnyForms && !(kInParts && p.gradient[0].wanted());
  for (int width = widest; may_be_dense && width >= 4; width /= 2) {
    for_width(width);
    bool fits = segment % width == 0 && !reads_vectors(layout.place[kUpstream]);
    for (int slot = 0; slot < kElement; ++slot) {
      const Place place = layout.place[slot];
      fits = fits && is_dense(place) && (place != kPerUnit || slot == kUpstream || TermOf<R>::kPrecomputedFrom >> slot & 1);
      // Eight elements are 16 bytes where all that is read or written element by element is of half precision.
      const DType dtype = layout.array[slot].dtype;
      if (width == 8 && reads_vectors(place) && (bytes_of(dtype) != 2 || is_integer(dtype))) fits = false;
    }
    const DType dtype = width == 8 ? DType::kBFloat16 : DType::kFloat;
    if (fits) return {width, fast_path_inputs<TermOf<R>>(layout, p, dtype)};
  }
  for_width(kTermGroup<TermOf<R>, R>, /*dense=*/false);
  return {};
}

// Calls what_for(Specialization<...>{}, form class), for the dense kernel that was chosen and the class that the forms are of.
template <template <class> class TermOf, class R, int kFormClass = 0, class WhatFor>
auto with_dense(const TermSumProblem& p, const Choice& choice, WhatFor&& what_for) {
  if constexpr (kFormClass + 1 < TermOf<R>::kFormClasses)
    if (TermOf<R>::form_class(p.forms) != kFormClass)
      return with_dense<TermOf, R, kFormClass + 1>(p, choice, what_for);
  constexpr std::integral_constant<int, kFormClass> form_class;
  constexpr unsigned kAll = kFastPath<TermOf<R>>, kWithoutScale = kFastPathWithoutScale<TermOf<R>>;
  if constexpr (kAll != kAnyInputs) {
    const bool wide = choice.width != 4;
    if (choice.vector_inputs == kAll)
      return wide ? what_for(Specialization<8, kAll, DType::kBFloat16>{}, form_class) : what_for(Specialization<4, kAll>{}, form_class);
    if (choice.vector_inputs == kWithoutScale)
      return wide ? what_for(Specialization<8, kWithoutScale, DType::kBFloat16>{}, form_class)
                  : what_for(Specialization<4, kWithoutScale>{}, form_class);
  }
  if (choice.width == 4) return what_for(Specialization<4>{}, form_class);
  return what_for(Specialization<kWidest<TermOf<R>>>{}, form_class);
}

// How many blocks of the chosen kernel a multiprocessor holds at the least.
template <template <class> class TermOf, class R>
int resident_blocks(const TermSumProblem& p, const Choice& choice) {
  if constexpr (sizeof(R) == 4)
    if (choice.width != 0)
      return with_dense<TermOf, R>(p, choice, [&](auto spec, auto form_class) {
        using Spec = decltype(spec);
        constexpr int kFormClass = decltype(form_class)::value;
        return p.wants_gradient ? kDenseBlocks<TermOf<R>, Spec, true, kFormClass>
                                : kDenseBlocks<TermOf<R>, Spec, false, kFormClass>;
      });
  return kGeneralBlocks<TermOf<R>, R>;
}

template <template <class> class TermOf, class R>
const char* launch_main(const TermSumProblem& p, const TermParams<TermOf<R>::kInputs>& params, const Choice& choice,
                        int64_t blocks, const CudaCall& call) {
  const dim3 grid(static_cast<unsigned>(blocks));
  if constexpr (sizeof(R) == 4)
    if (choice.width != 0)
      return with_dense<TermOf, R>(p, choice, [&](auto spec, auto form_class) {
        using Spec = decltype(spec);
        constexpr int kFormClass = decltype(form_class)::value;
        const auto kernel =
            p.wants_gradient ? dense_kernel<TermOf, R, Spec, true, kFormClass> : dense_kernel<TermOf, R, Spec, false, kFormClass>;
        return launch(kernel, grid, kThreads, params, call);
      });
  return launch(general_kernel<TermOf, R, kTermGroup<TermOf<R>, R>>, grid, kThreads, params, call);
}

template <template <class> class TermOf, class R>
const char* gather_gradients(const TermSumProblem& p, const TermParams<TermOf<R>::kInputs>& params, std::vector<int> sinks,
                             const CudaCall& call) {
  using Evaluate = GatherTerm<TermOf, R>;
  typename Evaluate::Params g{};
  std::copy_n(params.constant, Evaluate::kOperands + 1, g.constant);
  g.upstream_factor = p.upstream.factor;
  g.forms = p.forms;
  const View* view[Evaluate::kSlots] = {};
  for (int k = 0; k < Evaluate::kOperands; ++k) view[k] = &p.operand[k];
  view[Evaluate::kUpstream] = &p.upstream;
  return gather_sinks<Evaluate>(g, view, p.gradient, Dimensions(p.space), std::move(sinks), call);
}

// Whether columns_kernel serves, after lay_out() has chosen a dense kernel: it makes all gradients that would be gathered, and
// no sum of gradients but these.
template <template <class> class TermOf, class R>
bool has_columns(const TermSumProblem& p, const Layout<Slots<TermOf<R>::kInputs>::kCount>& layout, const Dimensions& dims,
                 const Choice& choice, const SinkPlan& sinks) {
  using S = Slots<TermOf<R>::kInputs>;
  constexpr unsigned kSharedSet = shared_inputs_of<TermOf<R>>();
  const int64_t columns = layout.period.size;
  bool serves = sizeof(R) == 4 && choice.width == kColumnWidth && columns > 1 && p.values.row == nullptr &&
                p.values.element == nullptr && !sinks.gathered().empty() && sinks.totals().empty() && sinks.by_run().empty();
  for (int k = 0; k < TermOf<R>::kInputs; ++k) {
    const bool shared = kSharedSet >> k & 1;
    serves = serves && (layout.place[k] <= kUniform || layout.place[k] == (shared ? kRepeat : kContiguous));
  }
  for (int k : sinks.gathered())
    serves = serves && k < S::kWeight && (kSharedSet >> k & 1) && dims.period(p.gradient[k]) == columns;
  const int64_t run = layout.place[S::kUpstream] > kUniform ? dims.run(p.upstream) : columns;
  return serves && run % columns == 0;
}

template <template <class> class TermOf, class R, int kFormClass = 0>
const char* launch_columns(const TermSumProblem& p, const ColumnsParams<TermOf<R>::kInputs>& params, int64_t blocks,
                           const CudaCall& call) {
  if constexpr (shared_inputs_of<TermOf<R>>() == 0u || sizeof(R) != 4) return "no input of this term is shared";
  else {
    if constexpr (kFormClass + 1 < TermOf<R>::kFormClasses)
      if (TermOf<R>::form_class(p.forms) != kFormClass)
        return launch_columns<TermOf, R, kFormClass + 1>(p, params, blocks, call);
    return launch(columns_kernel<TermOf, R, kFormClass>, dim3(static_cast<unsigned>(blocks)), kThreads, params, call);
  }
}

template <template <class> class TermOf, class R>
const char* run_columns(const TermSumProblem& p, ColumnsParams<TermOf<R>::kInputs>& params, const SinkPlan& sinks,
                        const CudaCall& call) {
  using S = Slots<TermOf<R>::kInputs>;
  constexpr int kWarps = kThreads / kWarp, kFewestRows = 2 * kWarps;
  params.columns = params.layout.period.size;
  params.rows = p.space.elements() / params.columns;
  params.column_blocks = static_cast<int>(divide_up(params.columns, kBlockColumns));
  const int64_t wanted = multiprocessors(call.device) * kColumnsBlocks<TermOf<R>> * kWavesOfColumns;
  int64_t sharers = std::clamp<int64_t>(wanted / params.column_blocks, 1, divide_up(params.rows, kFewestRows));
  params.rows_per_block = divide_up(divide_up(params.rows, sharers), kWarps) * kWarps;
  sharers = divide_up(params.rows, params.rows_per_block);
  const int64_t blocks = params.column_blocks * sharers;
  for (int k : sinks.gathered()) {
    params.column_sum[k] = array_of(p.gradient[k]);
    if (sharers == 1) continue;
    void* const sums = call.workspace(sharers * params.columns * static_cast<int64_t>(sizeof(double)));
    if (call.out_of_memory) return kOutOfMemory;
    params.column_sum[k] = {static_cast<char*>(sums), DType::kDouble};
  }
  if (p.values.total != nullptr)
    params.sums.total(S::kValueSum, {as_bytes(p.values.total), compute_type(p.compute_double)}, p.values.divisor);
  const char* error = prepare_totals(params.sums, blocks, call);
  if (error == nullptr) error = launch_columns<TermOf, R>(p, params, blocks, call);
  for (int k : sinks.gathered())
    if (error == nullptr && sharers > 1)
      error = fold(reinterpret_cast<const double*>(params.column_sum[k].data), array_of(p.gradient[k]),
                   {{sharers, {params.columns, 0}}, {params.columns, {1, 1}}}, call);
  return error;
}

template <template <class> class TermOf, class R>
const char* run(const TermSumProblem& p, const CudaCall& call) {
  using S = Slots<TermOf<R>::kInputs>;
  ColumnsParams<TermOf<R>::kInputs> params{};
  for (int k = 0; k < S::kOperands; ++k) params.constant[k] = p.operand[k].constant;
  params.constant[S::kUpstream] = p.upstream.constant;
  params.upstream_factor = p.upstream.factor;
  params.forms = p.forms;

  const Dimensions dims(p.space);
  const SinkPlan sinks(dims, p.gradient, p.space.elements());
  const bool row_sums = p.values.row != nullptr, by_segment = row_sums || !sinks.by_run().empty();
  std::vector<const View*> slowly_varying{&p.upstream};  // what the dense kernel takes as one number per unit
  for (int k = 0; k < TermOf<R>::kInputs; ++k)
    if (TermOf<R>::kPrecomputedFrom >> k & 1) slowly_varying.push_back(&p.operand[k]);
  const int64_t segment =
      segment_length(row_sums ? p.space.cols : sinks.segment(), dims, slowly_varying, /*in_order=*/row_sums, by_segment);
  const DType compute = compute_type(p.compute_double);

  const int widest = sinks.gathered().empty() ? kWidest<TermOf<R>> : kColumnWidth;  // columns_kernel may serve
  const Choice choice = lay_out<TermOf, R>(params.layout, p, dims, segment, widest);
  if (p.elbo.loss != nullptr) {
    params.sums.total(S::kKLSum, {nullptr, compute});
    params.kl = {as_bytes(p.elbo.kl), p.elbo.kl_dtype};
    params.loss = {as_bytes(p.elbo.loss), compute};
    params.reduced_kl = {as_bytes(p.elbo.reduced_kl), compute};
    params.kl_factor_out = {as_bytes(p.elbo.kl_factor_out), compute};
    params.kl_count = p.elbo.kl_count;
    params.beta = p.elbo.beta;
    params.kl_factor = p.elbo.kl_factor;
  }

  if (has_columns<TermOf, R>(p, params.layout, dims, choice, sinks)) return run_columns<TermOf, R>(p, params, sinks, call);

  const int per_step = choice.width == 0 ? kTermGroup<TermOf<R>, R> : choice.width;
  Work<S::kSums> work(params.units, params.sums, dims, segment, by_segment, per_step, resident_blocks<TermOf, R>(p, choice), call);
  work.add_values(S::kValueSum, p.values, compute, p.space);
  work.add_gradients(sinks, p.gradient);
  const char* error = work.run(any_written(params.layout, S::kFirstSink, S::kCount),
                               [&] { return launch_main<TermOf, R>(p, params, choice, work.blocks(), call); });
  if (error == nullptr) error = gather_gradients<TermOf, R>(p, params, sinks.gathered(), call);
  return error;
}

}  // namespace

template <>
const char* term_sum<ELBO_REAL>(const TermSumProblem& p, const CudaCall& call) {
  switch (p.term) {
#define ELBO_TERM_CASE(number, Term, name) \
  case number: return run<Term, ELBO_REAL>(p, call);
    ELBO_FOR_EACH_TERM(ELBO_TERM_CASE)
#undef ELBO_TERM_CASE
  }
  return "there is no such term";
}

}  // namespace elbo_ext
