// Runs problems on the device that their tensors are on. The operators are written once, over this interface; the CPU
// (cpu_device.cpp) and CUDA (cuda_device.cpp) implement it.
#pragma once

#include "../problem.h"
#include "tensors.h"

namespace elbo_ext {

// What is being run, and where.
struct Site {
  const char* op;      // the operator's name, and
  const Dims& shape;   // the joint shape, for messages
  const Tensor& like;  // any of its tensors, for the device
};

// Samples that are made together. `kl`: of all of them in sum, where it is reduced over the examples; otherwise each has its
// own, by row. There is room for a sum of each problem: latent() may leave several, and returns how many.
struct LatentProblems {
  std::vector<LatentProblem*> each;
  Values kl;
  DType kl_type = DType::kFloat;
};

class Device {
 public:
  virtual ~Device() = default;
  // A problem may be empty: sums of nothing are 0, and a mean of no example is NaN.
  virtual void term_sum(const Site& site, TermSumProblem& problem) const = 0;
  virtual int latent(const Site& site, const LatentProblems& problems) const = 0;
  virtual void latent_backward(const Site& site, const std::vector<LatentProblem*>& problems) const = 0;
  // Rows that are no term: a problem of no rows is for the caller. fold() may have nothing to add up.
  virtual void categorical(const Site& site, CategoricalProblem& problem) const = 0;
  virtual void fold(const Site& site, const FoldProblem& problem) const = 0;
  // out[row, i] = number first + i of the stream of seed[row].
  virtual void noise(const Site& site, NoiseKind kind, const Tensor& seed, int64_t first, const Tensor& out) const = 0;
  virtual void importance(const Site& site, const ImportanceProblem& problem) const = 0;
  virtual void stored_gradients(const Site& site, const StoredGradients& problem) const = 0;
};

const Device& cpu_device();
const Device& cuda_device();  // raises if the CUDA library is not loaded
bool on_cpu(const Tensor& tensor);
const Device& device_of(const Tensor& tensor);

// Raises unless a tensor is where the others are: a kernel given memory of another device would crash.
void check_device(const char* op, const Tensor& tensor, const Tensor& like);

}  // namespace elbo_ext
