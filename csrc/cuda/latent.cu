// Reparameterized sampling, z = mu + sigma * eps, alone or together with the KL to the prior, and its backward pass.
// The noise is made in registers from (seed, element number), here and again in the backward pass; it is never stored.
// Compiled once for each compute type, ELBO_REAL.
#include "entries.h"
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

// ---- forward ----

constexpr int kZ = kNoise + 1, kForwardSlots = kZ + 1;

struct ForwardParams {
  Layout<kForwardSlots> layout;
  Units units;
  SumPlan<1> kl;
  LatentCommon common;
  int64_t z_step;
};

template <class R, bool kDense, Forms forms>
__global__ void __launch_bounds__(kThreads, kDense ? 2 : 1) forward_kernel(const __grid_constant__ ForwardParams p) {
  using T = Pack<R, kGroup<R>>;
  using Reader = Group<R, kForwardSlots, kDense>;
  const LatentCommon& c = p.common;
  const int form = within<forms>(c.form), prior_form = within<forms>(c.prior_form);
  const uint64_t seed = c.seed == nullptr ? 0 : static_cast<uint64_t>(*c.seed);
  const Inputs<R, kForwardSlots, kDense> inputs(c, p.layout);
  double sum[1] = {};
  for_each_unit<1u>(p.units, p.kl, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    for (int64_t n = (first / kGroup<R> + lane) * kGroup<R>; n < end; n += lanes * kGroup<R>) {
      const unsigned mask = Reader::members(n, first, end);
      T in[kMaxInputs];
      inputs.read(p.layout, n, mask, in);
      if (c.with_kl) {
        T kl = GaussianKL<T>::value(GaussianKL<T>::share(in, form, prior_form), in);
        ELBO_UNROLL
        for (int i = 0; i < kGroup<R>; ++i) kl.x[i] = mask >> i & 1 ? kl.x[i] : R(0);
        sum[0] += static_cast<double>(sum_of(kl));
      }
      const T sigma = standard_deviation(form, in[kScale]);
      for (int64_t sample = 0; sample < c.samples; ++sample) {
        T eps;
        noise<kDense>(c, p.layout, seed, sample, n, mask, eps.x);
        const T z = sigma * eps + in[kMu];
        Reader::store(p.layout, kZ, n, mask, z.x, sample * p.z_step);
      }
    }
  });
  total_sums<1u>(p.kl, sum);
}

// ---- backward ----

constexpr int kGradZ = kNoise + 1, kUpstream = kNoise + 2, kFirstSink = kNoise + 3;
constexpr int kNoiseGradient = kFirstSink + kMaxInputs, kBackwardSlots = kNoiseGradient + 1;

constexpr unsigned kAllSums = (1u << kMaxInputs) - 1;

struct BackwardCommon : LatentCommon {
  bool with_samples;  // there is a gradient of z
  int64_t grad_z_step;
  double upstream_constant, upstream_factor;
};

struct BackwardParams {
  Layout<kBackwardSlots> layout;
  Units units;
  SumPlan<kMaxInputs> sums;
  BackwardCommon common;
  int64_t noise_gradient_step;
  bool scale_needed;
};

// From the derivatives of the KL, times its upstream gradient, to those of both.
template <class T>
__device__ __forceinline__ void add_samples(int form, const T& scale, const T& sum_g, const T& sum_g_eps, T* d) {
  d[kMu] = d[kMu] + sum_g;  // dz/dmu = 1
  const T sigma = standard_deviation(form, scale);
  d[kScale] = d[kScale] + sum_g_eps * standard_deviation_slope(form, sigma);  // dz/dscale = eps dsigma/dscale
}

