// The backward pass where the forward pass has made the gradients: they are multiplied by what comes in. Schema: schema.cpp.
#include <torch/csrc/stable/library.h>

#include "device.h"

namespace elbo_ext {
namespace {

void run(const char* op, const std::vector<Tensor>& gradients, StoredGradients& problem, const Tensor& like) {
  for (const Tensor& gradient : gradients) {
    check_device(op, gradient, like);
    if (gradient.numel() == 0) continue;
    STD_TORCH_CHECK(problem.count < kMaxOperands, "elbo_ext: ", op, " takes at most ", kMaxOperands, " gradients");
    problem.gradient[problem.count++] = {gradient.data_ptr(), dtype_of(gradient), gradient.numel()};
  }
  const Dims shape(1, problem.count);
  device_of(like).stored_gradients({op, shape, like}, problem);
}

// `negated`: the gradients are those of -1 times the value that `factor` is the upstream gradient of.
void scale_gradients_(std::vector<Tensor> gradients, Tensor factor, bool negated) {
  StoredGradients problem;
  (negated ? problem.grad_log_likelihood : problem.grad_loss) = {factor.data_ptr(), dtype_of(factor)};
  run("scale_gradients_", gradients, problem, factor);
}

Tensor elbo_backward(std::vector<Tensor> gradients, Tensor kl_factor, std::optional<Tensor> grad_loss,
                     std::optional<Tensor> grad_log_likelihood, std::optional<Tensor> grad_kl, double beta) {
  StoredGradients problem;
  const auto scalar_in = [&](const Tensor& tensor) -> ScalarRef {
    check_device("elbo_backward", tensor, kl_factor);
    return {tensor.data_ptr(), dtype_of(tensor)};
  };
  if (grad_loss) problem.grad_loss = scalar_in(*grad_loss);
  if (grad_log_likelihood) problem.grad_log_likelihood = scalar_in(*grad_log_likelihood);
  if (grad_kl) problem.grad_kl = scalar_in(*grad_kl);
  problem.beta = beta;
  const Dims shape(kl_factor.sizes().begin(), kl_factor.sizes().end());
  const Tensor result = empty_expanded(shape, dtype_of(kl_factor), kl_factor);
  if (kl_factor.numel() > 0) {
    problem.kl_factor = scalar_in(kl_factor);
    problem.kl_gradient = result.data_ptr();
  }
  run("elbo_backward", gradients, problem, kl_factor);
  return result;
}

void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("scale_gradients_", TORCH_BOX(&scale_gradients_));
  library.impl("elbo_backward", TORCH_BOX(&elbo_backward));
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) { elbo_ext::register_ops(library); }
STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CUDA, library) { elbo_ext::register_ops(library); }
