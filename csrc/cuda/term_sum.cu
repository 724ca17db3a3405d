// Sums of a term over rows, forward, backward, and both in one pass: which kernel serves a problem, and its launch. Compiled
// once for each compute type, ELBO_REAL.
#include "entries.h"
#include "term_sum_columns.cuh"
#include "term_sum_dense.cuh"
#include "work.h"

namespace elbo_ext {
namespace {

// The widest vectors of the dense kernel: 16 bytes of half precision, but for terms of counts and those of many inputs, which
// would spill registers.
template <class Term>
constexpr int kWidest = IsCountTerm<Term>::value || (Term::kInputs > 3 && kFastPath<Term> == kAnyInputs) ? 4 : 8;

struct KernelChoice {
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
KernelChoice lay_out(Layout<kCount>& layout, const TermSumProblem& p, const Dimensions& dims, int64_t segment, int widest) {
  using S = Slots<TermOf<R>::kInputs>;
  constexpr int kUpstream = S::kUpstream, kFirstSink = S::kFirstSink, kElement = S::kElement;
  constexpr bool kIsCountTerm = IsCountTerm<TermOf<R>>::value;
  const auto for_width = [&](int width, bool dense = true) {
    layout = {};
    LayoutBuilder<kCount> builder(layout, dims, segment, width, p.compute_double);
    for (int k = 0; k < S::kOperands; ++k) {
      builder.set(k, p.operand[k], /*written=*/false, /*base_step=*/0, /*integer_vectors=*/dense && kIsCountTerm && k == 0);
      if (!p.gradient[k].summed) builder.set(kFirstSink + k, p.gradient[k], /*written=*/true);
    }
    builder.set(kUpstream, p.upstream);
    builder.set(kElement, dense_view(p.values.element, compute_type(p.compute_double)), /*written=*/true);
  };
  // Each of these would double the kernels there are to compile: weights, float64, forms of several classes, and the
  // derivative by data of terms of counts.
  const bool may_be_dense = !p.operand[S::kWeight].present() && !p.compute_double &&
                            TermOf<R>::form_class(p.forms) != kAnyForms && !(kIsCountTerm && p.gradient[0].wanted());
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
auto with_dense(const TermSumProblem& p, const KernelChoice& choice, WhatFor&& what_for) {
  if constexpr (kFormClass + 1 < TermOf<R>::kFormClasses)
    if (TermOf<R>::form_class(p.forms) != kFormClass)
      return with_dense<TermOf, R, kFormClass + 1>(p, choice, what_for);
  constexpr std::integral_constant<int, kFormClass> form_class;
  constexpr unsigned kAll = kFastPath<TermOf<R>>, kWithoutScale = kFastPathWithoutScale<TermOf<R>>;
  if constexpr (kAll != kAnyInputs) {
    const bool wide = choice.width != 4;
    if (choice.vector_inputs == kAll)
      return wide ? what_for(Specialization<8, kAll, DType::kBFloat16>{}, form_class)
                  : what_for(Specialization<4, kAll>{}, form_class);
    if (choice.vector_inputs == kWithoutScale)
      return wide ? what_for(Specialization<8, kWithoutScale, DType::kBFloat16>{}, form_class)
                  : what_for(Specialization<4, kWithoutScale>{}, form_class);
  }
  if (choice.width == 4) return what_for(Specialization<4>{}, form_class);
  return what_for(Specialization<kWidest<TermOf<R>>>{}, form_class);
}

// How many blocks of the chosen kernel a multiprocessor holds at the least.
template <template <class> class TermOf, class R>
int resident_blocks(const TermSumProblem& p, const KernelChoice& choice) {
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
const char* launch_main(const TermSumProblem& p, const TermParams<TermOf<R>::kInputs>& params, const KernelChoice& choice,
                        int64_t blocks, const CudaCall& call) {
  const dim3 grid(static_cast<unsigned>(blocks));
  if constexpr (sizeof(R) == 4)
    if (choice.width != 0)
      return with_dense<TermOf, R>(p, choice, [&](auto spec, auto form_class) {
        using Spec = decltype(spec);
        constexpr int kFormClass = decltype(form_class)::value;
        const auto kernel =
            p.wants_gradient ? dense_kernel<TermOf, R, Spec, true, kFormClass>
                             : dense_kernel<TermOf, R, Spec, false, kFormClass>;
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
                 const KernelChoice& choice, const SinkPlan& sinks) {
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
  const KernelChoice choice = lay_out<TermOf, R>(params.layout, p, dims, segment, widest);
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
  Work<S::kSums> work(params.units, params.sums, dims, segment, by_segment, per_step, resident_blocks<TermOf, R>(p, choice),
                      call);
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
