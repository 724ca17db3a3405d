// A sample with log q and log p, and its backward pass. The formulas: terms/sample.h.
// Compiled once for each compute type, ELBO_REAL.
#include "entries.h"
#include "latent.cuh"

namespace elbo_ext {
namespace {

// ---- forward: each sample is one row of the space, or several ----

enum Sum {
  kLogQ,
  kLogP,
  kForwardSums
};
constexpr int kZ = kNoise + 1, kForwardSlots = kZ + 1;

struct SampleLogProbParams {
  Layout<kForwardSlots> layout;
  Units units;
  SumPlan<kForwardSums> sums;
  LatentCommon common;
};

// How many blocks a multiprocessor holds of the kernel for the forward pass.
constexpr int forward_blocks(bool only_dense) { return only_dense ? 2 : 1; }
constexpr int kBackwardBlocks = 1;

template <class R, bool kOnlyDense, int kFormClass>
__global__ void __launch_bounds__(kThreads, forward_blocks(kOnlyDense)) sample_log_prob_kernel(
    const __grid_constant__ SampleLogProbParams p) {
  using T = Pack<R, kGroup<R>>;
  using Reader = Group<R, kForwardSlots, kOnlyDense>;
  constexpr unsigned kUsed = (1u << kForwardSums) - 1;
  const LatentCommon& c = p.common;
  const Forms forms{LatentForms::within<kFormClass>(c.forms), c.constant};
  const ScaleForm<R> form(forms, kScale), prior_form(forms, kPriorScale);
  const uint64_t seed = c.the_seed();
  Inputs<R, kForwardSlots, kOnlyDense> inputs(c, p.layout);
  double sum[kForwardSums] = {};
  for_each_unit<kUsed>(p.units, p.sums, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    inputs.begin_unit(p.layout, first);
    for (int64_t n = (first / kGroup<R> + lane) * kGroup<R>; n < end; n += lanes * kGroup<R>) {
      const unsigned mask = Reader::members(n, first, end);
      T in[kLatentInputs], eps;
      inputs.read(p.layout, n, mask, in);
      noise<kOnlyDense>(c, p.layout, seed, 0, n, mask, eps.x);
      const T z = standard_deviation(form, in[kScale]) * eps + in[kMu];
      Reader::store(p.layout, kZ, n, mask, z.x);
      const T at[] = {z, in[kPriorMu], in[kPriorScale]};
      T log_q = log_prob_of_sample(form, in[kScale], eps);
      T log_p = Gaussian<T>::value(make_scale(prior_form, in[kPriorScale]), at);
      ELBO_UNROLL
      for (int i = 0; i < kGroup<R>; ++i) {
        log_q.x[i] = mask >> i & 1 ? log_q.x[i] : R(0);
        log_p.x[i] = mask >> i & 1 ? log_p.x[i] : R(0);
      }
      sum[kLogQ] += static_cast<double>(sum_of(log_q));
      sum[kLogP] += static_cast<double>(sum_of(log_p));
    }
  });
}

// ---- backward: the samples of an element are added up by the thread that it belongs to ----

constexpr int kUpstreamQ = BackwardSlots::kUpstream, kUpstreamP = kUpstreamQ + 1, kBackwardSlots = kUpstreamP + 1;

struct BackwardCommon : LatentCommon {
  int results;
  int64_t grad_z_step, upstream_q_step, upstream_p_step;
};
using SampleLogProbBackwardParams = BackwardParams<2, BackwardCommon>;

// The gradient of log q or log p: often one number for each example and sample.
template <class R, bool kOnlyDense>
class UpstreamOfSamples {
 public:
  using Params = Layout<kBackwardSlots>;
  __device__ __forceinline__ UpstreamOfSamples(const Params& layout, int slot, int64_t first, int64_t step)
      : slot_(slot), step_(step) {
    if (kOnlyDense && layout.place[slot] == kPerUnit) at_ = layout.offset(slot, first);
    else uniform_ = uniform_number<R>(layout, slot, 0.0);
  }
  __device__ __forceinline__ void read(const Params& layout, int64_t sample, int64_t group, unsigned mask,
                                       Pack<R, kGroup<R>>& to) const {
    if constexpr (kOnlyDense) {
      to = Pack<R, kGroup<R>>(at_ < 0 ? uniform_ : elbo_ext::read<R>(layout.array[slot_], at_ + sample * step_));
    } else {
      AnyGroup<R, kGroup<R>, kBackwardSlots> reader;
      reader.begin(layout, slot_, group, mask, sample * step_);
      reader.finish(layout, slot_, mask, to.x, uniform_);
    }
  }

