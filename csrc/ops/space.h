// From tensors to a Space: broadcasting, the order in which elements are visited, and the joining of dimensions.
#pragma once

#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "../problem.h"

namespace elbo_ext {

using torch::stable::Tensor;
using Dims = std::vector<int64_t>;

std::string text_of(const Dims& shape);  // "[2, 3]"

// The shape that all of these broadcast to.
Dims broadcast_shape(const std::vector<const Tensor*>& tensors);

// Strides of a tensor as a member of `shape`: 0 along every dimension that it is repeated over.
Dims broadcast_strides(const Tensor& tensor, const Dims& shape);

// Collects the views that share a shape and lays them out in one Space.
class SpaceBuilder {
 public:
  // The first `row_dims` dimensions become rows. With `any_order` the columns are visited in the order of memory.
  SpaceBuilder(Dims shape, int64_t row_dims, bool any_order)
      : shape_(std::move(shape)), row_dims_(row_dims), any_order_(any_order) {}

  // `strides` has one number for each dimension of the shape. `view` is filled by build().
  void add(View& view, Dims strides) { members_.push_back({&view, std::move(strides)}); }
  void add(View& view, const Tensor& tensor) { add(view, broadcast_strides(tensor, shape_)); }

  Space build() const;

 private:
  struct Member {
    View* view;
    Dims strides;
  };
  void sort_by_memory(Dims& dims) const;
  int join(const Dims& dims, int most, int64_t (&size)[kMaxDims], int64_t (View::*stride)[kMaxDims]) const;

  Dims shape_;
  int64_t row_dims_;
  bool any_order_;
  std::vector<Member> members_;
};

}  // namespace elbo_ext
