// The gradients of a set of operands: their tensors, the buffers that sums go through, and the last step of those sums.
#pragma once

#include <memory>

#include "tensors.h"

namespace elbo_ext {

class Gradients {
 public:
  explicit Gradients(const Dims& shape) : shape_(shape), numel_(numel_of(shape)) {}

  // Allocates the gradient of an operand and enters it into the space.
  void add(const Tensor& operand, GradientSink& sink, SpaceBuilder& space);

  // How many groups of blocks the summed gradients allow (0: any number).
  int64_t max_groups() const;

  // The buffers of the summed gradients, on the CPU.
  void allocate_partials(const Blocks& blocks);
  // Adds the groups' buffers up, in order, into the gradients.
  void finish(const Blocks& blocks);
  // All gradients are zero, because the space is empty.
  void zero() const;

  // In the order in which they were added.
  std::vector<Tensor> take() { return std::move(tensors_); }
  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  Dims shape_;
  int64_t numel_;
  std::vector<Tensor> tensors_;
  std::vector<GradientSink*> sinks_;
  std::unique_ptr<double[]> partials_;
};

}  // namespace elbo_ext