template <class R, bool kDense, Forms forms>
__global__ void __launch_bounds__(kThreads, kDense ? 2 : 1) backward_kernel(
    const __grid_constant__ BackwardParams p) {
  using T = Pack<R, kGroup<R>>;
  using Reader = Group<R, kBackwardSlots, kDense>;
  const BackwardCommon& c = p.common;
  const int form = within<forms>(c.form), prior_form = within<forms>(c.prior_form);
  const uint64_t seed = c.seed == nullptr ? 0 : static_cast<uint64_t>(*c.seed);
  const bool upstream_each = !kDense && p.layout.place[kUpstream] > kOne;
  const R upstream = static_cast<R>(p.layout.place[kUpstream] == kOne
                                        ? read<double>(p.layout.array[kUpstream], 0) * c.upstream_factor
                                    : upstream_each ? c.upstream_factor
                                                    : c.upstream_constant);
  const R grad_z_of_all = of_all<R>(p.layout, kGradZ, 0.0);
  const Inputs<R, kBackwardSlots, kDense> inputs(c, p.layout);
  double sum[kMaxInputs] = {};
  for_each_unit<kAllSums>(p.units, p.sums, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    for (int64_t n = (first / kGroup<R> + lane) * kGroup<R>; n < end; n += lanes * kGroup<R>) {
      const unsigned mask = Reader::members(n, first, end);
      T in[kMaxInputs];
      inputs.read(p.layout, n, mask, in);
      T sum_g(R(0)), sum_g_eps(R(0));
      if (c.with_samples) {
        for (int64_t sample = 0; sample < c.samples; ++sample) {
          T g, eps;
          Reader reader;
          reader.begin(p.layout, kGradZ, n, mask, sample * c.grad_z_step);
          if (p.scale_needed) noise<kDense>(c, p.layout, seed, sample, n, mask, eps.x);
          reader.finish(p.layout, kGradZ, mask, g.x, grad_z_of_all);
          sum_g = sum_g + g;
          if (p.scale_needed) sum_g_eps = sum_g_eps + g * eps;
          if (!kDense && p.layout.place[kNoiseGradient] != kAbsent) {
            const T of_noise = g * standard_deviation(form, in[kScale]);  // dz/deps = sigma
            Reader::store(p.layout, kNoiseGradient, n, mask, of_noise.x, sample * p.noise_gradient_step);
          }
        }
      }
      T d[kMaxInputs] = {T(R(0)), T(R(0)), T(R(0)), T(R(0))};
      if (c.with_kl) {
        T grad(upstream);
        if (upstream_each) {
          Reader reader;
          reader.begin(p.layout, kUpstream, n, mask);
          reader.finish(p.layout, kUpstream, mask, grad.x, R(1));
          grad = grad * T(upstream);
        }
        GaussianKL<T>::gradient(GaussianKL<T>::share(in, form, prior_form), in, d);
        ELBO_UNROLL
        for (int k = 0; k < kMaxInputs; ++k) d[k] = d[k] * grad;
      }
      if (c.with_samples) add_samples(form, in[kScale], sum_g, sum_g_eps, d);
      ELBO_UNROLL
      for (int k = 0; k < kMaxInputs; ++k) {
        if (p.layout.place[kFirstSink + k] != kAbsent) {
          Reader::store(p.layout, kFirstSink + k, n, mask, d[k].x);
        } else if (p.sums.kind[k] != kNoSum) {
          ELBO_UNROLL
          for (int i = 0; i < kGroup<R>; ++i) d[k].x[i] = mask >> i & 1 ? d[k].x[i] : R(0);
          sum[k] += static_cast<double>(sum_of(d[k]));
        }
      }
    }
  });
  total_sums<kAllSums>(p.sums, sum);
}

// The gradients of operands whose elements are shared by elements here and there.
template <class R>
struct GatherLatent {
  // The inputs, noise, gradient of z, upstream gradient of the KL; the element's number; the gradient.
  static constexpr int kNumber = kUpstream + 1, kSlots = kNumber + 2, kSums = kMaxInputs;
  struct Params {
    Gather<kSlots, kSums> gather;
    BackwardCommon common;
  };

