// The table of functions that the CUDA library hands to the operators.
#include <string>

#include "entries.h"
#include "launch.h"

namespace elbo_ext {
namespace {

// ---- the driver ----

// Code of one generation of CUDA runs with the drivers of that generation and later ones (minor versions do not matter).
const char* driver_complaint() {
  int driver = 0, runtime = 0;  // 13020 is CUDA 13.2
  if (message(cudaDriverGetVersion(&driver)) != nullptr || message(cudaRuntimeGetVersion(&runtime)) != nullptr)
    return nullptr;
  if (driver == 0 || driver / 1000 >= runtime / 1000) return nullptr;
  static std::string sentence;
  sentence = "it was built with CUDA " + std::to_string(runtime / 1000) +
             " and needs an NVIDIA driver of that generation, but the driver here is of CUDA " +
             std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  return sentence.c_str();
}

// ---- the table ----

template <class Problem>
using Function = const char*(const Problem&, const CudaCall&);
template <class Problem, Function<Problem> function>
const char* on_device(const Problem& p, const CudaCall& call) {
  const OnDevice guard(call.device);
  if (const char* error = guard.error()) return error;
  return function(p, call);
}
// Of the two functions, one for each compute type, the one that a problem asks for.
template <class Problem, Function<Problem> for_float, Function<Problem> for_double>
const char* by_type(const Problem& p, const CudaCall& call) {
  return p.compute_double ? on_device<Problem, for_double>(p, call) : on_device<Problem, for_float>(p, call);
}

constexpr CudaKernels kKernels = {
    ELBO_CUDA_ARCHITECTURES,
    driver_complaint,
    by_type<TermSumProblem, term_sum<float>, term_sum<double>>,
    by_type<LatentProblem, latent<float>, latent<double>>,
    by_type<LatentProblem, latent_backward<float>, latent_backward<double>>,
    lists,
    on_device<LatentList, latent_list>,
    by_type<LatentProblem, sample_log_prob<float>, sample_log_prob<double>>,
    by_type<LatentProblem, sample_log_prob_backward<float>, sample_log_prob_backward<double>>,
    on_device<ImportanceProblem, importance>,
    by_type<CategoricalProblem, categorical<float>, categorical<double>>,
    on_device<FoldProblem, fold>,
    on_device<NoiseProblem, noise>,
    on_device<StoredGradients, stored_gradients>,
};

}  // namespace
}  // namespace elbo_ext

extern "C" __attribute__((visibility("default"))) const elbo_ext::CudaKernels* elbo_ext_cuda_kernels(int64_t version) {
  return version == elbo_ext::kCudaVersion ? &elbo_ext::kKernels : nullptr;
}
