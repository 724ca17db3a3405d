// The choice of an instruction set. The kernels of csrc/cpu are compiled once for each (baseline, AVX2, AVX-512); dispatch.cpp
// picks one for this machine, once.
#pragma once

#include <string>
#include <vector>

#include "../problem.h"

namespace elbo_ext {

// The kernels of one instruction set. Each call works through the groups [begin, end) of a problem.
struct CpuKernels {
  const char* name;
  void (*term_sum)(const TermSumProblem&, int64_t begin, int64_t end);
  void (*latent)(const LatentProblem&, int64_t begin, int64_t end);
  void (*latent_backward)(const LatentProblem&, int64_t begin, int64_t end);
  // The same with log q and log p.
  void (*sample_log_prob)(const LatentProblem&, int64_t begin, int64_t end);
  void (*sample_log_prob_backward)(const LatentProblem&, int64_t begin, int64_t end);
  void (*importance)(const ImportanceProblem&, int64_t begin, int64_t end);  // examples
  void (*categorical)(const CategoricalProblem&, int64_t begin, int64_t end);  // rows
  void (*noise)(NoiseKind, int64_t seed, int64_t first, int64_t count, DType dtype, void* out);
};

// Those in use on this machine.
const CpuKernels& cpu_kernels();

std::vector<std::string> compiled_instruction_sets();

}  // namespace elbo_ext