  static __device__ __forceinline__ void add(const Params& p, const int64_t (&offset)[kSlots], double (&sum)[kSums]) {
    const BackwardCommon& c = p.common;
    const auto& array = p.gather.layout.array;
    R x[kMaxInputs], d[kMaxInputs] = {};
    ELBO_UNROLL
    for (int k = 0; k < kMaxInputs; ++k)
      x[k] = array[k].data == nullptr ? static_cast<R>(c.constant[k]) : read<R>(array[k], offset[k]);
    if (c.with_kl) {
      GaussianKL<R>::gradient(GaussianKL<R>::share(x, c.form, c.prior_form), x, d);
      const R upstream = static_cast<R>(array[kUpstream].data == nullptr
                                            ? c.upstream_constant
                                            : read<double>(array[kUpstream], offset[kUpstream]) * c.upstream_factor);
      ELBO_UNROLL
      for (int k = 0; k < kMaxInputs; ++k) d[k] *= upstream;
    }
    if (c.with_samples) {
      R sum_g = R(0), sum_g_eps = R(0);
      for (int64_t sample = 0; sample < c.samples; ++sample) {
        const R g = read<R>(array[kGradZ], sample * c.grad_z_step + offset[kGradZ]);
        R eps[kGroup<R>];
        if (c.seed == nullptr) {
          eps[0] = read<R>(array[kNoise], sample * c.noise_step + offset[kNoise]);
        } else {
          const int64_t number = sample * c.elements + offset[kNumber];
          normals(static_cast<uint64_t>(__ldg(c.seed)), number, eps);
        }
        sum_g += g;
        sum_g_eps += g * eps[0];
      }
      add_samples(c.form, x[kScale], sum_g, sum_g_eps, d);
    }
    ELBO_UNROLL
    for (int k = 0; k < kMaxInputs; ++k) sum[k] += static_cast<double>(d[k]);
  }
};

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

template <class R>
auto forward_of(bool dense, Forms forms) -> void (*)(ForwardParams) {
  if constexpr (sizeof(R) == 4) {
    if (dense && forms == Forms::kExponential) return forward_kernel<R, true, Forms::kExponential>;
    if (dense && forms == Forms::kDirect) return forward_kernel<R, true, Forms::kDirect>;
  }
  return forward_kernel<R, false, Forms::kAny>;
}

template <class R>
const char* run_forward(const LatentProblem& p, const CudaCall& call) {
  const bool with_kl = p.results == kWithKL;
  ForwardParams params{};
  params.common = common_of(p, with_kl);
  params.z_step = p.z_sample_stride;
  const Dimensions dims(p.space);
  // Rows matter only where their sums are asked for.
  const bool by_row = with_kl && p.kl.row != nullptr;
  const int64_t cols = by_row ? p.space.cols : p.space.elements(), rows = by_row ? p.space.rows : 1;
  const Spread work = spread(rows, cols, by_row, kGroup<R>, call.device);
  params.units = work.units;

  LayoutBuilder<kForwardSlots> layout(params.layout, dims, kGroup<R>, p.compute_double);
  for (int k = 0; k < kMaxInputs; ++k) layout.set(k, p.input[k]);
  layout.set(kNoise, p.noise, /*written=*/false, p.noise_sample_stride);
  layout.set(kZ, p.z, /*written=*/true, p.z_sample_stride);

  const DType compute = p.compute_double ? DType::kDouble : DType::kFloat;
  UnitSums<1> unit_sums(params.kl, work.units, dims, cols, call);
  if (by_row) unit_sums.add(0, dense_rows(p.kl.row, compute, p.space));
  if (with_kl && p.kl.total != nullptr) params.kl.total(0, {as_bytes(p.kl.total), compute}, p.kl.divisor);
  const char* error = prepare_totals(params.kl, work.blocks, call);
  if (error == nullptr)
    error = launch(forward_of<R>(is_dense<R>(params.layout, p, cols), class_of(p.form, p.prior_form)),
                   dim3(static_cast<unsigned>(work.blocks)), kThreads, params, call);
  return error == nullptr ? unit_sums.finish() : error;
}

template <class R>
const char* gather_sinks(const LatentProblem& p, const BackwardCommon& common, const Dimensions& dims,
                         std::vector<int> sinks, const CudaCall& call) {
  using Evaluate = GatherLatent<R>;
  View number = dense_view(common.elements > 0 ? &number : nullptr, DType::kFloat);  // strides alone
  int64_t stride = 1;
  for (int dim = p.space.col_dims - 1; dim >= 0; stride *= p.space.col_size[dim--]) number.col_stride[dim] = stride;
  while (!sinks.empty()) {
    typename Evaluate::Params g{};
    g.common = common;
    const GradientSink& pattern = p.gradient[sinks.front()];
    const View* const view[Evaluate::kSlots] = {&p.input[0],  &p.input[1],     &p.input[2], &p.input[3], &p.noise,
                                                &p.grad_z,    &p.upstream_kl,  &number,     &pattern};
    for (int k = 0; k <= kUpstream; ++k) g.gather.layout.array[k] = array_of(*view[k]);
    for (int k : sinks)
      if (same_strides(dims, p.gradient[k], pattern)) g.gather.out[k] = array_of(p.gradient[k]);
    std::erase_if(sinks, [&](int k) { return g.gather.out[k].data != nullptr; });
    if (const char* error = gather<Evaluate>(g, gather_dimensions(dims, view), call)) return error;
  }
  return nullptr;
}

