// The backward pass where the forward pass has made the gradients: they are multiplied by what comes in. Schema: schema.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu_run.h"

namespace elbo_ext {
namespace {

constexpr int64_t kLeastElements = 65536;

// Works on memory, whatever the order of the dimensions: the tensors are dense, being our own.
template <class S, class R>
void multiply(const Tensor& tensor, R factor) {
  S* data = static_cast<S*>(tensor.data_ptr());
  torch::stable::parallel_for(0, tensor.numel(), kLeastElements, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[i] = static_cast<S>(static_cast<R>(data[i]) * factor);
  });
}

void multiply_all(const std::vector<Tensor>& gradients, double factor) {
  if (factor == 1.0) return;
  for (const Tensor& gradient : gradients) {
    switch (dtype_of(gradient)) {
      case DType::kDouble: multiply<double>(gradient, factor); break;
      case DType::kFloat: multiply<float>(gradient, static_cast<float>(factor)); break;
      case DType::kBFloat16: multiply<torch::headeronly::BFloat16>(gradient, static_cast<float>(factor)); break;
      default: multiply<torch::headeronly::Half>(gradient, static_cast<float>(factor)); break;
    }
  }
}

void scale_gradients_(std::vector<Tensor> gradients, Tensor factor) { multiply_all(gradients, read_scalar(factor)); }

// loss = beta * kl - log-likelihood, and the gradients at hand are those of -log-likelihood.
Tensor elbo_backward(std::vector<Tensor> gradients, Tensor of_kl, std::optional<Tensor> grad_loss,
                     std::optional<Tensor> grad_log_likelihood, std::optional<Tensor> grad_kl, double beta) {
  const auto number = [](const std::optional<Tensor>& grad) { return grad ? read_scalar(*grad) : 0.0; };
  multiply_all(gradients, number(grad_loss) - number(grad_log_likelihood));
  const Dims shape(of_kl.sizes().begin(), of_kl.sizes().end());
  const double each = numel_of(shape) == 0 ? 0.0 : read_scalar(of_kl);
  return scalar(each * (beta * number(grad_loss) + number(grad_kl)), shape, dtype_of(of_kl), of_kl);
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) {
  library.impl("scale_gradients_", TORCH_BOX(&elbo_ext::scale_gradients_));
  library.impl("elbo_backward", TORCH_BOX(&elbo_ext::elbo_backward));
}
