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

void scale_gradients_(std::vector<Tensor> gradients, Tensor factor) {
  StoredGradients problem;
  problem.grad_loss = {factor.data_ptr(), dtype_of(factor)};
  run("scale_gradients_", gradients, problem, factor);
}

Tensor elbo_backward(std::vector<Tensor> gradients, Tensor of_kl, std::optional<Tensor> grad_loss,
                     std::optional<Tensor> grad_log_likelihood, std::optional<Tensor> grad_kl, double beta) {
  StoredGradients problem;
  const auto number_in = [&](const Tensor& tensor) -> Number {
    check_device("elbo_backward", tensor, of_kl);
    return {tensor.data_ptr(), dtype_of(tensor)};
  };
  if (grad_loss) problem.grad_loss = number_in(*grad_loss);
  if (grad_log_likelihood) problem.grad_log_likelihood = number_in(*grad_log_likelihood);
  if (grad_kl) problem.grad_kl = number_in(*grad_kl);
  problem.beta = beta;
  const Tensor result = empty_expanded(Dims(of_kl.sizes().begin(), of_kl.sizes().end()), dtype_of(of_kl), of_kl);
  if (of_kl.numel() > 0) {
    problem.of_kl = number_in(of_kl);
    problem.kl_gradient = result.data_ptr();
  }
  run("elbo_backward", gradients, problem, of_kl);
  return result;
}

void enter(torch::stable::detail::StableLibrary& library) {
  library.impl("scale_gradients_", TORCH_BOX(&scale_gradients_));
  library.impl("elbo_backward", TORCH_BOX(&elbo_backward));
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) { elbo_ext::enter(library); }
STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CUDA, library) { elbo_ext::enter(library); }
