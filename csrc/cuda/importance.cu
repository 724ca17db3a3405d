// The importance-weighted bound, and the normalized weights of the samples. The formulas: terms/importance.h.
#include "entries.h"
#include "plan.h"

namespace elbo_ext {
namespace {

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
__device__ __forceinline__ R over_column(R number, int columns, double* per_thread, Combine&& combine) {
  __syncthreads();  // the numbers before these have been read
  per_thread[threadIdx.x] = number;
  for (int half = kThreads / 2; half >= columns; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
      per_thread[threadIdx.x] =
          combine(static_cast<R>(per_thread[threadIdx.x]), static_cast<R>(per_thread[threadIdx.x + half]));
  }
  __syncthreads();
  return static_cast<R>(per_thread[threadIdx.x % columns]);
}

template <class R>
__global__ void __launch_bounds__(kThreads, 4) importance_kernel(const __grid_constant__ ImportanceParams p) {
  __shared__ double per_thread[kThreads];
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
      finite_reference(over_column(largest, p.columns, per_thread, [](R a, R b) { return larger(a, b); }));
  double in_double = 0.0;
  for_each([&](int64_t at) { in_double += static_cast<double>(exp(log_weights[at] - reference)); });
  const R sum = static_cast<R>(over_column(in_double, p.columns, per_thread, [](double a, double b) { return a + b; }));
  if (inside && row == 0)
    static_cast<R*>(q.bound)[example] = log_mean_weight(sum, reference, static_cast<R>(p.log_samples));
  if (q.weights == nullptr) return;
  const R over_sum = normalizer(sum);
  for_each([&](int64_t at) { weights[at] = exp(log_weights[at] - reference) * over_sum; });
}

}  // namespace

const char* importance(const ImportanceProblem& p, const CudaCall& call) {
  const int columns = static_cast<int>(std::min<int64_t>(std::bit_ceil(static_cast<uint64_t>(p.examples)), kWarp));
  const dim3 blocks(static_cast<unsigned>(divide_up(p.examples, columns)));
  const ImportanceParams params{columns, std::log(static_cast<double>(p.samples)), p};
  return p.compute_double ? launch(importance_kernel<double>, blocks, kThreads, params, call)
                          : launch(importance_kernel<float>, blocks, kThreads, params, call);
}

}  // namespace elbo_ext
