// Sums of any shape: each output collects its contributors, in a fixed order. The main kernels sum what is cheap to sum
// while they pass by (one number in all, or one for each long run of neighbours); what is left, such as the gradient of
// a mean that all examples share, is read once more, here. Nothing of the data's size is stored.
#pragma once

#include "plan.h"

namespace elbo_ext {
namespace {

// Outputs are numbered through the first `kept` dimensions of the layout, the contributors of an output through the
// others. The last slot of the layout is where the outputs lie.
template <int kSlots, int kSums>
struct Gather {
  Layout<kSlots> layout;
  int kept;
  int64_t outputs, contributors;
  // A block has out_threads * (kThreads / out_threads) threads, for outputs and for contributors; whichever of the two
  // are neighbours in memory are neighbours in the block.
  int out_threads;
  bool outputs_adjacent;
  int64_t per_split;  // the blocks along y of the grid share the contributors of the same outputs
  Array out[kSums] = {};      // null: not wanted
  double* partial = nullptr;  // [kSums][splits][outputs], with several splits
};

// Evaluate::add(params, offsets, sums) adds the contribution of one element; Evaluate::Params has a Gather named `gather`.
template <class Evaluate>
__global__ void __launch_bounds__(kThreads, 2) gather_kernel(const __grid_constant__ typename Evaluate::Params p) {
  constexpr int kSlots = Evaluate::kSlots, kSums = Evaluate::kSums;
  const auto& g = p.gather;
  const int out_threads = g.out_threads, sum_threads = kThreads / out_threads;
  const int x = g.outputs_adjacent ? threadIdx.x % out_threads : threadIdx.x / sum_threads;
  const int y = g.outputs_adjacent ? threadIdx.x / out_threads : threadIdx.x % sum_threads;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * out_threads + x;
  const bool inside = output < g.outputs;

  double sum[kSums] = {};
  int64_t base[kSlots] = {};
  if (inside) {
    g.layout.add_offsets(output, 0, g.kept, base);
    const int64_t first = blockIdx.y * g.per_split;
    const int64_t end = first + g.per_split < g.contributors ? first + g.per_split : g.contributors;
    for (int64_t i = first + y; i < end; i += sum_threads) {
      int64_t offset[kSlots];
      ELBO_UNROLL
      for (int k = 0; k < kSlots; ++k) offset[k] = base[k];
      g.layout.add_offsets(i, g.kept, g.layout.dims, offset);
      Evaluate::add(p, offset, sum);
    }
  }

  __shared__ double per_thread[kThreads];
  const int place = y * out_threads + x;
  ELBO_UNROLL
  for (int k = 0; k < kSums; ++k) {
    if (g.out[k].data == nullptr) continue;
    __syncthreads();
    per_thread[place] = sum[k];
    for (int half = sum_threads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (y < half) per_thread[place] += per_thread[place + half * out_threads];
    }
    if (y != 0 || !inside) continue;
    if (gridDim.y == 1) write(g.out[k], base[kSlots - 1], per_thread[place]);
    else g.partial[(k * static_cast<int64_t>(gridDim.y) + blockIdx.y) * g.outputs + output] = per_thread[place];
  }
}

// What Evaluate::add reads: numbers of one element, or the constants that stand for tensors that are absent.
template <class R, int kSlots>
struct GatheredElement {
  const Array (&array)[kSlots];
  const int64_t (&offset)[kSlots];

  __device__ __forceinline__ R number(int slot, double constant = 0.0) const {
    return array[slot].data == nullptr ? static_cast<R>(constant) : read<R>(array[slot], offset[slot]);
  }
  // The gradient of a result, upstream * factor.
  __device__ __forceinline__ R upstream(int slot, double constant, double factor) const {
    return static_cast<R>(array[slot].data == nullptr ? constant : read<double>(array[slot], offset[slot]) * factor);
  }
};

// Adds up numbers that are there already.
struct Fold {
  static constexpr int kSlots = 2, kSums = 1;
  struct Params {
    Gather<kSlots, kSums> gather;
  };
  static __device__ __forceinline__ void add(const Params& p, const int64_t (&offset)[kSlots], double (&sum)[kSums]) {
    sum[0] += __ldg(reinterpret_cast<const double*>(p.gather.layout.array[0].data) + offset[0]);
  }
};

// ---- on the host ----

// A dimension of a gather: its size, and the strides of all slots.
template <int kSlots>
struct GatherDimension {
  int64_t size;
  int64_t stride[kSlots];
  bool kept() const { return stride[kSlots - 1] != 0; }
};

// Lays the dimensions out, and shares the work. Returns the number of blocks: x for the outputs, y for the splits.
template <int kSlots, int kSums>
dim3 share_out(Gather<kSlots, kSums>& gather, std::vector<GatherDimension<kSlots>> dims, int device) {
  gather.outputs_adjacent = !dims.empty() && dims.back().kept();
  std::stable_partition(dims.begin(), dims.end(), [](const auto& dim) { return dim.kept(); });
  gather.kept = static_cast<int>(std::count_if(dims.begin(), dims.end(), [](const auto& dim) { return dim.kept(); }));
  gather.outputs = gather.contributors = 1;
  gather.layout.dims = static_cast<int>(dims.size());
  for (int dim = 0; dim < gather.layout.dims; ++dim) {
    gather.layout.size[dim] = Divider(dims[dim].size);
    std::copy_n(dims[dim].stride, kSlots, gather.layout.stride[dim]);
    (dim < gather.kept ? gather.outputs : gather.contributors) *= dims[dim].size;
  }
  const auto fit = [](int64_t count, int most) {
    return static_cast<int>(std::min<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(count, 1))), most));
  };
  const int sum_threads = gather.outputs_adjacent ? fit(gather.contributors, kThreads / fit(gather.outputs, kWarp))
                                                  : fit(gather.contributors, kThreads);
  gather.out_threads = kThreads / sum_threads;
  const int64_t columns = divide_up(gather.outputs, gather.out_threads);
  // With few outputs, several blocks share the contributors, so that the device is full; each takes eight or more.
  const int64_t wanted = divide_up(8 * multiprocessors(device), columns);
  const int64_t splits = std::clamp<int64_t>(gather.contributors / (8 * sum_threads), 1, std::min<int64_t>(wanted, 65535));
  gather.per_split = std::max<int64_t>(divide_up(gather.contributors, splits), 1);
  return dim3(static_cast<unsigned>(columns),
              static_cast<unsigned>(std::max<int64_t>(divide_up(gather.contributors, gather.per_split), 1)));
}

