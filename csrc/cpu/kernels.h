// The entry points of the CPU kernels. Every file of this folder but dispatch.cpp is compiled once for each instruction
// set, with CPU_CAPABILITY naming it; all else in those files lives in anonymous namespaces, so that the linker can
// never hand the code of a newer instruction set to an older machine.
#pragma once

#include "../problem.h"

namespace elbo_ext::CPU_CAPABILITY {

void term_sum(const TermSumProblem& problem, int64_t begin, int64_t end);
void latent(const LatentProblem& problem, int64_t begin, int64_t end);
void latent_backward(const LatentProblem& problem, int64_t begin, int64_t end);
void sample_log_prob(const LatentProblem& problem, int64_t begin, int64_t end);
void sample_log_prob_backward(const LatentProblem& problem, int64_t begin, int64_t end);
void importance(const ImportanceProblem& problem, int64_t begin, int64_t end);  // examples
void categorical(const CategoricalProblem& problem, int64_t begin, int64_t end);  // rows
void noise(NoiseKind kind, int64_t seed, int64_t first, int64_t count, DType dtype, void* out);

}  // namespace elbo_ext::CPU_CAPABILITY
