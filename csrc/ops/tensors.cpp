#include "tensors.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

// What went wrong in the call of torch that failed last. Part of torch's stable C interface from 2.13 on; null before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace elbo_ext {
namespace {

// The numbers of the dtypes in the C interface, asked for once, in the order of DType.
int32_t code_of(DType dtype) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16(), aoti_torch_dtype_bool(), aoti_torch_dtype_uint8(),
                                  aoti_torch_dtype_int8(), aoti_torch_dtype_int16(), aoti_torch_dtype_int32(),
                                  aoti_torch_dtype_int64()};
  return codes[static_cast<int>(dtype)];
}

int32_t code_of(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// Asks for huge pages for large fresh memory of the CPU. A result that is written once costs more in page faults than in
// anything else: 4 KB pages one by one take 3 times as long to come as those of 2 MB (benchmarks/NOTES.md). Where the system
// grants none, nothing changes.
constexpr int64_t kHugePage = int64_t{2} << 20, kPage = 4096;

Tensor on_huge_pages(Tensor tensor) {
#if defined(MADV_HUGEPAGE)
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  if (bytes < kHugePage || !tensor.is_cpu()) return tensor;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

// An allocation of torch has ended with `error`. The stable interface loses the type of torch's exception, so that its
// words have to do: programs that look for the largest batch that fits know a failed one by "CUDA out of memory.", or by
// "DefaultCPUAllocator: can't allocate memory". On CUDA torch may as well have met the error of an earlier kernel.
void check_allocation(AOTITorchError error, int64_t ndim, const int64_t* shape, const int64_t* strides, DType dtype,
                      const Tensor& like) {
  if (error == AOTI_TORCH_SUCCESS) return;
  const bool cpu = like.is_cpu();
  const char* words = torch_exception_get_what_without_backtrace != nullptr ? torch_exception_get_what_without_backtrace()
                      : cpu                                                 ? "DefaultCPUAllocator: can't allocate memory"
                                                                            : "CUDA out of memory.";
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16", "bool",
                                      "uint8", "int8", "int16", "int32", "int64"};  // in the order of DType
  double elements = 1.0;  // in double, because the product may be beyond int64
  for (int64_t i = 0; i < ndim; ++i) elements += static_cast<double>(shape[i] - 1) * static_cast<double>(strides[i]);
  const double bytes = elements * static_cast<double>(aoti_torch_dtype_element_size(code_of(dtype)));
  STD_TORCH_CHECK(false, "elbo_ext could not allocate ", bytes / (int64_t{1} << 30), " GiB on ",
                  cpu ? "the CPU" : "CUDA device " + std::to_string(like.get_device_index()), ", for ",
                  names[static_cast<int>(dtype)], " of shape ", text_of(Dims(shape, shape + ndim)),
                  cpu ? ": out of memory. " : ": ", words);
}

Tensor empty_strided(int64_t ndim, const int64_t* shape, const int64_t* strides, DType dtype, const Tensor& like) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  check_allocation(aoti_torch_empty_strided(ndim, shape, strides, code_of(dtype), device_type, like.get_device_index(),
                                            &handle),
                   ndim, shape, strides, dtype, like);
  return on_huge_pages(Tensor(handle));
}

Dims row_major(const Dims& shape) {
  Dims strides(shape.size(), 1);
  for (int64_t i = static_cast<int64_t>(shape.size()) - 2; i >= 0; --i)
    strides[i] = strides[i + 1] * std::max<int64_t>(shape[i + 1], 1);
  return strides;
}

}  // namespace

void check_numbers(int64_t batch_dims, int64_t reduction, const Dims& shape) {
  STD_TORCH_CHECK(kNone <= reduction && reduction <= kMean, "elbo_ext: there is no reduction ", reduction);
  STD_TORCH_CHECK(0 <= batch_dims && batch_dims <= static_cast<int64_t>(shape.size()), "elbo_ext: batch_dims is ",
                  batch_dims, " for ", shape.size(), " dimensions");
}

DType dtype_of(const Tensor& tensor) {
  const int32_t code = code_of(tensor);
  for (int dtype = 0; dtype <= static_cast<int>(DType::kInt64); ++dtype)
    if (code == code_of(static_cast<DType>(dtype))) return static_cast<DType>(dtype);
  STD_TORCH_CHECK(false, "elbo_ext: unsupported dtype; float32, float64, bfloat16 or float16 expected, for data also an integer type");
}

