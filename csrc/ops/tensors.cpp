#include "tensors.h"

#include <algorithm>
#include <numeric>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

namespace elbo_ext {
namespace {

Tensor empty_strided(const Dims& shape, const Dims& strides, ScalarType dtype, const Tensor& like) {
  int32_t device_type = 0, code = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), code, device_type, like.get_device_index(),
                                                         &handle));
  return Tensor(handle);
}

Dims row_major(const Dims& shape) {
  Dims strides(shape.size(), 1);
  for (int64_t i = static_cast<int64_t>(shape.size()) - 2; i >= 0; --i)
    strides[i] = strides[i + 1] * std::max<int64_t>(shape[i + 1], 1);
  return strides;
}

}  // namespace

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    case ScalarType::Bool: return DType::kBool;
    default: STD_TORCH_CHECK(false, "elbo_ext: unsupported dtype; float32, float64, bfloat16 or float16 expected");
  }
}

int64_t numel_of(const Dims& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
}

bool any_double(const std::vector<const Tensor*>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor* tensor) { return tensor->scalar_type() == ScalarType::Double; });
}

Tensor empty(const Dims& shape, ScalarType dtype, const Tensor& like) {
  return empty_strided(shape, row_major(shape), dtype, like);
}

Tensor empty_like(const Tensor& like, std::optional<ScalarType> dtype) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(like),         from(dtype),        from(std::nullopt),
                          from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void fill_with_zeros(const Tensor& tensor) {
  Tensor same = tensor;
  torch::stable::zero_(same);
}

void set_view(View& view, const Tensor& tensor) {
  view.data = tensor.data_ptr();
  view.dtype = dtype_of(tensor);
}

}  // namespace elbo_ext