 private:
  int slot_;
  int64_t step_, at_ = -1;  // where the first sample's stands, if there is one for each unit
  R uniform_ = R(0);
};

template <class R, bool kOnlyDense, int kFormClass>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) sample_log_prob_backward_kernel(
    const __grid_constant__ SampleLogProbBackwardParams p) {
  using S = BackwardSlots;
  using T = Pack<R, kGroup<R>>;
  using Reader = Group<R, kBackwardSlots, kOnlyDense>;
  const BackwardCommon& c = p.common;
  const Forms forms{LatentForms::within<kFormClass>(c.forms), c.constant};
  const ScaleForm<R> form(forms, kScale), prior_form(forms, kPriorScale);
  const uint64_t seed = c.the_seed();
  Inputs<R, kBackwardSlots, kOnlyDense> inputs(c, p.layout);
  const R uniform_grad_z = uniform_number<R>(p.layout, S::kGradZ, 0.0);
  double sum[kLatentInputs] = {};
  for_each_unit<kAllSums>(p.units, p.sums, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    inputs.begin_unit(p.layout, first);
    const UpstreamOfSamples<R, kOnlyDense> upstream_q(p.layout, kUpstreamQ, first, c.upstream_q_step),
        upstream_p(p.layout, kUpstreamP, first, c.upstream_p_step);
    for (int64_t n = (first / kGroup<R> + lane) * kGroup<R>; n < end; n += lanes * kGroup<R>) {
      const unsigned mask = Reader::members(n, first, end);
      T in[kLatentInputs];
      inputs.read(p.layout, n, mask, in);
      const SampleScale<T> q = make_sample_scale(form, in[kScale]);
      const Scale<T> prior = make_scale(prior_form, in[kPriorScale]);
      double total[kLatentInputs][kGroup<R>] = {};  // over the samples, of which there may be many thousands
      for (int64_t sample = 0; sample < c.samples; ++sample) {
        Reader z_reader;
        z_reader.begin(p.layout, S::kGradZ, n, mask, sample * c.grad_z_step);
        T eps, grad_z, grad_q, grad_p;
        upstream_q.read(p.layout, sample, n, mask, grad_q);
        upstream_p.read(p.layout, sample, n, mask, grad_p);
        noise<kOnlyDense>(c, p.layout, seed, sample, n, mask, eps.x);
        z_reader.finish(p.layout, S::kGradZ, mask, grad_z.x, uniform_grad_z);
        const SampleGradient<T> by(c.results, q, prior, in[kMu], in[kPriorMu], eps, grad_z, grad_q, grad_p);
        ELBO_UNROLL
        for (int i = 0; i < kGroup<R>; ++i) {
          total[kMu][i] += static_cast<double>(by.mu.x[i]);
          total[kScale][i] += static_cast<double>(by.scale.x[i]);
          total[kPriorMu][i] += static_cast<double>(by.prior_mu.x[i]);
          total[kPriorScale][i] += static_cast<double>(by.prior_scale.x[i]);
        }
        if (!kOnlyDense && p.layout.place[S::kNoiseGradient] != kAbsent)
          Reader::store(p.layout, S::kNoiseGradient, n, mask, by.eps.x, sample * p.noise_gradient_step);
      }
      T d[kLatentInputs];
      ELBO_UNROLL
      for (int k = 0; k < kLatentInputs; ++k) {
        ELBO_UNROLL
        for (int i = 0; i < kGroup<R>; ++i) d[k].x[i] = static_cast<R>(total[k][i]);
      }
      deliver<Reader>(p.layout, p.sums, n, mask, d, sum);
    }
  });
  total_sums<kAllSums>(p.sums, sum);
}

// The gradients of operands whose elements are shared by elements here and there.
template <class R>
struct GatherSampleLogProb : GatherSlots<2> {  // kUpstream: those of log q and log p
  struct Params {
    Gather<kSlots, kSums> gather;
    BackwardCommon common;
  };

