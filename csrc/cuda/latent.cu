// Reparameterized sampling, z = mu + sigma * eps, alone or together with the KL to the prior, and its backward pass.
// Compiled once for each compute type, ELBO_REAL.
#include "entries.h"
#include "latent.cuh"

namespace elbo_ext {
namespace {

// ---- forward ----

constexpr int kZ = kNoise + 1, kForwardSlots = kZ + 1;

struct LatentParams {
  Layout<kForwardSlots> layout;
  Units units;
  SumPlan<1> kl;
  LatentCommon common;
  int64_t z_step;
};

// Of the kernels in this file: how many blocks a multiprocessor holds.
template <class R>
constexpr int kForwardBlocks = sizeof(R) == 8 ? 1 : 2;
constexpr int backward_blocks(bool only_dense) { return only_dense ? 2 : 1; }
constexpr int fast_path_blocks(bool with_kl) { return with_kl ? 3 : 4; }

template <class R, bool kOnlyDense, int kFormClass>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<R>) latent_kernel(const __grid_constant__ LatentParams p) {
  using T = Pack<R, kGroup<R>>;
  using Reader = Group<R, kForwardSlots, kOnlyDense>;
  const LatentCommon& c = p.common;
  const Forms forms{LatentForms::within<kFormClass>(c.forms), c.constant};
  const ScaleForm<R> form(forms, kScale);
  const uint64_t seed = c.the_seed();
  Inputs<R, kForwardSlots, kOnlyDense> inputs(c, p.layout);
  double sum[1] = {};
  for_each_unit<1u>(p.units, p.kl, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    inputs.begin_unit(p.layout, first);
    for (int64_t n = (first / kGroup<R> + lane) * kGroup<R>; n < end; n += lanes * kGroup<R>) {
      const unsigned mask = Reader::members(n, first, end);
      T in[kLatentInputs];
      inputs.read(p.layout, n, mask, in);
      if (c.with_kl && blockIdx.y == 0) {
        T kl = GaussianKL<T>::value(GaussianKL<T>::precompute(in, forms), in);
        ELBO_UNROLL
        for (int i = 0; i < kGroup<R>; ++i) kl.x[i] = mask >> i & 1 ? kl.x[i] : R(0);
        sum[0] += static_cast<double>(sum_of(kl));
      }
      const T sigma = standard_deviation(form, in[kScale]);
      for (int64_t sample = blockIdx.y; sample < c.samples; sample += gridDim.y) {
        T eps;
        noise<kOnlyDense>(c, p.layout, seed, sample, n, mask, eps.x);
        const T z = sigma * eps + in[kMu];
        Reader::store(p.layout, kZ, n, mask, z.x, sample * p.z_step);
      }
    }
  });
  if (blockIdx.y == 0) total_sums<1u>(p.kl, sum);
}

// The fast path (latent.cuh), on which nothing in the loop asks what an operand is.
template <DType dtype, bool kWithKL, int kFormClass>
__global__ void __launch_bounds__(kThreads, fast_path_blocks(kWithKL)) latent_fast_path_kernel(
    const __grid_constant__ LatentParams p) {
  using R = float;
  constexpr int kWidth = kGroup<R>;
  using T = Pack<R, kWidth>;
  const Forms forms{LatentForms::within<kFormClass>(p.common.forms), p.common.constant};
  const ScaleForm<R> form(forms, kScale);
  const uint64_t seed = p.common.the_seed();
  const auto array = [&](int slot) { return Array{p.layout.array[slot].data, dtype}; };
  T in[kLatentInputs];
  ELBO_UNROLL
  for (int k = 0; k < kLatentInputs; ++k) in[k] = T(uniform_number<R>(p.layout, k, p.common.constant[k]));
  const typename GaussianKL<T>::Precomputed prior = GaussianKL<T>::precompute(in, forms);
  double sum[1] = {};
  for_each_unit<1u>(p.units, p.kl, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    for (int64_t n = first + lane * kWidth; n < end; n += lanes * kWidth) {
      const Raw<R, kWidth> mu = load<R, kWidth>(array(kMu), n), scale = load<R, kWidth>(array(kScale), n);
      T eps;
      whole_group(seed, static_cast<uint64_t>(n) / kWidth, eps.x);  // while the loads are in flight
      convert<R, kWidth>(mu, dtype, in[kMu].x);
      convert<R, kWidth>(scale, dtype, in[kScale].x);
      if constexpr (kWithKL) sum[0] += static_cast<double>(sum_of(GaussianKL<T>::value(prior, in)));
      const T z = standard_deviation(form, in[kScale]) * eps + in[kMu];
      store_vector<R, kWidth>(array(kZ), n, z.x);
    }
  });
  if constexpr (kWithKL) total_sums<1u>(p.kl, sum);
}