bool is_seed(const Tensor& tensor) {
  return code_of(tensor) == code_of(DType::kInt64);
}

int64_t numel_of(const Dims& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
}

bool is_floating_point(const Tensor& tensor) { return dtype_of(tensor) < DType::kBool; }

std::vector<const Tensor*> leading(const std::vector<const Tensor*>& tensors) {
  std::vector<const Tensor*> with_dims;
  for (const Tensor* tensor : tensors)
    if (tensor->dim() > 0 && is_floating_point(*tensor)) with_dims.push_back(tensor);
  return with_dims.empty() ? tensors : with_dims;
}

bool any_double(const std::vector<const Tensor*>& all) {
  const std::vector<const Tensor*> tensors = leading(all);
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor* tensor) { return code_of(*tensor) == code_of(DType::kDouble); });
}

Tensor empty(const Dims& shape, DType dtype, const Tensor& like) {
  return empty_strided(static_cast<int64_t>(shape.size()), shape.data(), row_major(shape).data(), dtype, like);
}

Tensor empty_expanded(const Dims& shape, DType dtype, const Tensor& like) {
  const Dims strides(shape.size(), 0);
  return empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, like);
}

Tensor empty_like(const Tensor& like, std::optional<DType> dtype) {
  const DType type = dtype ? *dtype : dtype_of(like);
  if (like.is_contiguous())
    return empty_strided(like.dim(), like.sizes().data(), like.strides().data(), type, like);
  using torch::stable::detail::from;
  const ScalarType scalar_type = type == DType::kDouble     ? ScalarType::Double
                                 : type == DType::kFloat    ? ScalarType::Float
                                 : type == DType::kBFloat16 ? ScalarType::BFloat16
                                                            : ScalarType::Half;
  StableIValue stack[] = {from(like), from(std::optional(scalar_type)), from(std::nullopt),
                          from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  const Dims shape(like.sizes().begin(), like.sizes().end());
  check_allocation(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION), like.dim(), shape.data(),
                   row_major(shape).data(), type, like);
  return on_huge_pages(torch::stable::detail::to<Tensor>(stack[0]));
}

void fill_with_zeros(const Tensor& tensor) {
  Tensor same = tensor;
  torch::stable::zero_(same);
}

void set_view(View& view, const Tensor& tensor) {
  view.data = tensor.data_ptr();
  view.dtype = dtype_of(tensor);
}

Tensor empty_values(const Dims& shape, int64_t batch_dims, int64_t reduction, bool compute_double, const Tensor& like) {
  const Dims batch(shape.begin(), shape.begin() + (reduction == kNone ? batch_dims : 0));
  return empty(batch, compute_type(compute_double), like);
}

void set_values(Values& values, const Tensor& result, int64_t reduction, int64_t examples) {
  (reduction == kNone ? values.row : values.total) = result.data_ptr();
  values.divisor = reduction == kMean ? static_cast<double>(examples) : 1.0;
}

void add_upstream(Upstream& upstream, const Tensor& grad, const Dims& shape, int64_t batch_dims, int64_t reduction,
                  SpaceBuilder& builder) {
  Dims strides(shape.size(), 0);
  if (reduction == kNone) {
    STD_TORCH_CHECK(grad.dim() == batch_dims, "elbo_ext: grad has ", grad.dim(), " dimensions, not ", batch_dims);
    for (int64_t i = 0; i < batch_dims; ++i) {
      STD_TORCH_CHECK(grad.size(i) == shape[i], "elbo_ext: grad has the wrong shape");
      if (shape[i] != 1) strides[i] = grad.stride(i);
    }
  } else {
    STD_TORCH_CHECK(grad.numel() == 1, "elbo_ext: grad of a reduced result has one element");
    const Dims batch(shape.begin(), shape.begin() + batch_dims);
    if (reduction == kMean) upstream.factor = 1.0 / static_cast<double>(numel_of(batch));
  }
  set_view(upstream, grad);
  builder.add(upstream, strides);
}

}  // namespace elbo_ext
