// Between torch's tensors and the plain numbers of problem.h.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "space.h"

namespace elbo_ext {

using torch::headeronly::ScalarType;
using OptionalTensors = std::vector<std::optional<Tensor>>;

// How a result is reduced over the examples. The numbers are part of the operator schema.
enum Reduction : int64_t {
  kNone = 0,
  kSum = 1,
  kMean = 2
};

// Raises for numbers of the schema, common to the operators over a joint shape, that mean nothing.
void check_numbers(int64_t batch_dims, int64_t reduction, const Dims& shape);

DType dtype_of(const Tensor& tensor);  // raises for any that is none of DType
bool is_seed(const Tensor& tensor);    // int64
int64_t numel_of(const Dims& shape);

bool is_floating_point(const Tensor& tensor);

// Computed in float64 if any of the tensors is, else in float32: half precision is computed and summed in single precision. As
// in torch, a tensor without dimensions does not promote floating-point ones that have some: leading() leaves it out.
bool any_double(const std::vector<const Tensor*>& tensors);
std::vector<const Tensor*> leading(const std::vector<const Tensor*>& tensors);
inline DType compute_type(bool compute_double) { return compute_double ? DType::kDouble : DType::kFloat; }

// Uninitialized and row-major, on the device of `like`.
Tensor empty(const Dims& shape, DType dtype, const Tensor& like);
// Uninitialized: one number that every element of `shape` is.
Tensor empty_expanded(const Dims& shape, DType dtype, const Tensor& like);
// Uninitialized and dense, in the layout of `like`, as torch.empty_like.
Tensor empty_like(const Tensor& like, std::optional<DType> dtype = std::nullopt);

void fill_with_zeros(const Tensor& tensor);

// A view of a tensor for a kernel; strides come with the Space.
void set_view(View& view, const Tensor& tensor);

// The values of a forward pass over a joint shape, as their reduction asks for them, uninitialized.
Tensor empty_values(const Dims& shape, int64_t batch_dims, int64_t reduction, bool compute_double, const Tensor& like);
// ... and as what a kernel writes them: the sum of each row, where nothing is reduced, or of everything.
void set_values(Values& values, const Tensor& result, int64_t reduction, int64_t examples);

// The gradient of such values, as an operand.
void add_upstream(Upstream& upstream, const Tensor& grad, const Dims& shape, int64_t batch_dims, int64_t reduction,
                  SpaceBuilder& builder);

}  // namespace elbo_ext