// Sums an array of doubles, slot 0, into `out`, slot 1.
const char* fold(const double* from, const Array& out, std::vector<GatherDimension<2>> dims, const CudaCall& call);

// Launches a gather whose layout has its arrays, and adds up its splits: by a gather again, of an eighth at most.
template <class Evaluate>
const char* gather(typename Evaluate::Params& params, std::vector<GatherDimension<Evaluate::kSlots>> dims,
                   const CudaCall& call) {
  constexpr int kSlots = Evaluate::kSlots, kSums = Evaluate::kSums;
  Gather<kSlots, kSums>& plan = params.gather;
  const dim3 blocks = share_out(plan, dims, call.device);
  const int64_t splits = blocks.y;
  if (splits > 1)
    plan.partial = static_cast<double*>(call.workspace(kSums * splits * plan.outputs * sizeof(double)));
  if (const char* error = launch(gather_kernel<Evaluate>, blocks, kThreads, params, call)) return error;
  if (splits == 1) return nullptr;
  std::vector<GatherDimension<2>> partial_dims{{splits, {plan.outputs, 0}}};
  int64_t number = plan.outputs;
  for (const auto& dim : dims) {
    if (!dim.kept()) continue;
    number /= dim.size;
    partial_dims.push_back({dim.size, {number, dim.stride[kSlots - 1]}});
  }
  for (int k = 0; k < kSums; ++k)
    if (plan.out[k].data != nullptr)
      if (const char* error = fold(plan.partial + k * splits * plan.outputs, plan.out[k], partial_dims, call)) return error;
  return nullptr;
}

inline const char* fold(const double* from, const Array& out, std::vector<GatherDimension<2>> dims, const CudaCall& call) {
  Fold::Params params;
  params.gather.layout.array[0].data = reinterpret_cast<char*>(const_cast<double*>(from));
  params.gather.out[0] = out;
  return gather<Fold>(params, std::move(dims), call);
}

// The dimensions of a space, with the strides of each slot; the last one is that of `sink`.
template <int kSlots>
std::vector<GatherDimension<kSlots>> gather_dimensions(const Dimensions& space, const View* const (&view)[kSlots]) {
  std::vector<GatherDimension<kSlots>> dims(space.count);
  for (int dim = 0; dim < space.count; ++dim) {
    dims[dim].size = space.size[dim];
    for (int k = 0; k < kSlots; ++k)
      dims[dim].stride[k] = view[k] == nullptr || view[k]->data == nullptr ? 0 : space.stride(*view[k], dim);
  }
  return dims;
}

// Gradients of one pattern of strides are gathered together.
inline bool same_strides(const Dimensions& space, const View& a, const View& b) {
  for (int dim = 0; dim < space.count; ++dim)
    if (space.stride(a, dim) != space.stride(b, dim)) return false;
  return true;
}

// Gathers those of the gradients that `sinks` lists. `view` has the tensors that Evaluate reads, and room for one more;
// `repeated` are dimensions in front of those of the space, along which no gradient has elements.
template <class Evaluate, int kSinks>
const char* gather_sinks(const typename Evaluate::Params& common, const View* (&view)[Evaluate::kSlots],
                         const GradientSink (&gradient)[kSinks], const Dimensions& dims, std::vector<int> sinks,
                         const CudaCall& call, const std::vector<GatherDimension<Evaluate::kSlots>>& repeated = {}) {
  constexpr int kSink = Evaluate::kSlots - 1;
  while (!sinks.empty()) {
    typename Evaluate::Params params = common;
    view[kSink] = &gradient[sinks.front()];
    for (int k = 0; k < kSink; ++k) params.gather.layout.array[k] = array_of(*view[k]);
    for (int k : sinks)
      if (same_strides(dims, gradient[k], *view[kSink])) params.gather.out[k] = array_of(gradient[k]);
    std::erase_if(sinks, [&](int k) { return params.gather.out[k].data != nullptr; });
    auto all = gather_dimensions(dims, view);
    all.insert(all.begin(), repeated.begin(), repeated.end());
    if (const char* error = gather<Evaluate>(params, std::move(all), call)) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace elbo_ext
