#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

namespace elbo_ext {
namespace {

int32_t type_of(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

}  // namespace

bool on_cpu(const Tensor& tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  return type_of(tensor) == cpu;
}

const Device& device_of(const Tensor& tensor) {
#if defined(ELBO_EMULATOR)
  return cuda_device();  // on CPU tensors: tests/emulator
#endif
  return on_cpu(tensor) ? cpu_device() : cuda_device();
}

void check_device(const char* op, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(type_of(tensor) == type_of(like) && tensor.get_device_index() == like.get_device_index(), "elbo_ext: ", op,
                  " was given tensors on several devices; one is expected");
}

}  // namespace elbo_ext
