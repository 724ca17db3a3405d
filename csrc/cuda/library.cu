// The table of functions that the CUDA library hands to the operators, and the kernels that take no part in a space of
// operands: normal noise, the importance-weighted bound, and the multiplication of stored gradients.
#include <string>

#include "entries.h"
#include "noise.cuh"
#include "plan.h"

namespace elbo_ext {
namespace {

// ---- normal noise ----

template <class R>
__global__ void __launch_bounds__(kThreads) noise_kernel(const __grid_constant__ NoiseProblem p) {
  // Four normals for each counter; the first and the last counter of a row may be used in part.
  const int64_t first_counter = p.first / kNormalsPerCounter;
  const int64_t counters = (p.first + p.count + kNormalsPerCounter - 1) / kNormalsPerCounter - first_counter;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const uint64_t seed = static_cast<uint64_t>(p.seed[row]);
    R* out = static_cast<R*>(p.out) + row * p.count;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < counters;
         i += static_cast<int64_t>(gridDim.x) * kThreads) {
      const uint64_t counter = static_cast<uint64_t>(first_counter + i);
      R normal[kNormalsPerCounter];
      whole_group(seed, counter, normal);
      const int64_t at = static_cast<int64_t>(counter) * kNormalsPerCounter - p.first;
      ELBO_UNROLL
      for (int j = 0; j < kNormalsPerCounter; ++j)
        if (at + j >= 0 && at + j < p.count) out[at + j] = normal[j];
    }
  }
}

const char* normal_noise(const NoiseProblem& p, const CudaCall& call) {
  const OnDevice guard(call.device);
  if (const char* error = guard.error()) return error;
  const int64_t most = multiprocessors(call.device) * kBlocksPerMultiprocessor;
  const int64_t blocks = std::clamp<int64_t>(divide_up(p.count / kNormalsPerCounter + 2, kThreads), 1, most);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min<int64_t>(p.rows, 65535)));
  return p.compute_double ? launch(noise_kernel<double>, grid, kThreads, p, call)
                          : launch(noise_kernel<float>, grid, kThreads, p, call);
}

// ---- the importance-weighted bound ----

// A block has `columns` examples side by side, neighbours in memory, and shares the samples of each among the threads that
// are left, so that few examples of many samples fill a block as well as many of few; but they do not fill a device, as the
// samples of one example never leave their block.
struct ImportanceParams {
  int columns;
  double log_samples;
  ImportanceProblem problem;
};

// Combines the numbers of the threads of a column, for all of them.
template <class R, class Combine>
__device__ __forceinline__ R over_column(R number, int columns, double* of_thread, Combine&& combine) {
  __syncthreads();  // the numbers before these have been read
  of_thread[threadIdx.x] = number;
  for (int half = kThreads / 2; half >= columns; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
      of_thread[threadIdx.x] = combine(static_cast<R>(of_thread[threadIdx.x]), static_cast<R>(of_thread[threadIdx.x + half]));
  }
  __syncthreads();
  return static_cast<R>(of_thread[threadIdx.x % columns]);
}

template <class R>
__global__ void __launch_bounds__(kThreads, 4) importance_kernel(const __grid_constant__ ImportanceParams p) {
  __shared__ double of_thread[kThreads];
  const ImportanceProblem& q = p.problem;
  const int64_t example = static_cast<int64_t>(blockIdx.x) * p.columns + threadIdx.x % p.columns;
  const bool inside = example < q.examples;
  const int64_t rows = kThreads / p.columns, row = threadIdx.x / p.columns;
  const R* const log_weights = static_cast<const R*>(q.log_weights) + example;
  R* const weights = static_cast<R*>(q.weights) + example;
  const auto for_each = [&](auto&& body) {
    if (inside)
      for (int64_t sample = row; sample < q.samples; sample += rows) body(sample * q.examples);
  };

  R largest = -std::numeric_limits<R>::infinity();
  for_each([&](int64_t at) { largest = larger(log_weights[at], largest); });
  const R reference =
      finite_reference(over_column(largest, p.columns, of_thread, [](R a, R b) { return larger(a, b); }));
  double in_double = 0.0;
  for_each([&](int64_t at) { in_double += static_cast<double>(exp(log_weights[at] - reference)); });
  const R sum = static_cast<R>(over_column(in_double, p.columns, of_thread, [](double a, double b) { return a + b; }));
  if (inside && row == 0)
    static_cast<R*>(q.bound)[example] = log_mean_weight(sum, reference, static_cast<R>(p.log_samples));
  if (q.weights == nullptr) return;
  const R over_sum = normalizer(sum);
  for_each([&](int64_t at) { weights[at] = exp(log_weights[at] - reference) * over_sum; });
}

const char* importance(const ImportanceProblem& p, const CudaCall& call) {
  const OnDevice guard(call.device);
  if (const char* error = guard.error()) return error;
  const int columns = static_cast<int>(std::min<int64_t>(std::bit_ceil(static_cast<uint64_t>(p.examples)), kWarp));
  const dim3 blocks(static_cast<unsigned>(divide_up(p.examples, columns)));
  const ImportanceParams params{columns, std::log(static_cast<double>(p.samples)), p};
  return p.compute_double ? launch(importance_kernel<double>, blocks, kThreads, params, call)
                          : launch(importance_kernel<float>, blocks, kThreads, params, call);
}

// ---- stored gradients ----