  static __device__ __forceinline__ void add(const Params& p, const int64_t (&offset)[kSlots], double (&sum)[kSums]) {
    const BackwardCommon& c = p.common;
    const GatheredElement<R, kSlots> element{p.gather.layout.array, offset};
    R in[kLatentInputs];
    ELBO_UNROLL
    for (int k = 0; k < kLatentInputs; ++k) in[k] = element.number(k, c.constant[k]);
    const Forms forms{c.forms, c.constant};
    const SampleScale<R> q = make_sample_scale({forms, kScale}, in[kScale]);
    const Scale<R> prior = make_scale({forms, kPriorScale}, in[kPriorScale]);
    const R eps = c.makes_noise ? normal<R>(c.the_seed(), offset[kNumber]) : element.number(kNoise);
    const SampleGradient<R> by(c.results, q, prior, in[kMu], in[kPriorMu], eps, element.number(kGradZ),
                               element.number(kUpstream), element.number(kUpstream + 1));
    sum[kMu] += static_cast<double>(by.mu);
    sum[kScale] += static_cast<double>(by.scale);
    sum[kPriorMu] += static_cast<double>(by.prior_mu);
    sum[kPriorScale] += static_cast<double>(by.prior_scale);
  }
};

// ---- on the host ----

template <class R>
const char* run_forward(const LatentProblem& p, const CudaCall& call) {
  SampleLogProbParams params{};
  params.common = common_of(p, /*with_kl=*/false);
  const Dimensions dims(p.space);
  const int64_t segment = segment_length(p.space.cols, dims, scales_of(p), /*in_order=*/true, /*many_sums=*/true);
  LayoutBuilder<kForwardSlots> layout(params.layout, dims, segment, kGroup<R>, p.compute_double);
  for (int k = 0; k < kLatentInputs; ++k) layout.set(k, p.input[k]);
  layout.set(kNoise, p.noise);
  layout.set(kZ, p.z, /*written=*/true);

  using K = Kernel<SampleLogProbParams>;
  const K kernel = choose_kernel<R>(is_dense<R>(params.layout, p, segment), p, [](auto dense, auto form_class) -> K {
    constexpr bool kOnlyDense = decltype(dense)::value;
    return {sample_log_prob_kernel<R, kOnlyDense, decltype(form_class)::value>, forward_blocks(kOnlyDense)};
  });
  Work<kForwardSums> work(params.units, params.sums, dims, segment, /*by_segment=*/true, kGroup<R>,
                          kernel.resident, call);
  work.add_values(kLogQ, p.log_q, compute_type(p.compute_double), p.space);
  work.add_values(kLogP, p.log_p, compute_type(p.compute_double), p.space);
  return work.run(/*writes=*/true, [&] {
    return launch(kernel.function, dim3(static_cast<unsigned>(work.blocks())), kThreads, params, call);
  });
}

template <class R>
const char* run_backward(const LatentProblem& p, const CudaCall& call) {
  BackwardCommon common{};
  static_cast<LatentCommon&>(common) = common_of(p, /*with_kl=*/false);
  common.results = p.results;
  common.grad_z_step = p.grad_z_sample_stride;
  common.upstream_q_step = p.upstream_q_sample_stride;
  common.upstream_p_step = p.upstream_p_sample_stride;
  const Upstreams<2> upstream{{&p.upstream_q, &p.upstream_p}, {common.upstream_q_step, common.upstream_p_step}};
  return run_backward<R, GatherSampleLogProb<R>>(common, p, upstream, call, [&](const auto&, bool dense) {
    using K = Kernel<SampleLogProbBackwardParams>;
    return choose_kernel<R>(dense, p, [](auto dense, auto form_class) -> K {
      return {sample_log_prob_backward_kernel<R, decltype(dense)::value, decltype(form_class)::value>, kBackwardBlocks};
    });
  });
}

}  // namespace

template <>
const char* sample_log_prob<ELBO_REAL>(const LatentProblem& p, const CudaCall& call) {
  return run_forward<ELBO_REAL>(p, call);
}
template <>
const char* sample_log_prob_backward<ELBO_REAL>(const LatentProblem& p, const CudaCall& call) {
  return run_backward<ELBO_REAL>(p, call);
}

}  // namespace elbo_ext
