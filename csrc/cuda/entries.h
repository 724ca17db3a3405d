// The entry points of the files that are compiled once for each compute type, float and double.
#pragma once

#include "interface.h"

namespace elbo_ext {

template <class R>
const char* term_sum(const TermSumProblem& problem, const CudaCall& call);
template <class R>
const char* latent(const LatentProblem& problem, const CudaCall& call);
template <class R>
const char* latent_backward(const LatentProblem& problem, const CudaCall& call);
template <class R>
const char* log_prob(const LatentProblem& problem, const CudaCall& call);
template <class R>
const char* log_prob_backward(const LatentProblem& problem, const CudaCall& call);

}  // namespace elbo_ext
