// Sums over elements, the same bits in every run: numbers are added up in double, in an order that depends on the shapes,
// dtypes, strides and alignment of the tensors (which choose the kernel) and on the device, and on nothing else. A vector's
// few numbers are added in the compute type; then thread, warp, block in double; blocks meet in a buffer that the last block
// to finish adds up in order. No floating-point atomics.
#pragma once

#include "layout.cuh"

namespace elbo_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The work of a kernel: all elements, by number, in segments of one length (the rows of the space, or shorter), and those in
// units: a unit is a segment or, where segments are long, a piece of one. A team of threads works on a unit: 1, 2, 4, ... 32
// neighbours in a warp, or the whole block. A single segment that is not summed by itself is one unit for the whole grid, so
// that neighbouring threads read neighbouring memory at any time.
struct Units {
  bool whole;
  int64_t length;       // of a segment
  Divider pieces;       // of a segment
  int64_t piece_length;
  int64_t count;        // segments * pieces
  int team;
};

enum SumKind : uint8_t {
  kNoSum,
  kUnitSum,   // one number for each unit
  kTotalSum,  // one number
};

// Where sums go.
template <int kSums>
struct SumPlan {
  SumKind kind[kSums] = {};
  Array out[kSums];       // of kUnitSum: [units]; of kTotalSum: one number, or null
  double divisor[kSums];  // of kTotalSum
  double* block = nullptr;      // [kSums][blocks], for kTotalSum with several blocks
  unsigned* arrived = nullptr;  // the number of blocks that are done; 0 at the start

  void total(int k, const Array& to, double by = 1.0) {
    kind[k] = kTotalSum;
    out[k] = to;
    divisor[k] = by;
  }
};

// The sum over the threads of a team, which it gives to all of them. All threads of a warp must call it.
__device__ __forceinline__ double warp_sum(double number, int team) {
  for (int distance = team / 2; distance > 0; distance /= 2) number += __shfl_xor_sync(kAllLanes, number, distance);
  return number;
}

// The sum over the block, for all of its threads. All of them must call it.
__device__ __forceinline__ double block_sum(double number) {
  __shared__ double per_warp[kThreads / kWarp];
  number = warp_sum(number, kWarp);
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % kWarp == 0) per_warp[threadIdx.x / kWarp] = number;
  __syncthreads();
  number = 0.0;
  ELBO_UNROLL
  for (int warp = 0; warp < kThreads / kWarp; ++warp) number += per_warp[warp];
  return number;
}

// Calls body(first, end, lane, lanes) for each unit of this thread's team: the elements [first, end) belong to the unit,
// `lane` is the thread's number among the `lanes` that work on it. After each unit, the sums that are wanted unit by unit
// are written. `used` has a bit for each sum that the kernel makes at all.
template <unsigned used, int kSums, class Body>
__device__ __forceinline__ void for_each_unit(const Units& units, const SumPlan<kSums>& plan, double (&sum)[kSums],
                                              Body&& body) {
  const int team = units.team, teams = kThreads / team, own = threadIdx.x / team;
  // With one unit for the whole grid all blocks begin at it, and it has no sum of its own.
  const int64_t block = units.whole ? 0 : static_cast<int64_t>(blockIdx.x);
  const int64_t lane = units.whole ? static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x : threadIdx.x % team;
  const int64_t lanes = units.whole ? static_cast<int64_t>(gridDim.x) * kThreads : team;
  bool by_unit = false;
  ELBO_UNROLL
  for (int k = 0; k < kSums; ++k)
    if (used >> k & 1) by_unit = by_unit || plan.kind[k] == kUnitSum;
  // The bounds of this loop are the same for the whole block, so that all threads come to the shuffles and barriers.
  for (int64_t base = block * teams; base < units.count; base += static_cast<int64_t>(gridDim.x) * teams) {
    const int64_t unit = base + own;
    if (unit < units.count) {
      const int64_t segment = units.pieces.quotient(unit), piece = unit - segment * units.pieces.size;
      const int64_t begin = piece * units.piece_length, end = minimum(begin + units.piece_length, units.length);
      body(segment * units.length + begin, segment * units.length + end, lane, lanes);
    }
    if (!by_unit || blockIdx.y != 0) continue;  // the layers of a grid share samples, not what is summed
    ELBO_UNROLL
    for (int k = 0; k < kSums; ++k) {
      if (!(used >> k & 1) || plan.kind[k] != kUnitSum) continue;
      const double unit_sum = team == kThreads ? block_sum(sum[k]) : warp_sum(sum[k], team);
      if (lane == 0 && unit < units.count) write(plan.out[k], unit, unit_sum);
      sum[k] = 0.0;
    }
  }
}

// Adds up sums over the block, all of them at once, into `total`, which is in shared memory. `wanted(k)` is the same for all
// threads, and all of them must call it; thread k alone knows that total[k] is there.
template <int kSums, class Wanted>
__device__ __forceinline__ void block_sums(double (&sum)[kSums], Wanted&& wanted, double (&total)[kSums]) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kSums <= kThreads);
  __shared__ double per_warp[kSums][kWarps];
  __syncthreads();  // the sums before these have been read
  ELBO_UNROLL
  for (int k = 0; k < kSums; ++k) {
    if (!wanted(k)) continue;
    const double of_warp = warp_sum(sum[k], kWarp);
    if (threadIdx.x % kWarp == 0) per_warp[k][threadIdx.x / kWarp] = of_warp;
  }
  __syncthreads();
  const int k = threadIdx.x;
  if (k >= kSums) return;
  double number = 0.0;
  ELBO_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) number += per_warp[k][warp];
  total[k] = number;
}

// Adds up the total sums over all blocks. True for one thread of the grid, the one that has them, already divided.
template <unsigned used, int kSums>
__device__ __forceinline__ bool total_sums(const SumPlan<kSums>& plan, double (&sum)[kSums]) {
  // From here on the sums are in shared memory, where loops over them need not be unrolled.
  __shared__ double total[kSums];
  const auto wanted = [&](int k) { return (used >> k & 1) && plan.kind[k] == kTotalSum; };
  bool any = false;
  ELBO_UNROLL
  for (int k = 0; k < kSums; ++k) any = any || wanted(k);
  if (!any) return false;
  block_sums(sum, wanted, total);
  const int64_t blocks = gridDim.x;
  const int own = threadIdx.x;
  if (blocks > 1) {
    __shared__ bool is_last;
    if (own < kSums && wanted(own)) {
      plan.block[own * blocks + blockIdx.x] = total[own];
      __threadfence();  // the sum is visible before the arrival is
    }
    __syncthreads();
    if (own == 0) is_last = atomicAdd(plan.arrived, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
    ELBO_UNROLL
    for (int k = 0; k < kSums; ++k) {
      if (!wanted(k)) continue;
      sum[k] = 0.0;
      for (int64_t block = own; block < blocks; block += kThreads)
        sum[k] += __ldcg(plan.block + k * blocks + block);  // from L2: another block has written it
    }
    block_sums(sum, wanted, total);
  }
  if (own < kSums && wanted(own)) {
    total[own] /= plan.divisor[own];
    if (plan.out[own].data != nullptr) write(plan.out[own], 0, total[own]);
  }
  __syncthreads();
  if (own != 0) return false;
  ELBO_UNROLL
  for (int k = 0; k < kSums; ++k) sum[k] = total[k];
  return true;
}

}  // namespace
}  // namespace elbo_ext
