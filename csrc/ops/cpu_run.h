// How a problem is run on the CPU.
#pragma once

#include <algorithm>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../cpu/dispatch.h"
#include "tensors.h"

namespace elbo_ext {

// Runs kernel(begin, end) over all groups, on as many threads as pay off: each gets at least `least_elements`.
template <class Kernel>
void run_parallel(const Blocks& blocks, int64_t elements, int64_t least_elements, const Kernel& kernel) {
  if (blocks.groups == 0) return;
  if (elements < 2 * least_elements) return kernel(int64_t{0}, blocks.groups);
  const int64_t per_group = std::max<int64_t>(elements / blocks.groups, 1);
  const int64_t grain = std::max<int64_t>(least_elements / per_group, 1);
  torch::stable::parallel_for(0, blocks.groups, grain, kernel);
}

// The values of a forward pass, as its reduction asks for them: the tensor, where the kernel writes, and the last step.
class Values {
 public:
  Values(const Dims& shape, int64_t batch_dims, int64_t reduction, bool compute_double, const Tensor& like)
      : reduction_(reduction), compute_double_(compute_double) {
    Dims batch(shape.begin(), shape.begin() + batch_dims);
    examples_ = numel_of(batch);
    if (reduction != kNone) batch.clear();
    result_ = empty(batch, compute_type(compute_double), like);
  }

  int64_t examples() const { return examples_; }
  const Tensor& result() const { return result_; }

  // Problem is a TermSumProblem or a LatentProblem whose space and blocks are set.
  template <class Problem>
  void connect(Problem& problem) {
    if (reduction_ == kNone && problem.blocks.blocks_per_row == 1) {
      problem.row_value = result_.data_ptr();
      return;
    }
    block_sums_.resize(problem.blocks.count);
    problem.block_sum = block_sums_.data();
  }

  // Sums the blocks of each row, or of everything, in order.
  void finish(const Blocks& blocks) {
    if (reduction_ == kNone) {
      if (blocks.blocks_per_row == 1) return;
      for (int64_t row = 0; row < blocks.count / blocks.blocks_per_row; ++row)
        write(row, sum(row * blocks.blocks_per_row, blocks.blocks_per_row));
      return;
    }
    const double total = sum(0, static_cast<int64_t>(block_sums_.size()));
    write(0, reduction_ == kMean ? total / static_cast<double>(examples_) : total);
  }

 private:
  double sum(int64_t first, int64_t count) const {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += block_sums_[first + i];
    return total;
  }
  void write(int64_t index, double value) {
    if (compute_double_) static_cast<double*>(result_.data_ptr())[index] = value;
    else static_cast<float*>(result_.data_ptr())[index] = static_cast<float>(value);
  }

  int64_t reduction_, examples_;
  bool compute_double_;
  Tensor result_;
  std::vector<double> block_sums_;
};

// Calls call(pointer) with the data of a CPU tensor as what it is.
template <class Call>
auto with_data(const Tensor& tensor, Call&& call) {
  void* data = tensor.data_ptr();
  switch (dtype_of(tensor)) {
    case DType::kFloat: return call(static_cast<float*>(data));
    case DType::kDouble: return call(static_cast<double*>(data));
    case DType::kBFloat16: return call(static_cast<torch::headeronly::BFloat16*>(data));
    case DType::kHalf: return call(static_cast<torch::headeronly::Half*>(data));
    default: return call(static_cast<bool*>(data));
  }
}

// Sum of a contiguous tensor, in double.
inline double sum_of(const Tensor& tensor) {
  return with_data(tensor, [&](auto* data) {
    double sum = 0;
    for (int64_t i = 0; i < tensor.numel(); ++i) sum += static_cast<double>(data[i]);
    return sum;
  });
}

// The number in a tensor of one element, and the other way round.
inline double read_scalar(const Tensor& tensor) {
  return with_data(tensor, [](auto* data) { return static_cast<double>(*data); });
}
inline Tensor scalar(double number, const Dims& expanded_to, DType dtype, const Tensor& like) {
  const Tensor tensor = empty_expanded(expanded_to, dtype, like);
  if (numel_of(expanded_to) == 0) return tensor;
  with_data(tensor, [=](auto* data) {
    using S = std::remove_reference_t<decltype(*data)>;
    if constexpr (std::is_same_v<S, double>) *data = number;
    else *data = static_cast<S>(static_cast<float>(number));
  });
  return tensor;
}

}  // namespace elbo_ext
