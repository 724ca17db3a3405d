// What the kernels of the latent stage share: the noise, made in registers from (seed, element number) and never stored,
// and how inputs are read.
#pragma once

#include "forms.cuh"
#include "gather.cuh"

namespace elbo_ext {
namespace {

enum Slot { kMu, kScale, kPriorMu, kPriorScale };  // the inputs, as GaussianKL takes them
constexpr int kNoise = kMaxInputs;

// A thread works on 16 bytes of the compute type at a time: on four floats, whose noise comes from one counter, or on
// two doubles, whose noise is half of what a counter gives.
template <class R>
constexpr int kGroup = sizeof(R) == 8 ? 2 : kNormalsPerCounter;

// The words of a counter.
__device__ __forceinline__ void random_words(uint64_t seed, uint64_t counter, uint32_t (&word)[4]) {
  word[0] = static_cast<uint32_t>(counter);
  word[1] = static_cast<uint32_t>(counter >> 32);
  word[2] = word[3] = 0u;
  philox4x32_10(word, seed);
}

// As many normals as `out` has room for, from number `index * room` on.
template <class R>
__device__ __forceinline__ void whole_group(uint64_t seed, uint64_t index, R (&out)[4]) {
  uint32_t word[4];
  random_words(seed, index, word);
  box_muller<R>(word[0], word[1], out[0], out[1]);
  box_muller<R>(word[2], word[3], out[2], out[3]);
}
template <class R>
__device__ __forceinline__ void whole_group(uint64_t seed, uint64_t index, R (&out)[2]) {
  uint32_t word[4];
  random_words(seed, index / 2, word);
  const bool upper = index % 2 != 0;
  box_muller<R>(upper ? word[2] : word[0], upper ? word[3] : word[1], out[0], out[1]);
}

// Normals from number `first` on. Where that is no multiple of the group, as it may be for samples behind the first one,
// they come from two groups.
template <class R, int kRoom>
__device__ __forceinline__ void normals(uint64_t seed, int64_t first, R (&out)[kRoom]) {
  const uint64_t index = static_cast<uint64_t>(first) / kRoom;
  const int skip = static_cast<int>(first % kRoom);
  whole_group(seed, index, out);
  if (skip == 0) return;
  R next[kRoom];
  whole_group(seed, index + 1, next);
  for (int i = 0; i < skip; ++i) {  // moved by one place at a time: registers have no addresses
    ELBO_UNROLL
    for (int j = 0; j + 1 < kRoom; ++j) out[j] = out[j + 1];
    out[kRoom - 1] = next[0];
    ELBO_UNROLL
    for (int j = 0; j + 1 < kRoom; ++j) next[j] = next[j + 1];
  }
}

struct LatentCommon {
  int form, prior_form;
  bool with_kl;
  int64_t samples, elements;  // elements of one sample
  const int64_t* seed;
  int64_t noise_step;  // between samples
  double constant[kMaxInputs];
};

// How a kernel reads: any layout, or dense tensors alone, with the noise from a seed.
template <class R, int kSlots, bool kDense>
using Group = std::conditional_t<kDense, DenseGroup<R, kGroup<R>, kSlots>, AnyGroup<R, kGroup<R>, kSlots>>;

// The noise of a group of elements of one sample. Where the caller gave it, it may be of any dtype.
template <bool kDense, class R, int kSlots>
__device__ __forceinline__ void noise(const LatentCommon& p, const Layout<kSlots>& layout, uint64_t seed, int64_t sample,
                                      int64_t group, unsigned mask, R (&eps)[kGroup<R>]) {
  if (kDense || p.seed != nullptr) return normals(seed, sample * p.elements + group, eps);
  AnyGroup<R, kGroup<R>, kSlots> reader;
  reader.begin(layout, kNoise, group, mask, sample * p.noise_step);
  reader.finish(layout, kNoise, mask, eps, of_all<R>(layout, kNoise, 0.0));
}

// mu and the scale, and with the KL the prior's. Some are one number, for all groups.
template <class R, int kSlots, bool kDense>
struct Inputs {
  R one[kMaxInputs];

