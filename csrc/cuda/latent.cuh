// What the kernels of the latent stage share: the noise, made in registers from (seed, element number) and never stored,
// and how inputs are read.
#pragma once

#include "noise.cuh"
#include "work.h"

namespace elbo_ext {
namespace {

// the inputs, as GaussianKL takes them
enum Slot {
  kMu,
  kScale,
  kPriorMu,
  kPriorScale
};
constexpr int kNoise = kLatentInputs;
using LatentForms = ScaleForms<kScale, kPriorScale>;

struct LatentCommon {
  int forms;
  bool with_kl;
  int64_t samples, elements;  // elements of one sample
  bool makes_noise;     // from a seed: this one if it is there, else the number
  const int64_t* seed;
  int64_t seed_number;
  int64_t noise_step;  // between samples
  double constant[kLatentInputs];

  __device__ __forceinline__ uint64_t the_seed() const {
    return static_cast<uint64_t>(seed == nullptr ? seed_number : __ldg(seed));
  }
};

// How a kernel reads: any layout, or dense tensors alone, with the noise from a seed.
template <class R, int kSlots, bool kOnlyDense>
using Group = std::conditional_t<kOnlyDense, DenseGroup<R, kGroup<R>, kSlots>, AnyGroup<R, kGroup<R>, kSlots>>;

// The noise of a group of elements of one sample. Where the caller gave it, it may be of any dtype.
template <bool kOnlyDense, class R, int kSlots>
__device__ __forceinline__ void noise(const LatentCommon& p, const Layout<kSlots>& layout, uint64_t seed, int64_t sample,
                                      int64_t group, unsigned mask, R (&eps)[kGroup<R>]) {
  if (kOnlyDense || p.makes_noise) return normals(seed, sample * p.elements + group, eps);
  AnyGroup<R, kGroup<R>, kSlots> reader;
  reader.begin(layout, kNoise, group, mask, sample * p.noise_step);
  reader.finish(layout, kNoise, mask, eps, uniform_number<R>(layout, kNoise, 0.0));
}

__host__ __device__ constexpr bool may_be_per_unit(int slot) { return slot == kScale || slot == kPriorScale; }

// mu and the scale, and with the KL the prior's. Some are one number for all groups; for the kernels of dense tensors a
// scale may be one number for each unit.
template <class R, int kSlots, bool kOnlyDense>
struct Inputs {
  R uniform[kLatentInputs];

