// Noise into memory.
#include "entries.h"
#include "noise.cuh"
#include "plan.h"

namespace elbo_ext {
namespace {

template <class R>
__global__ void __launch_bounds__(kThreads) noise_kernel(const __grid_constant__ NoiseProblem p) {
  // Four numbers for each counter; the first and the last counter of a row may be used in part.
  const int64_t first_counter = p.first / kNormalsPerCounter;
  const int64_t counters = (p.first + p.count + kNormalsPerCounter - 1) / kNormalsPerCounter - first_counter;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const uint64_t seed = static_cast<uint64_t>(p.seed[row]);
    R* out = static_cast<R*>(p.out) + row * p.count;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < counters;
         i += static_cast<int64_t>(gridDim.x) * kThreads) {
      const uint64_t counter = static_cast<uint64_t>(first_counter + i);
      R number[kNormalsPerCounter];
      if (p.kind == NoiseKind::kGumbel) gumbel_group(seed, counter, number);
      else whole_group(seed, counter, number);
      const int64_t at = static_cast<int64_t>(counter) * kNormalsPerCounter - p.first;
      ELBO_UNROLL
      for (int j = 0; j < kNormalsPerCounter; ++j)
        if (at + j >= 0 && at + j < p.count) out[at + j] = number[j];
    }
  }
}

}  // namespace

const char* noise(const NoiseProblem& p, const CudaCall& call) {
  const int64_t most = multiprocessors(call.device) * kBlocksPerMultiprocessor;
  const int64_t blocks = std::clamp<int64_t>(divide_up(p.count / kNormalsPerCounter + 2, kThreads), 1, most);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min<int64_t>(p.rows, 65535)));
  return p.compute_double ? launch(noise_kernel<double>, grid, kThreads, p, call)
                          : launch(noise_kernel<float>, grid, kThreads, p, call);
}

}  // namespace elbo_ext