  __device__ __forceinline__ Inputs(const LatentCommon& p, const Layout<kSlots>& layout) {
    ELBO_UNROLL
    for (int k = 0; k < kMaxInputs; ++k) one[k] = of_all<R>(layout, k, p.constant[k]);
  }
  __device__ __forceinline__ void read(const Layout<kSlots>& layout, int64_t group, unsigned mask,
                                       Pack<R, kGroup<R>> (&in)[kMaxInputs]) const {
    Group<R, kSlots, kDense> reader[kMaxInputs];
    ELBO_UNROLL
    for (int k = 0; k < kMaxInputs; ++k) reader[k].begin(layout, k, group, mask);
    ELBO_UNROLL
    for (int k = 0; k < kMaxInputs; ++k) reader[k].finish(layout, k, mask, in[k].x, one[k]);
  }
};

// One normal.
template <class R>
__device__ __forceinline__ R normal(int64_t seed, int64_t number) {
  R group[kGroup<R>];
  normals(static_cast<uint64_t>(seed), number, group);
  return group[0];
}

// ---- backward ----

// The first slots of a backward kernel; the gradients of the results behind z follow.
constexpr int kGradZ = kNoise + 1, kFirstSink = kGradZ + 1, kNoiseGradient = kFirstSink + kMaxInputs,
              kUpstream = kNoiseGradient + 1;

constexpr unsigned kAllSums = (1u << kMaxInputs) - 1;

// Kernel adds to LatentCommon what it needs of its own.
template <int kUpstreams, class Common>
struct BackwardParams {
  Layout<kUpstream + kUpstreams> layout;
  Units units;
  SumPlan<kMaxInputs> sums;
  Common common;
  int64_t noise_gradient_step;
};

// The gradients of a group of elements: stored one by one, or added up.
template <class Reader, class R, int kSlots>
__device__ __forceinline__ void deliver(const Layout<kSlots>& layout, const SumPlan<kMaxInputs>& sums, int64_t group,
                                        unsigned mask, Pack<R, kGroup<R>> (&d)[kMaxInputs], double (&sum)[kMaxInputs]) {
  ELBO_UNROLL
  for (int k = 0; k < kMaxInputs; ++k) {
    if (layout.place[kFirstSink + k] != kAbsent) {
      Reader::store(layout, kFirstSink + k, group, mask, d[k].x);
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
  common.form = p.form;
  common.prior_form = p.prior_form;
  common.with_kl = with_kl;
  common.samples = p.samples;
  common.elements = p.space.elements();
  common.seed = p.seed;
  common.noise_step = p.noise_sample_stride;
  for (int k = 0; k < kMaxInputs; ++k) common.constant[k] = p.input[k].constant;
  return common;
}

// Whether the kernels for dense tensors serve: rows of whole groups, vectors everywhere, the noise from a seed.
template <class R, int kSlots>
bool is_dense(const Layout<kSlots>& layout, const LatentProblem& p, int64_t cols) {
  const auto fits = [](Place place) { return place == kAbsent || place == kOne || place == kDense; };
  return p.seed != nullptr && cols % kGroup<R> == 0 && std::all_of(layout.place, layout.place + kSlots, fits);
}

// The kernel for dense tensors and a class of forms, or for anything: kernel_for(dense, forms) names it, given constants.
template <class R, class KernelFor>
auto choose_kernel(bool dense, const LatentProblem& p, KernelFor&& kernel_for) {
  if constexpr (sizeof(R) == 4) {
    const Forms forms = class_of(p.form, p.prior_form);
    if (dense && forms == Forms::kExponential)
      return kernel_for(std::true_type{}, std::integral_constant<Forms, Forms::kExponential>{});
    if (dense && forms == Forms::kDirect)
      return kernel_for(std::true_type{}, std::integral_constant<Forms, Forms::kDirect>{});
  }
  return kernel_for(std::false_type{}, std::integral_constant<Forms, Forms::kAny>{});
}

// Runs a backward kernel, and gathers behind it the gradients that it cannot make. `upstream` are the gradients of the
// results behind z, and `step` the distances of their samples; kernel_of(dense, layout) chooses the kernel. `dense` says so
// of everything but them. Evaluate reads what the kernel reads, and behind it the element's number.
template <class R, class Evaluate, int kUpstreams, class Common, class KernelOf>
const char* run_backward(const Common& common, const LatentProblem& p, const View* const (&upstream)[kUpstreams],
                         const int64_t (&step)[kUpstreams], const CudaCall& call, KernelOf&& kernel_of) {
  BackwardParams<kUpstreams, Common> params{};
  params.common = common;
  params.noise_gradient_step = p.noise_gradient_sample_stride;

  const Dimensions dims(p.space);
  const SinkPlan sinks(dims, p.gradient, p.space.elements());
  const int64_t cols = sinks.row(), rows = p.space.elements() / cols;
  const Spread work = spread(rows, cols, !sinks.by_run().empty(), kGroup<R>, call.device);
  params.units = work.units;

  LayoutBuilder<kUpstream + kUpstreams> layout(params.layout, dims, kGroup<R>, p.compute_double);
  for (int k = 0; k < kMaxInputs; ++k) {
    layout.set(k, p.input[k]);
    if (p.gradient[k].wanted() && !p.gradient[k].summed) layout.set(kFirstSink + k, p.gradient[k], /*written=*/true);
  }
  layout.set(kNoise, p.noise, /*written=*/false, p.noise_sample_stride);
  layout.set(kGradZ, p.grad_z, /*written=*/false, p.grad_z_sample_stride);
  layout.set(kNoiseGradient, p.noise_gradient, /*written=*/true, p.noise_gradient_sample_stride);
  const bool dense = is_dense<R>(params.layout, p, cols);
  for (int k = 0; k < kUpstreams; ++k) layout.set(kUpstream + k, *upstream[k], /*written=*/false, step[k]);

  for (int k = 0; k < kMaxInputs; ++k)
    if (p.gradient[k].wanted() && p.gradient[k].summed && p.gradient[k].numel == 1)
      params.sums.total(k, array_of(p.gradient[k]));
  UnitSums<kMaxInputs> unit_sums(params.sums, work.units, dims, cols, call);
  for (int k : sinks.by_run()) unit_sums.add(k, p.gradient[k]);

  const char* error = prepare_totals(params.sums, work.blocks, call);
  if (error == nullptr)
    error = launch(kernel_of(dense, params.layout), dim3(static_cast<unsigned>(work.blocks)), kThreads, params, call);
  if (error == nullptr) error = unit_sums.finish();
  if (error != nullptr || sinks.gathered().empty()) return error;

  // The number of an element, which says its noise: a view that is there for its strides alone.
  char anything;
  View number = dense_view(&anything, DType::kFloat);
  int64_t stride = 1;
  for (int dim = p.space.col_dims - 1; dim >= 0; stride *= p.space.col_size[dim--]) number.col_stride[dim] = stride;
  typename Evaluate::Params g{};
  g.common = common;
  const View* view[Evaluate::kSlots] = {&p.input[0], &p.input[1], &p.input[2], &p.input[3], &p.noise, &p.grad_z};
  std::copy_n(upstream, kUpstreams, view + Evaluate::kUpstream);
  view[Evaluate::kUpstream + kUpstreams] = &number;
  return gather_sinks<Evaluate>(g, view, p.gradient, dims, sinks.gathered(), call);
}

}  // namespace
}  // namespace elbo_ext
