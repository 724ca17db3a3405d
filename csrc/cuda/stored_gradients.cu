// The multiplication of gradients that the forward pass has stored.
#include "entries.h"
#include "plan.h"

namespace elbo_ext {
namespace {

struct StoredParams {
  int count;
  Array gradient[kMaxOperands];
  int64_t numel[kMaxOperands];
  bool vectors[kMaxOperands];
  Array grad_loss, grad_log_likelihood, grad_kl, kl_factor, kl_gradient;
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

constexpr int kBlocks = 4;  // that a multiprocessor holds

// Everything in one launch. The gradients are read only if the factor is not 1, which it is in most training loops.
__global__ void __launch_bounds__(kThreads, kBlocks) stored_kernel(const __grid_constant__ StoredParams p) {
  const auto number = [](const Array& scalar) { return scalar.data == nullptr ? 0.0 : read<double>(scalar, 0); };
  const double grad_loss = number(p.grad_loss);
  if (p.kl_gradient.data != nullptr && blockIdx.x == 0 && threadIdx.x == 0)
    write(p.kl_gradient, 0, number(p.kl_factor) * (p.beta * grad_loss + number(p.grad_kl)));
  const double factor = grad_loss - number(p.grad_log_likelihood);
  if (factor == 1.0) return;
  for (int i = 0; i < p.count; ++i) {
    if (p.gradient[i].dtype == DType::kDouble) multiply<double>(p.gradient[i], p.numel[i], p.vectors[i], factor);
    else multiply<float>(p.gradient[i], p.numel[i], p.vectors[i], static_cast<float>(factor));
  }
}

}  // namespace

const char* stored_gradients(const StoredGradients& p, const CudaCall& call) {
  const auto array = [](const ScalarRef& scalar) { return Array{as_bytes(scalar.data), scalar.dtype}; };
  StoredParams params{};
  params.count = p.count;
  params.grad_loss = array(p.grad_loss);
  params.grad_log_likelihood = array(p.grad_log_likelihood);
  params.grad_kl = array(p.grad_kl);
  params.kl_factor = array(p.kl_factor);
  params.kl_gradient = {as_bytes(p.kl_gradient), p.kl_factor.dtype};
  params.beta = p.beta;
  int64_t longest = 0;
  for (int i = 0; i < p.count; ++i) {
    params.gradient[i] = {as_bytes(p.gradient[i].data), p.gradient[i].dtype};
    params.numel[i] = p.gradient[i].numel;
    params.vectors[i] = aligned(p.gradient[i].data, p.gradient[i].dtype, 4);
    longest = std::max(longest, p.gradient[i].numel);
  }
  // One wave: mostly there is nothing to do, and each block costs its start.
  const int64_t most = multiprocessors(call.device) * kBlocks;
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(divide_up(longest, 4 * kThreads), 1, most)));
  return launch(stored_kernel, grid, kThreads, params, call);
}

}  // namespace elbo_ext
