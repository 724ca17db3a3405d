// Between the operators (_C, torch's stable ABI) and the CUDA library (_cuda, which knows nothing of torch): one table of
// functions that take plain numbers and device pointers.
#pragma once

#include "../problem.h"

namespace elbo_ext {

// Where to run: the current stream of a device, and memory that is free again for later work on that stream once the
// operator is done.
struct CudaCall {
  int device;
  void* stream;
  // Never asked for 0 bytes; 256 byte aligned; null if there is no memory: no exception crosses from one library to the other.
  void* (*allocate)(void* owner, int64_t bytes) noexcept;
  void* owner;
  mutable bool out_of_memory = false;

  // Memory to work in. If there is none, no further kernel of this call is launched (launch.h), so that the caller need not
  // look at what it gets.
  void* workspace(int64_t bytes) const {
    void* const memory = allocate(owner, bytes);
    if (memory == nullptr) out_of_memory = true;
    return memory;
  }
};

struct NoiseProblem {
  NoiseKind kind;
  const int64_t* seed;  // [rows]
  int64_t rows, count, first;
  bool compute_double;
  void* out;  // [rows, count]
};

// Several problems of the latent stage for one kernel: kMostListed at the most, none of them empty.
constexpr int kMostListed = 40;
struct LatentList {
  const LatentProblem* const* problem;
  int count;
  bool backward;
  Values kl;  // forward: the sum over all of them, or absent
};

// Every function launches its kernels and returns null, or what CUDA says went wrong.
struct CudaKernels {
  const char* architectures;  // "sm_80 sm_90 compute_90"
  // Why the machine's driver cannot run these kernels, in a sentence; null if it can, or if there is no driver.
  const char* (*driver_complaint)();
  const char* (*term_sum)(const TermSumProblem&, const CudaCall&);
  const char* (*latent)(const LatentProblem&, const CudaCall&);
  const char* (*latent_backward)(const LatentProblem&, const CudaCall&);
  bool (*lists)(const LatentList&);  // whether latent_list serves
  const char* (*latent_list)(const LatentList&, const CudaCall&);
  // The same with log q and log p.
  const char* (*sample_log_prob)(const LatentProblem&, const CudaCall&);
  const char* (*sample_log_prob_backward)(const LatentProblem&, const CudaCall&);
  const char* (*importance)(const ImportanceProblem&, const CudaCall&);
  const char* (*categorical)(const CategoricalProblem&, const CudaCall&);
  const char* (*fold)(const FoldProblem&, const CudaCall&);
  const char* (*noise)(const NoiseProblem&, const CudaCall&);
  const char* (*stored_gradients)(const StoredGradients&, const CudaCall&);
};

// The one function that _cuda exports. `version` tells two builds apart that would not understand each other; null: not
// this one.
constexpr const char* kCudaEntry = "elbo_ext_cuda_kernels";
using CudaEntry = const CudaKernels*(int64_t version);
#if defined(ELBO_INTERFACE)  // made from this file and problem.h, by setup.py
constexpr int64_t kCudaVersion = ELBO_INTERFACE;
#endif

}  // namespace elbo_ext
