#include "space.h"

#include <algorithm>

#include <torch/headeronly/util/Exception.h>

namespace elbo_ext {

std::string text_of(const Dims& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

Dims broadcast_shape(const std::vector<const Tensor*>& tensors) {
  Dims shape;
  for (const Tensor* tensor : tensors) {
    const auto sizes = tensor->sizes();
    const int64_t ndim = static_cast<int64_t>(sizes.size());
    if (ndim > static_cast<int64_t>(shape.size())) shape.insert(shape.begin(), ndim - shape.size(), 1);
    for (int64_t i = 0; i < ndim; ++i) {
      const int64_t size = sizes[i];
      int64_t& joint = shape[shape.size() - ndim + i];
      STD_TORCH_CHECK(size == joint || size == 1 || joint == 1, "elbo_ext: shapes do not broadcast: ", size, " against ",
                      joint, " at dimension ", i - ndim);
      if (size != 1) joint = size;
    }
  }
  return shape;
}

Dims broadcast_strides(const Tensor& tensor, const Dims& shape) {
  Dims strides(shape.size(), 0);
  const auto sizes = tensor.sizes(), own = tensor.strides();
  const int64_t ndim = static_cast<int64_t>(sizes.size()), lead = static_cast<int64_t>(shape.size()) - ndim;
  STD_TORCH_CHECK(lead >= 0, "elbo_ext: a tensor has more dimensions than the shape it should broadcast to");
  for (int64_t i = 0; i < ndim; ++i) {
    const int64_t size = sizes[i];
    STD_TORCH_CHECK(size == shape[lead + i] || size == 1, "elbo_ext: a tensor of size ", size, " at dimension ", i,
                    " does not broadcast to ", shape[lead + i]);
    if (size != 1) strides[lead + i] = own[i];
  }
  return strides;
}

// Outermost first: a dimension with larger strides goes further out. The first view that tells two dimensions apart
// decides; an insertion sort, because "no view tells" is not transitive.
void SpaceBuilder::sort_by_memory(Dims& dims) const {
  const auto is_inside = [&](int64_t a, int64_t b) {  // must a be visited faster than b?
    for (const Member& member : members_) {
      const int64_t stride_a = member.strides[a], stride_b = member.strides[b];
      if (stride_a == 0 || stride_b == 0 || stride_a == stride_b) continue;
      return stride_a < stride_b;
    }
    return false;
  };
  for (size_t i = 1; i < dims.size(); ++i)
    for (size_t j = i; j > 0 && is_inside(dims[j - 1], dims[j]); --j) std::swap(dims[j - 1], dims[j]);
}

// Joins neighbours that every view steps through evenly; returns how many dimensions are left, `most` at the most.
int SpaceBuilder::join(const Dims& dims, int most, int64_t (&size)[kMaxDims], int64_t (View::*stride)[kMaxDims]) const {
  int count = 0;
  for (const int64_t dim : dims) {
    const bool joins = count > 0 && std::all_of(members_.begin(), members_.end(), [&](const Member& member) {
      return (member.view->*stride)[count - 1] == member.strides[dim] * shape_[dim];
    });
    if (!joins) {
      STD_TORCH_CHECK(count < most, "elbo_ext: a layout with more than ", kMaxDims,
                      " dimensions that cannot be joined; call contiguous() first");
      size[count++] = 1;
    }
    size[count - 1] *= shape_[dim];
    for (const Member& member : members_) (member.view->*stride)[count - 1] = member.strides[dim];
  }
  return count;
}

Space SpaceBuilder::build() const {
  Dims rows, cols;
  for (int64_t i = 0; i < static_cast<int64_t>(shape_.size()); ++i)
    if (shape_[i] != 1) (i < row_dims_ ? rows : cols).push_back(i);
  if (any_order_) sort_by_memory(cols);

  Space space;
  space.row_dims = join(rows, kMaxDims, space.row_size, &View::row_stride);
  space.col_dims = join(cols, kMaxDims - space.row_dims, space.col_size, &View::col_stride);
  for (int i = 0; i < space.row_dims; ++i) space.rows *= space.row_size[i];
  for (int i = 0; i < space.col_dims; ++i) space.cols *= space.col_size[i];

  for (const Member& member : members_) {
    View& view = *member.view;
    view.rows_uniform = view.cols_uniform = view.rows_dense = view.cols_dense = true;
    int64_t expected = 1;
    for (int i = space.col_dims - 1; i >= 0; expected *= space.col_size[i--]) {
      if (view.col_stride[i] != 0) view.cols_uniform = false;
      if (view.col_stride[i] != expected) view.cols_dense = false;
    }
    view.dense_rows = 1;
    for (int i = space.row_dims - 1; i >= 0; expected *= space.row_size[i--]) {
      if (view.row_stride[i] != 0) view.rows_uniform = false;
      if (view.row_stride[i] != expected) view.rows_dense = false;
      if (view.rows_dense) view.dense_rows *= space.row_size[i];
    }
    view.rows_dense = view.rows_dense && view.cols_dense;
  }
  return space;
}

}  // namespace elbo_ext
