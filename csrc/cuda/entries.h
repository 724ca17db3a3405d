// The entry points of the kernels' files, for the table in library.cu.
#pragma once

#include "interface.h"

namespace elbo_ext {

// These files are compiled once for each compute type, float and double.
template <class R>
const char* term_sum(const TermSumProblem& problem, const CudaCall& call);
template <class R>
const char* latent(const LatentProblem& problem, const CudaCall& call);
template <class R>
const char* latent_backward(const LatentProblem& problem, const CudaCall& call);
template <class R>
const char* sample_log_prob(const LatentProblem& problem, const CudaCall& call);
template <class R>
const char* sample_log_prob_backward(const LatentProblem& problem, const CudaCall& call);
template <class R>
const char* categorical(const CategoricalProblem& problem, const CudaCall& call);

bool lists(const LatentList& list);
const char* latent_list(const LatentList& list, const CudaCall& call);
const char* importance(const ImportanceProblem& problem, const CudaCall& call);
const char* fold(const FoldProblem& problem, const CudaCall& call);
const char* noise(const NoiseProblem& problem, const CudaCall& call);
const char* stored_gradients(const StoredGradients& problem, const CudaCall& call);

}  // namespace elbo_ext
