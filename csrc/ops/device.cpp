#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace elbo_ext {

const Device& device_of(const Tensor& tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type == cpu ? cpu_device() : cuda_device();
}

}  // namespace elbo_ext