// ---- backward ----

struct BackwardCommon : LatentCommon {
  bool with_samples;  // there is a gradient of z
  int64_t grad_z_step;
  double upstream_constant, upstream_factor;
  bool scale_needed;
};

using LatentBackwardParams = BackwardParams<1, BackwardCommon>;

template <class R, bool kOnlyDense, int kFormClass>
__global__ void __launch_bounds__(kThreads, backward_blocks(kOnlyDense)) latent_backward_kernel(
    const __grid_constant__ LatentBackwardParams p) {
  using S = BackwardSlots;
  using T = Pack<R, kGroup<R>>;
  using Reader = Group<R, S::kUpstream + 1, kOnlyDense>;
  const BackwardCommon& c = p.common;
  const Forms forms{LatentForms::within<kFormClass>(c.forms), c.constant};
  const ScaleForm<R> form(forms, kScale);
  const uint64_t seed = c.the_seed();
  const bool upstream_per_element = !kOnlyDense && p.layout.place[S::kUpstream] > kUniform;
  R upstream = uniform_upstream<R>(p.layout, S::kUpstream, c.upstream_constant, c.upstream_factor);
  const R uniform_grad_z = uniform_number<R>(p.layout, S::kGradZ, 0.0);
  Inputs<R, S::kUpstream + 1, kOnlyDense> inputs(c, p.layout);
  double sum[kLatentInputs] = {};
  for_each_unit<kAllSums>(p.units, p.sums, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    inputs.begin_unit(p.layout, first);
    if (kOnlyDense && p.layout.place[S::kUpstream] == kPerUnit)
      upstream = per_unit_upstream<R>(p.layout, S::kUpstream, first, c.upstream_factor);
    for (int64_t n = (first / kGroup<R> + lane) * kGroup<R>; n < end; n += lanes * kGroup<R>) {
      const unsigned mask = Reader::members(n, first, end);
      T in[kLatentInputs];
      if (!kOnlyDense) inputs.read(p.layout, n, mask, in);
      double total_g[kGroup<R>] = {}, total_g_eps[kGroup<R>] = {};  // over the samples: there may be many thousands
      if (c.with_samples) {
        for (int64_t sample = 0; sample < c.samples; ++sample) {
          T g, eps;
          Reader reader;
          reader.begin(p.layout, S::kGradZ, n, mask, sample * c.grad_z_step);
          if (c.scale_needed) noise<kOnlyDense>(c, p.layout, seed, sample, n, mask, eps.x);
          reader.finish(p.layout, S::kGradZ, mask, g.x, uniform_grad_z);
          ELBO_UNROLL
          for (int i = 0; i < kGroup<R>; ++i) {
            total_g[i] += static_cast<double>(g.x[i]);
            if (c.scale_needed) total_g_eps[i] += static_cast<double>(g.x[i] * eps.x[i]);
          }
          if (!kOnlyDense && p.layout.place[S::kNoiseGradient] != kAbsent) {
            const T grad_noise = g * standard_deviation(form, in[kScale]);  // dz/deps = sigma
            Reader::store(p.layout, S::kNoiseGradient, n, mask, grad_noise.x, sample * p.noise_gradient_step);
          }
        }
      }
      if (kOnlyDense) inputs.read(p.layout, n, mask, in);  // not before: it takes registers that the samples need
      T sum_g, sum_g_eps;
      ELBO_UNROLL
      for (int i = 0; i < kGroup<R>; ++i) {
        sum_g.x[i] = static_cast<R>(total_g[i]);
        sum_g_eps.x[i] = static_cast<R>(total_g_eps[i]);
      }
      T d[kLatentInputs] = {T(R(0)), T(R(0)), T(R(0)), T(R(0))};
      if (c.with_kl) {
        T grad(upstream);
        if (upstream_per_element) {
          Reader reader;
          reader.begin(p.layout, S::kUpstream, n, mask);
          reader.finish(p.layout, S::kUpstream, mask, grad.x, R(1));
          grad = grad * T(upstream);
        }
        GaussianKL<T>::gradient(GaussianKL<T>::precompute(in, forms), in, d);
        ELBO_UNROLL
        for (int k = 0; k < kLatentInputs; ++k) d[k] = d[k] * grad;
      }
      if (c.with_samples) add_samples(form, in[kScale], sum_g, sum_g_eps, d);
      deliver<Reader>(p.layout, p.sums, n, mask, d, sum);
    }
  });
  total_sums<kAllSums>(p.sums, sum);
}

