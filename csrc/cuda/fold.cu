// Sums of stretches of numbers, by a block each.
#include "entries.h"
#include "plan.h"

namespace elbo_ext {
namespace {

struct FoldParams {
  int64_t count, length;
  Array numbers, out;
  double divisor;
};

template <class R>
__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ FoldParams p) {
  for (int64_t i = blockIdx.x; i < p.count; i += gridDim.x) {
    const R* const numbers = reinterpret_cast<const R*>(p.numbers.data) + i * p.length;
    double sum = 0.0;
    for (int64_t k = threadIdx.x; k < p.length; k += kThreads) sum += static_cast<double>(numbers[k]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) write(p.out, i, sum / p.divisor);
  }
}

template <class R>
const char* run_fold(const FoldParams& params, const CudaCall& call) {
  const int64_t most = static_cast<int64_t>(multiprocessors(call.device)) * kBlocksPerMultiprocessor;
  return launch(fold_kernel<R>, dim3(static_cast<unsigned>(std::min(params.count, most))), kThreads, params, call);
}

}  // namespace

const char* fold(const FoldProblem& p, const CudaCall& call) {
  // One long sum in two steps, so that more than one block works on it.
  constexpr int64_t kLong = 16 * 1024, kPieces = 512;
  FoldParams params{p.count, p.length, {as_bytes(p.numbers), compute_type(p.compute_double)}, {as_bytes(p.out), compute_type(p.compute_double)}, p.divisor};
  if (p.count == 1 && p.length > kLong) {
    const int64_t length = divide_up(p.length, kPieces), whole = p.length / length;
    const int64_t pieces = divide_up(p.length, length);
    const DType wide = DType::kDouble;
    FoldParams first = params;
    first.count = whole;
    first.length = length;
    first.divisor = 1.0;
    first.out = {static_cast<char*>(call.workspace(pieces * bytes_of(wide))), wide};
    if (call.out_of_memory) return kOutOfMemory;
    if (const char* error = p.compute_double ? run_fold<double>(first, call) : run_fold<float>(first, call)) return error;
    if (pieces > whole) {  // what is left is shorter
      FoldParams rest = first;
      rest.count = 1;
      rest.length = p.length - whole * length;
      rest.numbers.data += whole * length * bytes_of(params.numbers.dtype);
      rest.out.data += whole * bytes_of(wide);
      if (const char* error = p.compute_double ? run_fold<double>(rest, call) : run_fold<float>(rest, call)) return error;
    }
    params.numbers = first.out;
    params.length = pieces;
    return run_fold<double>(params, call);
  }
  return p.compute_double ? run_fold<double>(params, call) : run_fold<float>(params, call);
}

}  // namespace elbo_ext
