// Sums of a term over rows, forward, backward, and both in one pass. Compiled once for each compute type, ELBO_REAL.
#include <algorithm>
#include <type_traits>
#include <utility>

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

// The sums that a kernel over a term makes.
template <int kInputs, int kTensors, bool kGradient>
constexpr unsigned kUsed =
    1u << Slots<kInputs>::kValueSum | 1u << Slots<kInputs>::kKLSum | (kGradient ? (1u << kTensors) - 1 : 0u);

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

// How many blocks of the dense kernel a multiprocessor is to hold at least: as many as its registers allow without spills.
template <class Term, bool kGradient, int kFormClass>
constexpr int kDenseBlocks =
    std::max(2, 4 - kGradient - (kFormClass > 0) - (Term::kInputs > 3) - (together_of<Term>() < 4) - HasParts<Term>::value);

// The ordinary case, in which a kernel has to keep up with the memory: each operand is dense, also if it then repeats, or
// one number; scales and the upstream gradient may be one number per unit; there is no weight. The vectors of all
// operands are in flight at once; they are worked on in parts of kPart elements, which bounds the registers that a thread
// needs (terms/forms.h).
template <template <class> class TermOf, class R, int V, bool kGradient, int kFormClass>
__global__ void __launch_bounds__(kThreads, kDenseBlocks<TermOf<R>, kGradient, kFormClass>) dense_kernel(
    const __grid_constant__ TermParams<TermOf<R>::kInputs> p) {
  constexpr int kPart = std::min(V, together_of<TermOf<R>>());
  using T = Pack<R, kPart>;
  using Term = TermOf<T>;
  constexpr int kInputs = Term::kInputs, kTensors = tensors_of<Term>();
  using S = Slots<kInputs>;
  constexpr int kUpstream = S::kUpstream, kFirstSink = S::kFirstSink, kElement = S::kElement, kValueSum = S::kValueSum;
  constexpr unsigned used = kUsed<kInputs, kTensors, kGradient>;
  constexpr bool kInParts = HasParts<Term>::value;  // terms/count.h
  const Forms forms{Term::template within<kFormClass>(p.forms), p.constant};
  T uniform[kInputs];
  bool vectors[kInputs] = {}, recompute = false;
  ELBO_UNROLL
  for (int k = 0; k < kInputs; ++k) {
    if (k < kTensors) vectors[k] = reads_vectors(p.layout.place[k]);
    uniform[k] = T(elbo_ext::uniform_number<R>(p.layout, k, p.constant[k]));
    recompute = recompute || (k < kTensors && p.layout.place[k] > kUniform && (Term::kPrecomputedFrom >> k & 1));
  }
  // What is made from uniform scales is computed once.
  const typename Term::Precomputed precomputed_once = Term::precompute(uniform, forms);
  T upstream(kGradient ? uniform_upstream<R>(p.layout, kUpstream, p.constant[kUpstream], p.upstream_factor) : R(0));

  double sum[S::kSums] = {};
  for_each_unit<used>(p.units, p.sums, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    if (p.layout.units_differ) {
      ELBO_UNROLL
      for (int k = 0; k < kTensors; ++k)
        if ((Term::kPrecomputedFrom >> k & 1) && p.layout.place[k] == kPerUnit)
          uniform[k] = T(per_unit<R>(p.layout, k, first));
      if (kGradient && p.layout.place[kUpstream] == kPerUnit)
        upstream = T(per_unit_upstream<R>(p.layout, kUpstream, first, p.upstream_factor));
    }
    for (int64_t n = first + lane * V; n < end; n += lanes * V) {
      Raw<R, V> raw[kInputs];  // later the gradients
      ELBO_UNROLL
      for (int k = 0; k < kTensors; ++k)
        if (vectors[k]) {
          const int64_t offset = p.layout.vector_offset(p.layout.place[k], n);
          raw[k] = kInParts && k == 0 ? load_data<R, V>(p.layout.array[k], offset) : load<R, V>(p.layout.array[k], offset);
        }
      R total = R(0), sink_sum[kInputs] = {};
      const auto part = [&](auto at) {
        constexpr int kAt = decltype(at)::value;
        T in[kInputs], value;
        ELBO_UNROLL
        for (int k = 0; k < kInputs; ++k) {
          if (vectors[k]) {
            const DType dtype = p.layout.array[k].dtype;
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
            if (p.layout.place[kFirstSink + k] == kDense)
              pack<R, V, kAt, kPart>((d[k] * upstream).x, p.layout.array[kFirstSink + k].dtype, raw[k]);
            else if (p.sums.kind[k] != kNoSum) sink_sum[k] += sum_of(d[k] * upstream);
          }
        } else {
          value = Term::value(precomputed, in);
          // The only result that may be wider than the operands: by parts.
          if (p.layout.place[kElement] == kDense)
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
          if (p.layout.place[kFirstSink + k] == kDense) store_raw<R, V>(p.layout.array[kFirstSink + k], n, raw[k]);
          else if (p.sums.kind[k] != kNoSum) sum[k] += static_cast<double>(sink_sum[k]);
        }
      }
    }
  });
  finish<R, used>(p, sum);
}

