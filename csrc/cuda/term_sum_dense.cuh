// The kernel of a term for dense operands (layout.cuh), which has to keep up with the memory.
#pragma once

#include <type_traits>
#include <utility>

#include "term_sum.cuh"

namespace elbo_ext {
namespace {

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
                         (elements_at_once<Term>() < 4) - IsCountTerm<Term>::value);
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
  constexpr unsigned kTensorSet = (1u << kTensors) - 1;
  constexpr unsigned kRepeated = kAny ? kTensorSet : kFastPath<Term> & ~Spec::kVectorInputs;
  constexpr unsigned kSummed = kGradient ? kRepeated : 0u;
  constexpr unsigned kWritten = kAny ? kTensorSet : Spec::kVectorInputs, used = used_sums<kInputs>(kSummed);
  constexpr bool kIsCountTerm = IsCountTerm<Term>::value;  // terms/count.h
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
          raw[k] = kIsCountTerm && k == 0 ? load_data<R, V>(array(k), offset) : load<R, V>(array(k), offset);
        }
      R total = R(0), sink_sum[kInputs] = {};
      const auto part = [&](auto at) {
        constexpr int kAt = decltype(at)::value;
        T in[kInputs], value;
        ELBO_UNROLL
        for (int k = 0; k < kInputs; ++k) {
          if (vectors[k]) {
            const DType dtype = array(k).dtype;
            convert<R, V, kAt, kPart>(raw[k], kIsCountTerm && k == 0 ? dtype_in_registers<R>(dtype) : dtype, in[k].x);
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

}  // namespace
}  // namespace elbo_ext
