// Chooses the kernels for the machine at hand, once, the way torch chooses its own.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#define ELBO_DECLARE(CAPABILITY)                                         \
  namespace elbo_ext::CAPABILITY {                                       \
  void term_sum(const TermSumProblem&, int64_t, int64_t);                \
  void latent(const LatentProblem&, int64_t, int64_t);                   \
  void latent_backward(const LatentProblem&, int64_t, int64_t);          \
  void sample_log_prob(const LatentProblem&, int64_t, int64_t);          \
  void sample_log_prob_backward(const LatentProblem&, int64_t, int64_t); \
  void importance(const ImportanceProblem&, int64_t, int64_t);           \
  void categorical(const CategoricalProblem&, int64_t, int64_t);         \
  void noise(NoiseKind, int64_t, int64_t, int64_t, DType, void*);        \
  }
ELBO_DECLARE(DEFAULT)
#if defined(ELBO_HAVE_AVX2)
ELBO_DECLARE(AVX2)
#endif
#if defined(ELBO_HAVE_AVX512)
ELBO_DECLARE(AVX512)
#endif
#undef ELBO_DECLARE

namespace elbo_ext {
namespace {

#define ELBO_KERNELS(CAPABILITY)                                                                                    \
  {#CAPABILITY, CAPABILITY::term_sum, CAPABILITY::latent, CAPABILITY::latent_backward, CAPABILITY::sample_log_prob, \
   CAPABILITY::sample_log_prob_backward, CAPABILITY::importance, CAPABILITY::categorical, CAPABILITY::noise}
// From the plainest to the widest.
constexpr CpuKernels kCompiled[] = {
    ELBO_KERNELS(DEFAULT),
#if defined(ELBO_HAVE_AVX2)
    ELBO_KERNELS(AVX2),
#endif
#if defined(ELBO_HAVE_AVX512)
    ELBO_KERNELS(AVX512),
#endif
};
#undef ELBO_KERNELS

bool runs_here(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(name, "AVX2") == 0) return avx2;
  if (std::strcmp(name, "AVX512") == 0)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return std::strcmp(name, "DEFAULT") == 0;
}

// ATEN_CPU_CAPABILITY, the variable that torch obeys, sets an upper bound: default, avx2 or avx512.
bool allowed(const char* name) {
  const char* bound = std::getenv("ATEN_CPU_CAPABILITY");
  if (bound == nullptr) return true;
  if (std::strcmp(bound, "default") == 0) return std::strcmp(name, "DEFAULT") == 0;
  if (std::strcmp(bound, "avx2") == 0) return std::strcmp(name, "AVX512") != 0;
  return true;
}

const CpuKernels& choose() {
  const CpuKernels* best = &kCompiled[0];
  for (const CpuKernels& kernels : kCompiled)
    if (runs_here(kernels.name) && allowed(kernels.name)) best = &kernels;
  return *best;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

std::vector<std::string> compiled_instruction_sets() {
  std::vector<std::string> names;
  for (const CpuKernels& kernels : kCompiled) names.emplace_back(kernels.name);
  return names;
}

}  // namespace elbo_ext
