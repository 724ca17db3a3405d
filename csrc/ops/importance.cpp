// The operator of the importance-weighted bound. Schema: schema.cpp.
#include <torch/csrc/stable/library.h>

#include "device.h"

namespace elbo_ext {
namespace {

std::vector<Tensor> importance_bound(Tensor log_weights, bool with_weights) {
  STD_TORCH_CHECK(log_weights.is_contiguous() && log_weights.dim() > 0 && log_weights.size(0) > 0,
                  "elbo_ext: log_weights is contiguous, [K, ...] with K > 0");
  const DType dtype = dtype_of(log_weights);
  STD_TORCH_CHECK(dtype == DType::kFloat || dtype == DType::kDouble, "elbo_ext: log_weights is float32 or float64");
  const Dims shape(log_weights.sizes().begin(), log_weights.sizes().end());
  std::vector<Tensor> results{empty(Dims(shape.begin() + 1, shape.end()), dtype, log_weights)};
  if (with_weights) results.push_back(empty(shape, dtype, log_weights));
  ImportanceProblem problem;
  problem.compute_double = dtype == DType::kDouble;
  problem.samples = shape[0];
  problem.examples = results[0].numel();
  problem.log_weights = log_weights.data_ptr();
  problem.bound = results[0].data_ptr();
  if (with_weights) problem.weights = results[1].data_ptr();
  if (problem.examples > 0) device_of(log_weights).importance({"importance_bound", shape, log_weights}, problem);
  return results;
}

void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("importance_bound", TORCH_BOX(&importance_bound));
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) { elbo_ext::register_ops(library); }
STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CUDA, library) { elbo_ext::register_ops(library); }
