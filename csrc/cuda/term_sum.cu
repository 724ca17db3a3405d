// Sums of a term over rows, forward, backward, and both in one pass. Compiled once for each compute type, ELBO_REAL.
#include <type_traits>

#include "entries.h"
#include "forms.cuh"
#include "gather.cuh"

namespace elbo_ext {
namespace {

constexpr int kUpstream = kMaxOperands, kFirstSink = kMaxOperands + 1, kElement = kFirstSink + kMaxOperands;
constexpr int kTermSlots = kElement + 1;  // inputs, weight, upstream, their gradients, the value of each element
constexpr int kValueSum = kMaxOperands, kKLSum = kMaxOperands + 1, kTermSums = kMaxOperands + 2;

struct TermParams {
  Layout<kTermSlots> layout;
  Units units;
  SumPlan<kTermSums> sums;
  double constant[kMaxOperands + 1];  // of the inputs, the weight and the upstream gradient
  double upstream_factor;
  int form, prior_form;
  // the ELBO
  Array kl, loss, reduced_kl, of_kl;
  int64_t kl_count;
  double beta, of_each;
};

template <class R>
__device__ __forceinline__ R upstream_of_all(const TermParams& p) {
  if (p.layout.place[kUpstream] != kOne) return static_cast<R>(p.constant[kUpstream]);
  return static_cast<R>(read<double>(p.layout.array[kUpstream], 0) * p.upstream_factor);
}

// The sums that a kernel over a term makes.
template <int kInputs, bool kGradient>
constexpr unsigned kUsed = 1u << kValueSum | 1u << kKLSum | (kGradient ? (1u << kInputs) - 1 : 0u);

// What the grid does once its elements are done.
template <class R, unsigned used>
__device__ __forceinline__ void finish(const TermParams& p, double (&sum)[kTermSums]) {
  if (p.loss.data != nullptr)
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.kl_count;
         i += static_cast<int64_t>(gridDim.x) * kThreads)
      sum[kKLSum] += read<double>(p.kl, i);
  if (!total_sums<used>(p.sums, sum) || p.loss.data == nullptr) return;
  const double kl = sum[kKLSum] * p.of_each;
  write(p.loss, 0, p.beta * kl - static_cast<R>(sum[kValueSum]));
  write(p.reduced_kl, 0, kl);
  if (p.of_kl.data != nullptr) write(p.of_kl, 0, p.of_each);
}

// How many blocks of the dense kernel a multiprocessor is to hold at least: as many as its registers allow without spills.
template <int kInputs, bool kGradient, Forms forms>
constexpr int kDenseBlocks = std::max(2, 4 - kGradient - (forms == Forms::kDirect) - (kInputs > 3));

// The ordinary case, in which a kernel has to keep up with the memory: each operand is dense, also if it then repeats, or
// one number; scales and the upstream gradient may be one number for each unit; there is no weight. The vectors of all
// operands are in flight at once; they are worked on in parts of kPart elements, which bounds the registers that a thread
// needs.
template <template <class> class TermOf, class R, int V, bool kGradient, Forms forms>
__global__ void __launch_bounds__(kThreads, kDenseBlocks<TermOf<R>::kInputs, kGradient, forms>) dense_kernel(
    const __grid_constant__ TermParams p) {
  constexpr int kPart = V < 4 ? V : 4;
  using T = Pack<R, kPart>;
  using Term = TermOf<T>;
  constexpr int kInputs = Term::kInputs;
  constexpr unsigned used = kUsed<kInputs, kGradient>;
  const int form = within<forms>(p.form), prior_form = within<forms>(p.prior_form);
  T of_all[kInputs];
  bool each[kInputs], share_each = false;
  ELBO_UNROLL
  for (int k = 0; k < kInputs; ++k) {
    each[k] = is_each(p.layout.place[k]);
    of_all[k] = T(elbo_ext::of_all<R>(p.layout, k, p.constant[k]));
    share_each = share_each || (p.layout.place[k] > kOne && (Term::kSharedInputs >> k & 1));
  }
  // What depends on uniform scales alone is computed once.
  const typename Term::Shared shared_by_all = Term::share(of_all, form, prior_form);
  T upstream(kGradient ? upstream_of_all<R>(p) : R(0));

  double sum[kTermSums] = {};
  for_each_unit<used>(p.units, p.sums, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    if (p.layout.units_differ) {
      ELBO_UNROLL
      for (int k = 0; k < kInputs; ++k)
        if ((Term::kSharedInputs >> k & 1) && p.layout.place[k] == kOfUnit) of_all[k] = T(of_unit<R>(p.layout, k, first));
      if (kGradient && p.layout.place[kUpstream] == kOfUnit)
        upstream = T(static_cast<R>(of_unit<double>(p.layout, kUpstream, first) * p.upstream_factor));
    }
    for (int64_t n = first + lane * V; n < end; n += lanes * V) {
      Raw<R, V> raw[kInputs];  // later the gradients
      ELBO_UNROLL
      for (int k = 0; k < kInputs; ++k)
        if (each[k]) raw[k] = load<R, V>(p.layout.array[k], p.layout.vector_offset(p.layout.place[k], n));
      R total = R(0), of_sink[kInputs] = {};
      const auto part = [&](auto at) {
        constexpr int kAt = decltype(at)::value;
        T in[kInputs], value;
        ELBO_UNROLL
        for (int k = 0; k < kInputs; ++k) {
          if (each[k]) convert<R, V, kAt, kPart>(raw[k], p.layout.array[k].dtype, in[k].x);
          else in[k] = of_all[k];
        }
        typename Term::Shared shared = shared_by_all;
        if (share_each) shared = Term::share(in, form, prior_form);
        if constexpr (kGradient) {
          T d[kInputs];
          value = Term::gradient(shared, in, d);
          ELBO_UNROLL
          for (int k = 0; k < kInputs; ++k) {
            if (p.layout.place[kFirstSink + k] == kDense)
              pack<R, V, kAt, kPart>((d[k] * upstream).x, p.layout.array[kFirstSink + k].dtype, raw[k]);
            else if (p.sums.kind[k] != kNoSum) of_sink[k] += sum_of(d[k] * upstream);
          }
        } else {
          value = Term::value(shared, in);
          // The only result that may be wider than the operands: by parts.
          if (p.layout.place[kElement] == kDense)
            store_vector<R, kPart>(p.layout.array[kElement], n + kAt, value.x);
        }
        total += sum_of(value);
      };
      part(std::integral_constant<int, 0>{});
      if constexpr (V > kPart) part(std::integral_constant<int, kPart>{});
      sum[kValueSum] += static_cast<double>(total);
      if constexpr (kGradient) {
        ELBO_UNROLL
        for (int k = 0; k < kInputs; ++k) {
          if (p.layout.place[kFirstSink + k] == kDense) store_raw<R, V>(p.layout.array[kFirstSink + k], n, raw[k]);
          else if (p.sums.kind[k] != kNoSum) sum[k] += static_cast<double>(of_sink[k]);
        }
      }
    }
  });
  finish<R, used>(p, sum);
}

