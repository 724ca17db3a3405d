// The gradients of a set of operands: their tensors, and where they go.
#pragma once

#include "tensors.h"

namespace elbo_ext {

class Gradients {
 public:
  explicit Gradients(const Dims& shape) : numel_(numel_of(shape)) {}

  // Allocates the gradient of an operand and adds it to the space.
  void add(const Tensor& operand, GradientSink& sink, SpaceBuilder& space) {
    sink.numel = operand.numel();
    sink.summed = sink.numel != numel_;
    tensors_.push_back(elbo_ext::empty_like(operand));  // dense: a place in memory is a number below numel
    set_view(sink, tensors_.back());
    space.add(sink, tensors_.back());
  }

  // All gradients are zero, because the space is empty.
  void zero() const {
    for (const Tensor& tensor : tensors_) fill_with_zeros(tensor);
  }

  // In the order in which they were added.
  std::vector<Tensor> take() { return std::move(tensors_); }
  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  int64_t numel_;
  std::vector<Tensor> tensors_;
};

}  // namespace elbo_ext