struct StoredParams {
  int count;
  Array gradient[kMaxOperands];
  int64_t numel[kMaxOperands];
  bool vectors[kMaxOperands];
  Array grad_loss, grad_log_likelihood, grad_kl, of_kl, kl_gradient;
  double beta;
};

template <class R>
__device__ __forceinline__ void multiply(const Array& array, int64_t numel, bool vectors, R factor) {
  constexpr int kWidth = 4;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t in_vectors = vectors ? numel / kWidth * kWidth : 0;
  for (int64_t n = thread * kWidth; n < in_vectors; n += threads * kWidth) {
    R x[kWidth];
    convert<R, kWidth>(load<R, kWidth>(array, n), array.dtype, x);
    ELBO_UNROLL
    for (int i = 0; i < kWidth; ++i) x[i] *= factor;
    store_vector<R, kWidth>(array, n, x);
  }
  for (int64_t n = in_vectors + thread; n < numel; n += threads) {
    R x;
    convert<R, 1>(load<R, 1>(array, n), array.dtype, &x);
    x *= factor;
    store_vector<R, 1>(array, n, &x);
  }
}

// Everything in one launch. The gradients are read only if the factor is not 1, which it is in most training loops.
__global__ void __launch_bounds__(kThreads) stored_kernel(const __grid_constant__ StoredParams p) {
  const auto number = [](const Array& of) { return of.data == nullptr ? 0.0 : read<double>(of, 0); };
  const double grad_loss = number(p.grad_loss);
  if (p.kl_gradient.data != nullptr && blockIdx.x == 0 && threadIdx.x == 0)
    write(p.kl_gradient, 0, number(p.of_kl) * (p.beta * grad_loss + number(p.grad_kl)));
  const double factor = grad_loss - number(p.grad_log_likelihood);
  if (factor == 1.0) return;
  for (int i = 0; i < p.count; ++i) {
    if (p.gradient[i].dtype == DType::kDouble) multiply<double>(p.gradient[i], p.numel[i], p.vectors[i], factor);
    else multiply<float>(p.gradient[i], p.numel[i], p.vectors[i], static_cast<float>(factor));
  }
}

const char* stored_gradients(const StoredGradients& p, const CudaCall& call) {
  const OnDevice guard(call.device);
  if (const char* error = guard.error()) return error;
  const auto array = [](const Number& number) { return Array{as_bytes(number.data), number.dtype}; };
  StoredParams params{};
  params.count = p.count;
  params.grad_loss = array(p.grad_loss);
  params.grad_log_likelihood = array(p.grad_log_likelihood);
  params.grad_kl = array(p.grad_kl);
  params.of_kl = array(p.of_kl);
  params.kl_gradient = {as_bytes(p.kl_gradient), p.of_kl.dtype};
  params.beta = p.beta;
  int64_t longest = 0;
  for (int i = 0; i < p.count; ++i) {
    params.gradient[i] = {as_bytes(p.gradient[i].data), p.gradient[i].dtype};
    params.numel[i] = p.gradient[i].numel;
    params.vectors[i] = aligned(p.gradient[i].data, p.gradient[i].dtype, 4);
    longest = std::max(longest, p.gradient[i].numel);
  }
  const int64_t most = multiprocessors(call.device) * kBlocksPerMultiprocessor;
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(divide_up(longest, 4 * kThreads), 1, most)));
  return launch(stored_kernel, grid, kThreads, params, call);
}

// ---- the driver ----

// Code of one generation of CUDA runs with the drivers of that generation and later ones (minor versions do not matter).
const char* driver_complaint() {
  int driver = 0, runtime = 0;  // 13020 is CUDA 13.2
  if (message(cudaDriverGetVersion(&driver)) != nullptr || message(cudaRuntimeGetVersion(&runtime)) != nullptr) return nullptr;
  if (driver == 0 || driver / 1000 >= runtime / 1000) return nullptr;
  static std::string sentence;
  sentence = "it was built with CUDA " + std::to_string(runtime / 1000) + " and needs an NVIDIA driver of that generation, but the driver here is of CUDA " +
             std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  return sentence.c_str();
}

// ---- the table ----

// Of the two functions, one for each compute type, the one that a problem asks for.
template <class Problem>
using Function = const char*(const Problem&, const CudaCall&);
template <class Problem, Function<Problem> of_float, Function<Problem> of_double>
const char* by_type(const Problem& p, const CudaCall& call) {
  const OnDevice guard(call.device);
  if (const char* error = guard.error()) return error;
  return p.compute_double ? of_double(p, call) : of_float(p, call);
}

constexpr CudaKernels kKernels = {
    ELBO_CUDA_ARCHITECTURES,
    driver_complaint,
    by_type<TermSumProblem, term_sum<float>, term_sum<double>>,
    by_type<LatentProblem, latent<float>, latent<double>>,
    by_type<LatentProblem, latent_backward<float>, latent_backward<double>>,
    by_type<LatentProblem, log_prob<float>, log_prob<double>>,
    by_type<LatentProblem, log_prob_backward<float>, log_prob_backward<double>>,
    importance,
    normal_noise,
    stored_gradients,
};

}  // namespace
}  // namespace elbo_ext

extern "C" __attribute__((visibility("default"))) const elbo_ext::CudaKernels* elbo_ext_cuda_kernels(int64_t version) {
  return version == elbo_ext::kCudaVersion ? &elbo_ext::kKernels : nullptr;
}