// Any layout, any operands, in groups of kWidth neighbours.
template <template <class> class TermOf, class R, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(R) == 8 || TermOf<R>::kInputs > 3 ? 1 : 2) general_kernel(
    const __grid_constant__ TermParams p) {
  using T = Pack<R, kWidth>;
  using Term = TermOf<T>;
  using Reader = AnyGroup<R, kWidth, kTermSlots>;
  constexpr int kInputs = Term::kInputs;
  constexpr unsigned used = kUsed<kInputs, true> | 1u << kWeight;
  const bool weighted = p.layout.place[kWeight] != kAbsent;
  const bool upstream_each = p.layout.place[kUpstream] > kOne;
  const R upstream = upstream_each ? static_cast<R>(p.upstream_factor) : upstream_of_all<R>(p);
  R one[kInputs + 1];  // of the inputs and the weight
  ELBO_UNROLL
  for (int k = 0; k <= kInputs; ++k) {
    const int slot = k == kInputs ? kWeight : k;
    one[k] = of_all<R>(p.layout, slot, p.constant[slot]);
  }

  double sum[kTermSums] = {};
  for_each_unit<used>(p.units, p.sums, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    for (int64_t n = (first / kWidth + lane) * kWidth; n < end; n += lanes * kWidth) {
      const unsigned mask = Reader::members(n, first, end);
      Reader reader[kInputs + 2];
      T in[kInputs], weight, grad;
      ELBO_UNROLL
      for (int k = 0; k < kInputs; ++k) reader[k].begin(p.layout, k, n, mask);
      reader[kInputs].begin(p.layout, kWeight, n, mask);
      reader[kInputs + 1].begin(p.layout, kUpstream, n, mask);
      ELBO_UNROLL
      for (int k = 0; k < kInputs; ++k) reader[k].finish(p.layout, k, mask, in[k].x, one[k]);
      reader[kInputs].finish(p.layout, kWeight, mask, weight.x, one[kInputs]);
      reader[kInputs + 1].finish(p.layout, kUpstream, mask, grad.x, R(1));

      T d[kInputs + 1], value = Term::gradient(Term::share(in, p.form, p.prior_form), in, d);
      ELBO_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        // A weight of zero leaves the element out, whatever stands there: 0 * inf must not become NaN.
        const bool inside = mask >> i & 1, counts = inside && weight.x[i] != R(0);
        const R g = grad.x[i] * upstream, factor = weighted ? g * weight.x[i] : g;
        ELBO_UNROLL
        for (int k = 0; k < kInputs; ++k) d[k].x[i] = counts ? d[k].x[i] * factor : R(0);
        d[kInputs].x[i] = inside ? value.x[i] * g : R(0);  // of the weight
        value.x[i] = counts ? (weighted ? value.x[i] * weight.x[i] : value.x[i]) : R(0);
      }
      ELBO_UNROLL
      for (int k = 0; k <= kInputs; ++k) {
        const int operand = k == kInputs ? kWeight : k;
        if (p.layout.place[kFirstSink + operand] != kAbsent)
          Reader::store(p.layout, kFirstSink + operand, n, mask, d[k].x);
        else if (p.sums.kind[operand] != kNoSum) sum[operand] += static_cast<double>(sum_of(d[k]));
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
  static constexpr int kSlots = kMaxOperands + 2, kSums = kMaxOperands;  // inputs, weight, upstream, the gradient
  struct Params {
    Gather<kSlots, kSums> gather;
    double constant[kMaxOperands + 1];
    double upstream_factor;
    int form, prior_form;
  };

  static __device__ __forceinline__ void add(const Params& p, const int64_t (&offset)[kSlots], double (&sum)[kSums]) {
    using Term = TermOf<R>;
    constexpr int kInputs = Term::kInputs;
    const auto get = [&](int slot) {
      const Array& array = p.gather.layout.array[slot];
      return array.data == nullptr ? static_cast<R>(p.constant[slot]) : read<R>(array, offset[slot]);
    };
    R x[kInputs], d[kInputs];
    ELBO_UNROLL
    for (int k = 0; k < kInputs; ++k) x[k] = get(k);
    const typename Term::Shared shared = Term::share(x, p.form, p.prior_form);
    const R value = Term::gradient(shared, x, d), weight = get(kWeight);
    const R grad = static_cast<R>(static_cast<double>(get(kUpstream)) * p.upstream_factor);
    ELBO_UNROLL
    for (int k = 0; k < kInputs; ++k) sum[k] += weight != R(0) ? static_cast<double>(d[k] * (grad * weight)) : 0.0;
    sum[kWeight] += static_cast<double>(value * grad);
  }
};

// ---- on the host ----

// Lays the tensors out, and returns the width of the dense kernel's vectors: 16 bytes of what all operands are, or of the
// narrowest; 0 if it does not serve.
template <template <class> class TermOf, class R>
int lay_out(Layout<kTermSlots>& layout, const TermSumProblem& p, const Dimensions& dims, int64_t row) {
  const auto for_width = [&](int width) {
    layout = {};
    LayoutBuilder<kTermSlots> builder(layout, dims, row, width, p.compute_double);
    for (int k = 0; k < kMaxOperands; ++k) {
      builder.set(k, p.input[k]);
      if (!p.gradient[k].summed) builder.set(kFirstSink + k, p.gradient[k], /*written=*/true);
    }
    builder.set(kUpstream, p.upstream);
    builder.set(kElement, dense_view(p.values.element, p.compute_double ? DType::kDouble : DType::kFloat), /*written=*/true);
  };
  // Each of these would double the kernels there are to compile: weights, float64, and a logarithm beside a std or var.
  const bool may_be_dense = !p.input[kWeight].present() && !p.compute_double &&
                            !(TermOf<R>::kInputs == kMaxInputs && class_of(p.form, p.prior_form) == Forms::kAny);
  for (int width = 8; may_be_dense && width >= 4; width /= 2) {
    for_width(width);
    bool fits = row % width == 0 && !is_each(layout.place[kUpstream]);
    for (int slot = 0; slot < kElement; ++slot) {
      const Place place = layout.place[slot];
      fits = fits && is_dense(place) && (place != kOfUnit || slot == kUpstream || TermOf<R>::kSharedInputs >> slot & 1);
      // Eight elements are 16 bytes where all that is read or written element by element is of half precision.
      if (width == 8 && is_each(place) && bytes_of(layout.array[slot].dtype) != 2) fits = false;
    }
    if (fits) return width;
  }
  for_width(kGroup<R>);
  return 0;
}

template <template <class> class TermOf, class R, Forms forms>
const char* launch_dense(const TermSumProblem& p, const TermParams& params, int width, dim3 grid, const CudaCall& call) {
  if (width == 8)
    return launch(p.wants_gradient ? dense_kernel<TermOf, R, 8, true, forms> : dense_kernel<TermOf, R, 8, false, forms>,
                  grid, kThreads, params, call);
  return launch(p.wants_gradient ? dense_kernel<TermOf, R, 4, true, forms> : dense_kernel<TermOf, R, 4, false, forms>,
                grid, kThreads, params, call);
}

template <template <class> class TermOf, class R>
const char* launch_main(const TermSumProblem& p, const TermParams& params, int width, int64_t blocks,
                        const CudaCall& call) {
  const dim3 grid(static_cast<unsigned>(blocks));
  if (width == 0) return launch(general_kernel<TermOf, R, kGroup<R>>, grid, kThreads, params, call);
  if constexpr (sizeof(R) == 4) {
    if constexpr (TermOf<R>::kSharedInputs != 0)
      if (class_of(p.form) == Forms::kDirect)
        return launch_dense<TermOf, R, Forms::kDirect>(p, params, width, grid, call);
    return launch_dense<TermOf, R, Forms::kExponential>(p, params, width, grid, call);
  }
  return "there is no such kernel";
}

template <template <class> class TermOf, class R>
const char* gather_gradients(const TermSumProblem& p, const TermParams& params, std::vector<int> sinks,
                             const CudaCall& call) {
  using Evaluate = GatherTerm<TermOf, R>;
  typename Evaluate::Params g{};
  std::copy_n(params.constant, kMaxOperands + 1, g.constant);
  g.upstream_factor = p.upstream.present() ? p.upstream.factor : 1.0;
  g.form = p.form;
  g.prior_form = p.prior_form;
  const View* view[Evaluate::kSlots] = {};
  for (int k = 0; k < kMaxOperands; ++k) view[k] = &p.input[k];
  view[kUpstream] = &p.upstream;
  return gather_sinks<Evaluate>(g, view, p.gradient, Dimensions(p.space), std::move(sinks), call);
}

template <template <class> class TermOf, class R>
const char* run(const TermSumProblem& p, const CudaCall& call) {
  TermParams params{};
  for (int k = 0; k < kMaxOperands; ++k) params.constant[k] = p.input[k].constant;
  params.constant[kWeight] = 1.0;
  params.constant[kUpstream] = p.upstream.constant;
  params.upstream_factor = p.upstream.factor;
  params.form = p.form;
  params.prior_form = p.prior_form;

  const Dimensions dims(p.space);
  const SinkPlan sinks(dims, p.gradient, p.space.elements());
  const bool row_sums = p.values.row != nullptr, by_row = row_sums || !sinks.by_run().empty();
  std::vector<const View*> seldom{&p.upstream};  // what the dense kernel takes as one number for each unit
  for (int k = 0; k < TermOf<R>::kInputs; ++k)
    if (TermOf<R>::kSharedInputs >> k & 1) seldom.push_back(&p.input[k]);
  const int64_t cols = cut_rows(row_sums ? p.space.cols : sinks.row(), dims, seldom, row_sums, by_row);
  const int64_t rows = cols == 0 ? 1 : p.space.elements() / cols;
  const DType compute = p.compute_double ? DType::kDouble : DType::kFloat;

  const int width = lay_out<TermOf, R>(params.layout, p, dims, cols);
  const Spread work = spread(rows, cols, by_row, width == 0 ? kGroup<R> : width, call.device);
  params.units = work.units;

  for (int k = 0; k < kMaxOperands; ++k)
    if (p.gradient[k].wanted() && p.gradient[k].numel == 1 && p.gradient[k].summed)
      params.sums.total(k, array_of(p.gradient[k]));
  if (p.values.total != nullptr) params.sums.total(kValueSum, {as_bytes(p.values.total), compute}, p.values.divisor);
  if (p.elbo.loss != nullptr) {
    params.sums.total(kKLSum, {nullptr, compute});
    params.kl = {as_bytes(p.elbo.kl), p.elbo.kl_dtype};
    params.loss = {as_bytes(p.elbo.loss), compute};
    params.reduced_kl = {as_bytes(p.elbo.reduced_kl), compute};
    params.of_kl = {as_bytes(p.elbo.of_kl), compute};
    params.kl_count = p.elbo.kl_count;
    params.beta = p.elbo.beta;
    params.of_each = p.elbo.of_each;
  }
  UnitSums<kTermSums> unit_sums(params.sums, work.units, dims, cols, call);
  if (p.values.row != nullptr) unit_sums.add(kValueSum, dense_rows(p.values.row, compute, p.space));
  for (int k : sinks.by_run()) unit_sums.add(k, p.gradient[k]);

  const char* error = prepare_totals(params.sums, work.blocks, call);
  const bool writes = any_written(params.layout, kFirstSink, kTermSlots);
  if (error == nullptr && (writes || any_sum(params.sums)))  // else all gradients are gathered
    error = launch_main<TermOf, R>(p, params, width, work.blocks, call);
  if (error == nullptr) error = unit_sums.finish();
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
