// Gradients that were computed in the forward pass, multiplied by what the backward pass brings. Schema: schema.cpp.
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

void scale_gradients_(std::vector<Tensor> gradients, Tensor factor) {
  const double number = read_scalar(factor);
  if (number == 1.0) return;
  for (const Tensor& gradient : gradients) {
    switch (dtype_of(gradient)) {
      case DType::kDouble: multiply<double>(gradient, number); break;
      case DType::kFloat: multiply<float>(gradient, static_cast<float>(number)); break;
      case DType::kBFloat16: multiply<torch::headeronly::BFloat16>(gradient, static_cast<float>(number)); break;
      default: multiply<torch::headeronly::Half>(gradient, static_cast<float>(number)); break;
    }
  }
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) {
  library.impl("scale_gradients_", TORCH_BOX(&elbo_ext::scale_gradients_));
}