// Of the kernel for any layout.
template <class Term, class R>
constexpr int kTermGroup = std::min(kGroup<R>, together_of<Term>());

// Any layout, any operands, in groups of kWidth neighbours.
template <template <class> class TermOf, class R, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(R) == 8 || TermOf<R>::kInputs > 3 ? 1 : 2) general_kernel(
    const __grid_constant__ TermParams<TermOf<R>::kInputs> p) {
  using T = Pack<R, kWidth>;
  using Term = TermOf<T>;
  constexpr int kInputs = Term::kInputs, kTensors = tensors_of<Term>();
  using S = Slots<kInputs>;
  using Reader = AnyGroup<R, kWidth, S::kCount>;
  constexpr int kWeight = S::kWeight, kOperands = S::kOperands, kUpstream = S::kUpstream, kFirstSink = S::kFirstSink,
                kElement = S::kElement, kValueSum = S::kValueSum;
  constexpr unsigned used = kUsed<kInputs, kTensors, true> | 1u << kWeight;
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

// The widest vectors of the dense kernel: 16 bytes of half precision, but for terms in parts, which would spill registers.
template <class Term>
constexpr int kWidest = HasParts<Term>::value ? 4 : 8;

// Lays the tensors out, and returns the width of the dense kernel's vectors: 16 bytes of what all operands are, or of the
// narrowest; 0 if it does not serve.
template <template <class> class TermOf, class R, int kCount>
int lay_out(Layout<kCount>& layout, const TermSumProblem& p, const Dimensions& dims, int64_t segment) {
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
  for (int width = kWidest<TermOf<R>>; may_be_dense && width >= 4; width /= 2) {
    for_width(width);
    bool fits = segment % width == 0 && !reads_vectors(layout.place[kUpstream]);
    for (int slot = 0; slot < kElement; ++slot) {
      const Place place = layout.place[slot];
      fits = fits && is_dense(place) && (place != kPerUnit || slot == kUpstream || TermOf<R>::kPrecomputedFrom >> slot & 1);
      // Eight elements are 16 bytes where all that is read or written element by element is of half precision.
      const DType dtype = layout.array[slot].dtype;
      if (width == 8 && reads_vectors(place) && (bytes_of(dtype) != 2 || is_integer(dtype))) fits = false;
    }
    if (fits) return width;
  }
  for_width(kTermGroup<TermOf<R>, R>, /*dense=*/false);
  return 0;
}

// The dense kernel of the class that the forms are of.
template <template <class> class TermOf, class R, int kFormClass = 0>
const char* launch_dense(const TermSumProblem& p, const TermParams<TermOf<R>::kInputs>& params, int width, dim3 grid,
                         const CudaCall& call) {
  if constexpr (kFormClass + 1 < TermOf<R>::kFormClasses)
    if (TermOf<R>::form_class(p.forms) != kFormClass)
      return launch_dense<TermOf, R, kFormClass + 1>(p, params, width, grid, call);
  constexpr int kWide = kWidest<TermOf<R>>;
  const auto kernel =
      width == kWide ? (p.wants_gradient ? dense_kernel<TermOf, R, kWide, true, kFormClass>
                                         : dense_kernel<TermOf, R, kWide, false, kFormClass>)
                     : (p.wants_gradient ? dense_kernel<TermOf, R, 4, true, kFormClass>
                                         : dense_kernel<TermOf, R, 4, false, kFormClass>);
  return launch(kernel, grid, kThreads, params, call);
}

template <template <class> class TermOf, class R>
const char* launch_main(const TermSumProblem& p, const TermParams<TermOf<R>::kInputs>& params, int width, int64_t blocks,
                        const CudaCall& call) {
  const dim3 grid(static_cast<unsigned>(blocks));
  if constexpr (sizeof(R) == 4)
    if (width != 0) return launch_dense<TermOf, R>(p, params, width, grid, call);
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

template <template <class> class TermOf, class R>
const char* run(const TermSumProblem& p, const CudaCall& call) {
  using S = Slots<TermOf<R>::kInputs>;
  TermParams<TermOf<R>::kInputs> params{};
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

  const int width = lay_out<TermOf, R>(params.layout, p, dims, segment);
  Work<S::kSums> work(params.units, params.sums, dims, segment, by_segment, width == 0 ? kTermGroup<TermOf<R>, R> : width, call);
  work.add_values(S::kValueSum, p.values, compute, p.space);
  work.add_gradients(sinks, p.gradient);
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

  const char* error = work.run(any_written(params.layout, S::kFirstSink, S::kCount),
                               [&] { return launch_main<TermOf, R>(p, params, width, work.blocks(), call); });
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