  __device__ __forceinline__ Inputs(const LatentCommon& p, const Layout<kSlots>& layout) {
    ELBO_UNROLL
    for (int k = 0; k < kLatentInputs; ++k) uniform[k] = uniform_number<R>(layout, k, p.constant[k]);
  }
  // What follows are groups of the unit that begins with element `first`.
  __device__ __forceinline__ void begin_unit(const Layout<kSlots>& layout, int64_t first) {
    if constexpr (kOnlyDense) {
      if (!layout.units_differ) return;
      ELBO_UNROLL
      for (int k = 0; k < kLatentInputs; ++k)
        if (may_be_per_unit(k) && layout.place[k] == kPerUnit) uniform[k] = per_unit<R>(layout, k, first);
    }
  }
  __device__ __forceinline__ void read(const Layout<kSlots>& layout, int64_t group, unsigned mask,
                                       Pack<R, kGroup<R>> (&in)[kLatentInputs]) const {
    Group<R, kSlots, kOnlyDense> reader[kLatentInputs];
    ELBO_UNROLL
    for (int k = 0; k < kLatentInputs; ++k) reader[k].begin(layout, k, group, mask);
    ELBO_UNROLL
    for (int k = 0; k < kLatentInputs; ++k) reader[k].finish(layout, k, mask, in[k].x, uniform[k]);
  }
};

// ---- backward ----

// The slots of a backward kernel after the inputs and the noise; the gradients of the results other than z come last, from
// kUpstream on.
struct BackwardSlots {
  static constexpr int kGradZ = kNoise + 1, kFirstSink = kGradZ + 1, kNoiseGradient = kFirstSink + kLatentInputs,
                       kUpstream = kNoiseGradient + 1;
};

// What a gather reads: the inputs, the noise, and the gradients of z and of the other results; the element's number; and
// the gradient that it makes.
template <int kUpstreams>
struct GatherSlots {
  static constexpr int kGradZ = kNoise + 1, kUpstream = kGradZ + 1, kNumber = kUpstream + kUpstreams, kSlots = kNumber + 2,
                       kSums = kLatentInputs;
};

constexpr unsigned kAllSums = (1u << kLatentInputs) - 1;

// Common is LatentCommon with what a kernel needs of its own.
template <int kUpstreams, class Common>
struct BackwardParams {
  Layout<BackwardSlots::kUpstream + kUpstreams> layout;
  Units units;
  SumPlan<kLatentInputs> sums;
  Common common;
  int64_t noise_gradient_step;
};

// From the derivatives of the KL, times its upstream gradient, to those of both.
template <class T>
__device__ __forceinline__ void add_samples(const ScaleForm<Real<T>>& form, const T& scale, const T& sum_g, const T& sum_g_eps, T* d) {
  d[kMu] = d[kMu] + sum_g;  // dz/dmu = 1
  const T sigma = standard_deviation(form, scale);
  d[kScale] = d[kScale] + sum_g_eps * standard_deviation_slope(form, scale, sigma);  // dz/dscale = eps dsigma/dscale
}

// The gradients of a group of elements: stored one by one, or added up.
template <class Reader, class R, int kSlots>
__device__ __forceinline__ void deliver(const Layout<kSlots>& layout, const SumPlan<kLatentInputs>& sums, int64_t group,
                                        unsigned mask, Pack<R, kGroup<R>> (&d)[kLatentInputs],
                                        double (&sum)[kLatentInputs]) {
  ELBO_UNROLL
  for (int k = 0; k < kLatentInputs; ++k) {
    if (layout.place[BackwardSlots::kFirstSink + k] != kAbsent) {
      Reader::store(layout, BackwardSlots::kFirstSink + k, group, mask, d[k].x);
    } else if (sums.kind[k] != kNoSum) {
      ELBO_UNROLL
      for (int i = 0; i < kGroup<R>; ++i) d[k].x[i] = mask >> i & 1 ? d[k].x[i] : R(0);
      sum[k] += static_cast<double>(sum_of(d[k]));
    }
  }
}

// ---- on the host ----

LatentCommon common_of(const LatentProblem& p, bool with_kl) {
  LatentCommon common{};
  common.forms = p.forms;
  common.with_kl = with_kl;
  common.samples = p.samples;
  common.elements = p.space.elements();
  common.makes_noise = p.seed != nullptr;
  common.seed = p.seed_on_host ? nullptr : p.seed;
  common.seed_number = p.seed_on_host ? *p.seed : 0;
  common.noise_step = p.noise_sample_stride;
  for (int k = 0; k < kLatentInputs; ++k) common.constant[k] = p.input[k].constant;
  return common;
}

// What the kernels for dense tensors take as one number for each unit.
inline std::vector<const View*> scales_of(const LatentProblem& p) { return {&p.input[kScale], &p.input[kPriorScale]}; }

// Whether the kernels for dense tensors serve: segments of whole groups, vectors everywhere, the noise from a seed.
template <class R, int kSlots>
bool is_dense(const Layout<kSlots>& layout, const LatentProblem& p, int64_t segment) {
  bool fits = p.seed != nullptr && segment % kGroup<R> == 0;
  for (int slot = 0; slot < kSlots; ++slot)
    fits = fits && is_dense(layout.place[slot]) && (layout.place[slot] != kPerUnit || may_be_per_unit(slot));
  return fits;
}

// What a problem is run with, and how many of its blocks a multiprocessor holds.
template <class Params>
struct Kernel {
  void (*function)(Params);
  int resident;
};

// Calls what_for(form class) if the forms are of one class, which kernels for float32 may be compiled for.
template <class WhatFor>
auto with_form_class(const LatentProblem& p, WhatFor&& what_for) {
  if (LatentForms::form_class(p.forms) == 0) return what_for(std::integral_constant<int, 0>{});
  return what_for(std::integral_constant<int, 1>{});
}

// The fast path: one sample, in which mu and the scale, and with them all that is read or written element by element, are
// contiguous and of one dtype, float32 or bfloat16; the prior is one number, and so is the upstream gradient of a unit.
// `others`: the slots after the noise.
template <int kSlots>
bool takes_fast_path(const Layout<kSlots>& layout, const LatentProblem& p, std::initializer_list<int> others) {
  const DType dtype = layout.array[kMu].dtype;
  bool fits = p.samples == 1 && LatentForms::form_class(p.forms) != kAnyForms &&
              (dtype == DType::kFloat || dtype == DType::kBFloat16);
  const auto check = [&](int slot) {
    fits = fits && layout.place[slot] == kContiguous && layout.array[slot].dtype == dtype;
  };
  check(kMu);
  check(kScale);
  for (int slot : others)
    if (layout.place[slot] != kAbsent) check(slot);
  return fits && layout.place[kPriorMu] <= kUniform && layout.place[kPriorScale] <= kUniform;
}

// Calls what_for(dtype, with a KL, form class) for a problem on the fast path.
template <class WhatFor>
auto with_fast_path(const LatentProblem& p, DType dtype, bool with_kl, WhatFor&& what_for) {
  return with_form_class(p, [&](auto form_class) {
    const auto of_dtype = [&](auto constant) {
      return with_kl ? what_for(constant, std::true_type{}, form_class) : what_for(constant, std::false_type{}, form_class);
    };
    if (dtype == DType::kFloat) return of_dtype(std::integral_constant<DType, DType::kFloat>{});
    return of_dtype(std::integral_constant<DType, DType::kBFloat16>{});
  });
}

// The kernel for dense tensors and a class of forms, or for anything: kernel_for(dense, form_class) names it, given
// constants.
template <class R, class KernelFor>
auto choose_kernel(bool dense, const LatentProblem& p, KernelFor&& kernel_for) {
  if constexpr (sizeof(R) == 4)
    if (dense && LatentForms::form_class(p.forms) != kAnyForms)
      return with_form_class(p, [&](auto form_class) { return kernel_for(std::true_type{}, form_class); });
  return kernel_for(std::false_type{}, std::integral_constant<int, kAnyForms>{});
}

// The gradients of the results other than z, and the distances of their samples.
template <int kUpstreams>
struct Upstreams {
  const View* view[kUpstreams];
  int64_t step[kUpstreams];
};

// Runs the backward kernel that kernel_of(layout, dense) names. It makes the gradients but those that are to be gathered.
template <class R, int kUpstreams, class Common, class KernelOf>
const char* run_elements(const Common& common, const LatentProblem& p, const Dimensions& dims, const SinkPlan& sinks,
                         const Upstreams<kUpstreams>& upstream, const CudaCall& call, KernelOf&& kernel_of) {
  using S = BackwardSlots;
  BackwardParams<kUpstreams, Common> params{};
  params.common = common;
  params.noise_gradient_step = p.noise_gradient_sample_stride;

  std::vector<const View*> slowly_varying = scales_of(p);
  slowly_varying.insert(slowly_varying.end(), upstream.view, upstream.view + kUpstreams);
  const bool by_run = !sinks.by_run().empty();
  const int64_t segment = segment_length(sinks.segment(), dims, slowly_varying, /*in_order=*/false, /*many_sums=*/by_run);

  LayoutBuilder<S::kUpstream + kUpstreams> layout(params.layout, dims, segment, kGroup<R>, p.compute_double);
  for (int k = 0; k < kLatentInputs; ++k) {
    layout.set(k, p.input[k]);
    if (p.gradient[k].wanted() && !p.gradient[k].summed) layout.set(S::kFirstSink + k, p.gradient[k], /*written=*/true);
  }
  layout.set(kNoise, p.noise, /*written=*/false, p.noise_sample_stride);
  layout.set(S::kGradZ, p.grad_z, /*written=*/false, p.grad_z_sample_stride);
  layout.set(S::kNoiseGradient, p.noise_gradient, /*written=*/true, p.noise_gradient_sample_stride);
  bool dense = is_dense<R>(params.layout, p, segment);
  for (int k = 0; k < kUpstreams; ++k) {
    layout.set(S::kUpstream + k, *upstream.view[k], /*written=*/false, upstream.step[k]);
    const Place place = params.layout.place[S::kUpstream + k];
    dense = dense && (place <= kUniform || place == kPerUnit);
  }

  const Kernel<BackwardParams<kUpstreams, Common>> kernel = kernel_of(params.layout, dense);
  Work<kLatentInputs> work(params.units, params.sums, dims, segment, by_run, kGroup<R>, kernel.resident, call);
  work.add_gradients(sinks, p.gradient);
  return work.run(any_written(params.layout, S::kFirstSink, S::kUpstream), [&] {
    return launch(kernel.function, dim3(static_cast<unsigned>(work.blocks())), kThreads, params, call);
  });
}

inline bool depends_on_samples(const LatentProblem& p) { return p.grad_z.present() || p.with_log_prob; }

// Gathers gradients. Evaluate reads what the backward kernel reads, and after it the number of the element among all
// samples, which says its noise: of a view that is there for its strides alone.
template <class Evaluate, int kUpstreams, class Common>
const char* gather_gradients(const Common& common, const LatentProblem& p, const Dimensions& dims, std::vector<int> sinks,
                             const Upstreams<kUpstreams>& upstream, const CudaCall& call) {
  char anything;
  View number = dense_view(&anything, DType::kFloat);
  int64_t stride = 1;
  for (int dim = p.space.col_dims - 1; dim >= 0; stride *= p.space.col_size[dim--]) number.col_stride[dim] = stride;
  typename Evaluate::Params g{};
  g.common = common;
  const View* view[Evaluate::kSlots] = {&p.input[0], &p.input[1], &p.input[2], &p.input[3], &p.noise, &p.grad_z};
  std::copy_n(upstream.view, kUpstreams, view + Evaluate::kUpstream);
  view[Evaluate::kNumber] = &number;

  GatherDimension<Evaluate::kSlots> samples{p.samples, {}};
  samples.stride[kNoise] = p.noise_sample_stride;
  samples.stride[Evaluate::kGradZ] = p.grad_z_sample_stride;
  std::copy_n(upstream.step, kUpstreams, samples.stride + Evaluate::kUpstream);
  samples.stride[Evaluate::kNumber] = p.space.elements();

  // The KL has no samples, and nothing but the KL has a gradient of its prior.
  const auto kl_alone = std::stable_partition(sinks.begin(), sinks.end(), [&](int k) {
    return depends_on_samples(p) && (k <= kScale || p.with_log_prob);
  });
  const char* error = gather_sinks<Evaluate>(g, view, p.gradient, dims, {sinks.begin(), kl_alone}, call, {samples});
  if (error == nullptr) error = gather_sinks<Evaluate>(g, view, p.gradient, dims, {kl_alone, sinks.end()}, call);
  return error;
}

// With many samples of few elements, the backward kernel, in which one thread adds up all samples of an element, would
// leave most of the device idle. A gather shares the samples out, but makes each normal by itself.
constexpr int64_t kManySamples = 8;
inline bool gathers_all(const LatentProblem& p, int64_t per_thread, int device) {
  const bool few_elements = p.space.elements() / per_thread * kManySamples < multiprocessors(device) * kBusyThreads;
  return depends_on_samples(p) && p.samples >= kManySamples && few_elements && p.noise_gradient.data == nullptr;
}

template <class R, class Evaluate, int kUpstreams, class Common, class KernelOf>
const char* run_backward(const Common& common, const LatentProblem& p, const Upstreams<kUpstreams>& upstream,
                         const CudaCall& call, KernelOf&& kernel_of) {
  const Dimensions dims(p.space);
  if (gathers_all(p, kGroup<R>, call.device)) {
    std::vector<int> all;
    for (int k = 0; k < kLatentInputs; ++k)
      if (p.gradient[k].wanted()) all.push_back(k);
    return gather_gradients<Evaluate>(common, p, dims, std::move(all), upstream, call);
  }
  const SinkPlan sinks(dims, p.gradient, p.space.elements());
  if (const char* error = run_elements<R>(common, p, dims, sinks, upstream, call, kernel_of)) return error;
  return gather_gradients<Evaluate>(common, p, dims, sinks.gathered(), upstream, call);
}

}  // namespace
}  // namespace elbo_ext