template <class R>
auto backward_of(bool dense, Forms forms) -> void (*)(BackwardParams) {
  if constexpr (sizeof(R) == 4) {
    if (dense && forms == Forms::kExponential) return backward_kernel<R, true, Forms::kExponential>;
    if (dense && forms == Forms::kDirect) return backward_kernel<R, true, Forms::kDirect>;
  }
  return backward_kernel<R, false, Forms::kAny>;
}

template <class R>
const char* run_backward(const LatentProblem& p, const CudaCall& call) {
  BackwardParams params{};
  BackwardCommon& common = params.common;
  static_cast<LatentCommon&>(common) = common_of(p, p.with_kl);
  common.with_samples = p.grad_z.present();
  common.grad_z_step = p.grad_z_sample_stride;
  common.upstream_constant = p.upstream_kl.constant;
  common.upstream_factor = p.upstream_kl.factor;
  params.noise_gradient_step = p.noise_gradient_sample_stride;
  params.scale_needed = p.gradient[kScale].wanted();

  const Dimensions dims(p.space);
  const SinkPlan sinks(dims, p.gradient, p.space.elements());
  const int64_t cols = sinks.row(), rows = p.space.elements() / cols;
  const Spread work = spread(rows, cols, !sinks.by_run().empty(), kGroup<R>, call.device);
  params.units = work.units;

  LayoutBuilder<kBackwardSlots> layout(params.layout, dims, kGroup<R>, p.compute_double);
  for (int k = 0; k < kMaxInputs; ++k) {
    layout.set(k, p.input[k]);
    if (p.gradient[k].wanted() && !p.gradient[k].summed) layout.set(kFirstSink + k, p.gradient[k], /*written=*/true);
  }
  layout.set(kNoise, p.noise, /*written=*/false, p.noise_sample_stride);
  layout.set(kGradZ, p.grad_z, /*written=*/false, p.grad_z_sample_stride);
  layout.set(kUpstream, p.upstream_kl);
  layout.set(kNoiseGradient, p.noise_gradient, /*written=*/true, p.noise_gradient_sample_stride);

  for (int k = 0; k < kMaxInputs; ++k)
    if (p.gradient[k].wanted() && p.gradient[k].summed && p.gradient[k].numel == 1)
      params.sums.total(k, array_of(p.gradient[k]));
  UnitSums<kMaxInputs> unit_sums(params.sums, work.units, dims, cols, call);
  for (int k : sinks.by_run()) unit_sums.add(k, p.gradient[k]);

  const char* error = prepare_totals(params.sums, work.blocks, call);
  if (error == nullptr)
    error = launch(backward_of<R>(is_dense<R>(params.layout, p, cols) && params.layout.place[kUpstream] <= kOne,
                                  class_of(p.form, p.prior_form)),
                   dim3(static_cast<unsigned>(work.blocks)), kThreads, params, call);
  if (error == nullptr) error = unit_sums.finish();
  if (error == nullptr) error = gather_sinks<R>(p, common, dims, sinks.gathered(), call);
  return error;
}

}  // namespace

template <>
const char* latent<ELBO_REAL>(const LatentProblem& p, const CudaCall& call) {
  if (p.results >= kPathwise) return "log q and log p have no CUDA kernel yet";
  return run_forward<ELBO_REAL>(p, call);
}
template <>
const char* latent_backward<ELBO_REAL>(const LatentProblem& p, const CudaCall& call) {
  if (p.with_log_prob) return "log q and log p have no CUDA kernel yet";
  return run_backward<ELBO_REAL>(p, call);
}

}  // namespace elbo_ext
