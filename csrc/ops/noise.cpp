// The operators of the noise alone. Schemas: schema.cpp.
#include <torch/csrc/stable/library.h>

#include "device.h"

namespace elbo_ext {
namespace {

Tensor noise(const char* op, NoiseKind kind, const Tensor& seed, int64_t count, bool double_precision, int64_t first) {
  STD_TORCH_CHECK(is_seed(seed) && seed.is_contiguous() && count >= 0 && first >= 0,
                  "elbo_ext: seed is a contiguous int64 tensor, count and first are not negative");
  const Dims shape{seed.numel(), count};
  const Tensor result = empty(shape, compute_type(double_precision), seed);
  if (result.numel() > 0) device_of(seed).noise({op, shape, seed}, kind, seed, first, result);
  return result;
}

Tensor normal_noise(Tensor seed, int64_t count, bool double_precision, int64_t first) {
  return noise("normal_noise", NoiseKind::kNormal, seed, count, double_precision, first);
}
Tensor gumbel_noise(Tensor seed, int64_t count, bool double_precision, int64_t first) {
  return noise("gumbel_noise", NoiseKind::kGumbel, seed, count, double_precision, first);
}

void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("normal_noise", TORCH_BOX(&normal_noise));
  library.impl("gumbel_noise", TORCH_BOX(&gumbel_noise));
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) { elbo_ext::register_ops(library); }
STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CUDA, library) { elbo_ext::register_ops(library); }