// The fast path.
template <DType dtype, bool kWithKL, int kFormClass>
__global__ void __launch_bounds__(kThreads, fast_path_blocks(kWithKL)) latent_backward_fast_path_kernel(
    const __grid_constant__ LatentBackwardParams p) {
  using S = BackwardSlots;
  using R = float;
  constexpr int kWidth = kGroup<R>;
  using T = Pack<R, kWidth>;
  const BackwardCommon& c = p.common;
  const Forms forms{LatentForms::within<kFormClass>(c.forms), c.constant};
  const ScaleForm<R> form(forms, kScale);
  const uint64_t seed = c.the_seed();
  const auto array = [&](int slot) { return Array{p.layout.array[slot].data, dtype}; };
  T in[kLatentInputs];
  ELBO_UNROLL
  for (int k = 0; k < kLatentInputs; ++k) in[k] = T(uniform_number<R>(p.layout, k, c.constant[k]));
  const typename GaussianKL<T>::Precomputed prior = GaussianKL<T>::precompute(in, forms);
  T upstream(uniform_upstream<R>(p.layout, S::kUpstream, c.upstream_constant, c.upstream_factor));
  double sum[kLatentInputs] = {};  // none: no gradient of a contiguous tensor is a sum
  for_each_unit<0u>(p.units, p.sums, sum, [&](int64_t first, int64_t end, int64_t lane, int64_t lanes) {
    if (kWithKL && p.layout.place[S::kUpstream] == kPerUnit)
      upstream = T(per_unit_upstream<R>(p.layout, S::kUpstream, first, c.upstream_factor));
    for (int64_t n = first + lane * kWidth; n < end; n += lanes * kWidth) {
      const Raw<R, kWidth> grad_z = load<R, kWidth>(array(S::kGradZ), n), scale = load<R, kWidth>(array(kScale), n);
      if constexpr (kWithKL) convert<R, kWidth>(load<R, kWidth>(array(kMu), n), dtype, in[kMu].x);
      T eps, g, d[kLatentInputs] = {T(R(0)), T(R(0)), T(R(0)), T(R(0))};
      whole_group(seed, static_cast<uint64_t>(n) / kWidth, eps.x);
      convert<R, kWidth>(scale, dtype, in[kScale].x);
      convert<R, kWidth>(grad_z, dtype, g.x);
      if constexpr (kWithKL) {
        GaussianKL<T>::gradient(prior, in, d);
        d[kMu] = d[kMu] * upstream;
        d[kScale] = d[kScale] * upstream;
      }
      add_samples(form, in[kScale], g, g * eps, d);
      ELBO_UNROLL
      for (int k = kMu; k <= kScale; ++k)
        if (p.layout.place[S::kFirstSink + k] == kContiguous) store_vector<R, kWidth>(array(S::kFirstSink + k), n, d[k].x);
    }
  });
}

// The gradients of operands whose elements are shared by elements here and there.
template <class R>
struct GatherLatent : GatherSlots<1> {  // kUpstream: that of the KL
  struct Params {
    Gather<kSlots, kSums> gather;
    BackwardCommon common;
  };

  static __device__ __forceinline__ void add(const Params& p, const int64_t (&offset)[kSlots], double (&sum)[kSums]) {
    const BackwardCommon& c = p.common;
    const GatheredElement<R, kSlots> element{p.gather.layout.array, offset};
    const Forms forms{c.forms, c.constant};
    R x[kLatentInputs], d[kLatentInputs] = {};
    ELBO_UNROLL
    for (int k = 0; k < kLatentInputs; ++k) x[k] = element.number(k, c.constant[k]);
    if (c.with_kl && offset[kNumber] < c.elements) {  // once for all samples
      GaussianKL<R>::gradient(GaussianKL<R>::precompute(x, forms), x, d);
      const R upstream = element.upstream(kUpstream, c.upstream_constant, c.upstream_factor);
      ELBO_UNROLL
      for (int k = 0; k < kLatentInputs; ++k) d[k] *= upstream;
    }
    if (c.with_samples) {
      const R g = element.number(kGradZ);
      R eps = R(0);
      if (p.gather.out[kScale].data != nullptr)
        eps = c.makes_noise ? normal<R>(c.the_seed(), offset[kNumber]) : element.number(kNoise);
      add_samples({forms, kScale}, x[kScale], g, g * eps, d);
    }
    ELBO_UNROLL
    for (int k = 0; k < kLatentInputs; ++k) sum[k] += static_cast<double>(d[k]);
  }
};

// ---- on the host ----

template <class R>
const char* run_forward(const LatentProblem& p, const CudaCall& call) {
  LatentParams params{};
  params.common = common_of(p, /*with_kl=*/p.results == kWithKL);
  params.z_step = p.z_sample_stride;
  const Dimensions dims(p.space);
  // Rows matter only where their sums are asked for.
  const bool by_row = p.kl.row != nullptr;
  const int64_t segment = segment_length(by_row ? p.space.cols : p.space.elements(), dims, scales_of(p), by_row, by_row);

  LayoutBuilder<kForwardSlots> layout(params.layout, dims, segment, kGroup<R>, p.compute_double);
  for (int k = 0; k < kLatentInputs; ++k) layout.set(k, p.input[k]);
  layout.set(kNoise, p.noise, /*written=*/false, p.noise_sample_stride);
  layout.set(kZ, p.z, /*written=*/true, p.z_sample_stride);

  const auto kernel = [&]() -> Kernel<LatentParams> {
    const bool dense = is_dense<R>(params.layout, p, segment);
    if constexpr (sizeof(R) == 4)
      if (dense && takes_fast_path(params.layout, p, {kZ}))
        return with_fast_path(p, params.layout.array[kMu].dtype, params.common.with_kl,
                              [](auto dtype, auto with_kl, auto form_class) -> Kernel<LatentParams> {
          constexpr bool kWithKL = decltype(with_kl)::value;
          return {latent_fast_path_kernel<decltype(dtype)::value, kWithKL, decltype(form_class)::value>,
                  fast_path_blocks(kWithKL)};
        });
    return choose_kernel<R>(dense, p, [](auto dense, auto form_class) -> Kernel<LatentParams> {
      constexpr bool kOnlyDense = decltype(dense)::value;
      return {latent_kernel<R, kOnlyDense, decltype(form_class)::value>, kForwardBlocks<R>};
    });
  }();
  Work<1> work(params.units, params.kl, dims, segment, by_row, kGroup<R>, kernel.resident, call);
  work.add_values(0, p.kl, compute_type(p.compute_double), p.space);

  // Where the elements of one sample do not fill the device, the layers of the grid (its y) share the samples.
  const int64_t most = multiprocessors(call.device) * kBlocksPerMultiprocessor;
  const int64_t layers = std::clamp<int64_t>(most / work.blocks(), 1, std::clamp<int64_t>(p.samples, 1, 65535));
  const dim3 grid(static_cast<unsigned>(work.blocks()), static_cast<unsigned>(layers));
  return work.run(/*writes=*/true, [&] { return launch(kernel.function, grid, kThreads, params, call); });
}

template <class R>
const char* run_backward(const LatentProblem& p, const CudaCall& call) {
  BackwardCommon common{};
  static_cast<LatentCommon&>(common) = common_of(p, p.with_kl);
  common.with_samples = p.grad_z.present();
  common.grad_z_step = p.grad_z_sample_stride;
  common.upstream_constant = p.upstream_kl.constant;
  common.upstream_factor = p.upstream_kl.factor;
  common.scale_needed = p.gradient[kScale].wanted();
  const Upstreams<1> upstream{{&p.upstream_kl}, {0}};
  return run_backward<R, GatherLatent<R>>(common, p, upstream, call, [&](const auto& layout, bool dense) {
    using K = Kernel<LatentBackwardParams>;
    using S = BackwardSlots;
    if constexpr (sizeof(R) == 4)
      if (dense && p.grad_z.present() && p.gradient[kScale].wanted() &&
          takes_fast_path(layout, p, {S::kGradZ, S::kFirstSink + kMu, S::kFirstSink + kScale}))
        return with_fast_path(p, layout.array[kMu].dtype, p.with_kl, [](auto dtype, auto with_kl, auto form_class) -> K {
          constexpr bool kWithKL = decltype(with_kl)::value;
          return {latent_backward_fast_path_kernel<decltype(dtype)::value, kWithKL, decltype(form_class)::value>,
                  fast_path_blocks(kWithKL)};
        });
    return choose_kernel<R>(dense, p, [](auto dense, auto form_class) -> K {
      constexpr bool kOnlyDense = decltype(dense)::value;
      return {latent_backward_kernel<R, kOnlyDense, decltype(form_class)::value>, backward_blocks(kOnlyDense)};
    });
  });
}

}  // namespace

template <>
const char* latent<ELBO_REAL>(const LatentProblem& p, const CudaCall& call) {
  return run_forward<ELBO_REAL>(p, call);
}
template <>
const char* latent_backward<ELBO_REAL>(const LatentProblem& p, const CudaCall& call) {
  return run_backward<ELBO_REAL>(p, call);
}

}  // namespace elbo_ext
