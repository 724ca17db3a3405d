// From a problem to what its kernels take: layouts, units of work, and where sums go. On the host.
#pragma once

#include <algorithm>
#include <bit>
#include <numeric>
#include <vector>

#include "launch.h"
#include "sums.cuh"

namespace elbo_ext {
namespace {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline char* as_bytes(const void* data) { return static_cast<char*>(const_cast<void*>(data)); }
inline Array array_of(const View& view) { return {as_bytes(view.data), view.dtype}; }
inline DType compute_type(bool compute_double) { return compute_double ? DType::kDouble : DType::kFloat; }

// Results that lie as the elements, or the rows, are counted.
inline View dense_view(void* data, DType dtype) {
  View view;
  view.data = data;
  view.dtype = dtype;
  view.rows_dense = view.cols_dense = true;
  return view;
}
inline View dense_rows(void* data, DType dtype, const Space& space) {
  View view = dense_view(data, dtype);
  int64_t stride = 1;
  for (int dim = space.row_dims - 1; dim >= 0; stride *= space.row_size[dim--]) view.row_stride[dim] = stride;
  for (int dim = 0; dim < space.col_dims; ++dim) view.col_stride[dim] = 0;
  return view;
}

// Of kernels without sums. A grid of those with sums has as many blocks as the device holds at once: more would let those
// multiprocessors that are faster take more, but each block has its beginning and its sums (benchmarks/NOTES.md).
constexpr int64_t kBlocksPerMultiprocessor = 16;

// Threads of a multiprocessor that keep it busy.
constexpr int64_t kBusyThreads = 1024;

// Whether a vector of `width` elements can be read at every multiple of it.
inline bool aligned(const void* data, DType dtype, int width, int64_t base_step = 0) {
  const int64_t bytes = std::min<int64_t>(width * bytes_of(dtype), 16);  // more than 16 take several accesses
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && base_step % width == 0;
}

// The dimensions of a space, rows and columns in one list.
struct Dimensions {
  int count;
  int64_t size[kMaxDims];

  explicit Dimensions(const Space& space) : count(space.row_dims + space.col_dims), rows_(space.row_dims) {
    std::copy_n(space.row_size, space.row_dims, size);
    std::copy_n(space.col_size, space.col_dims, size + space.row_dims);
  }
  int64_t stride(const View& view, int dim) const {
    return dim < rows_ ? view.row_stride[dim] : view.col_stride[dim - rows_];
  }
  int64_t elements() const { return std::accumulate(size, size + count, int64_t{1}, std::multiplies<>()); }
  // How many neighbours, by number, share each element of a view.
  int64_t run(const View& view) const {
    int64_t length = 1;
    for (int dim = count - 1; dim >= 0 && stride(view, dim) == 0; --dim) length *= size[dim];
    return length;
  }
  // After how many elements a view that is contiguous so far begins anew; 0: it is none of that kind.
  int64_t period(const View& view) const {
    int64_t length = 1;
    int dim = count - 1;
    for (; dim >= 0 && stride(view, dim) == length; --dim) length *= size[dim];
    for (; dim >= 0; --dim)
      if (stride(view, dim) != 0) return 0;
    return length == 1 ? 0 : length;
  }

 private:
  int rows_;
};

// Lays views out for a kernel that reads groups of `group` elements in the compute type and works on segments of
// `segment` elements (sums.cuh).
template <int kSlots>
class LayoutBuilder {
 public:
  LayoutBuilder(Layout<kSlots>& layout, const Dimensions& dims, int64_t segment, int group, bool compute_double)
      : layout_(layout), dims_(dims), segment_(segment), group_(group), compute_double_(compute_double) {
    layout.dims = dims.count;
    for (int dim = 0; dim < dims.count; ++dim) layout.size[dim] = Divider(std::max<int64_t>(dims.size[dim], 1));
    whole_groups_ = dims.count > 0 && dims.size[dims.count - 1] % group == 0;
  }

  // `base_step`: the distance between the samples, for tensors that have several slices of the space's shape.
  // `integer_vectors`: the kernel reads vectors of integers, too (load_data).
  void set(int slot, const View& view, bool written = false, int64_t base_step = 0, bool integer_vectors = false) {
    integer_vectors_ = integer_vectors;
    layout_.array[slot] = array_of(view);
    if (view.data == nullptr) return;
    layout_.place[slot] = place_of(slot, view, written, base_step);
    if (!(layout_.contiguous >> slot & 1))
      for (int dim = 0; dim < dims_.count; ++dim) layout_.stride[dim][slot] = dims_.stride(view, dim);
  }

 private:
  Place place_of(int slot, const View& view, bool written, int64_t base_step) {
    if (view.rows_uniform && view.cols_uniform && base_step == 0 && !written) return kUniform;
    const bool too_wide = view.dtype == DType::kDouble && !compute_double_;
    const bool vectors = aligned(view.data, view.dtype, group_, base_step) && !too_wide &&
                         (integer_vectors_ || !is_integer(view.dtype));
    if (view.rows_dense) {
      layout_.contiguous |= 1u << slot;
      return vectors ? kContiguous : kScattered;
    }
    if (!written) {
      if (segment_ > 1 && dims_.run(view) % segment_ == 0) {
        layout_.units_differ = true;
        return kPerUnit;
      }
      // One period for all: those of a call, of its samples say, are the same.
      const int64_t period = dims_.period(view);
      if (vectors && period > 1 && period % group_ == 0 && (layout_.period.size == 1 || layout_.period.size == period)) {
        layout_.period = Divider(period);
        return kRepeat;
      }
    }
    if (!whole_groups_ || too_wide) return kScattered;
    const int64_t inner = dims_.stride(view, dims_.count - 1);
    if (inner != 1 || !vectors) return kStep;
    for (int dim = 0; dim < dims_.count - 1; ++dim)
      if (dims_.stride(view, dim) % group_ != 0) return kStep;
    return kRun;
  }

  Layout<kSlots>& layout_;
  const Dimensions& dims_;
  int64_t segment_;
  int group_;
  bool compute_double_, whole_groups_, integer_vectors_ = false;
};

// How segments of a given length are spread over teams, and how many blocks to launch. `by_segment`: there are sums of each.
// `per_step`: the elements that a thread takes at once. `resident`: the blocks that a multiprocessor holds.
struct Spread {
  Units units;
  int64_t blocks;
};

inline Spread spread(int64_t segments, int64_t length, bool by_segment, int64_t per_step, int resident, int device) {
  const int64_t processors = multiprocessors(device);
  Spread result;
  Units& units = result.units;
  units.length = length;
  units.team = kThreads;
  units.whole = segments == 1 && !by_segment;
  int64_t pieces = 1;
  if (units.whole) {
    units.piece_length = length;
    result.blocks = divide_up(length, kThreads * per_step);
  } else {
    // Many short segments: one for each warp, or for part of a warp, needs neither shared memory nor barriers. A segment of
    // more than 8 steps of a warp is worth a block; so is a shorter one while there are too few to fill the device.
    const int64_t threads = divide_up(length, per_step);
    const bool few = segments * kWarp < processors * kBusyThreads;
    if (threads <= (few ? kWarp : 8 * kWarp))
      units.team = static_cast<int>(std::min<int64_t>(std::bit_ceil(static_cast<uint64_t>(threads)), kWarp));
    // Few long segments: several blocks for each, four times what the device has processors for, of at least four steps.
    else if (segments < 4 * processors)
      pieces = std::clamp<int64_t>(length / (4 * kThreads * per_step), 1, divide_up(4 * processors, segments));
    units.piece_length = divide_up(divide_up(length, pieces), per_step) * per_step;
    pieces = std::max<int64_t>(divide_up(length, units.piece_length), 1);
  }
  units.pieces = Divider(pieces);
  units.count = segments * pieces;
  if (!units.whole) result.blocks = divide_up(units.count * units.team, kThreads);
  result.blocks = std::clamp<int64_t>(result.blocks, 1, processors * resident);
  return result;
}

// The shortest run of neighbours that share an element of a summed gradient whose sums are worth being kept one by one:
// they take 8 bytes for each run. Shorter ones are read again (gather.cuh).
constexpr int64_t kShortestRun = 64;

// Which gradients the main kernel makes, element by element or as sums, and which are left to gather.cuh.
class SinkPlan {
 public:
  template <int kSinks>
  SinkPlan(const Dimensions& dims, const GradientSink (&sinks)[kSinks], int64_t elements) : segment_(elements) {
    for (int k = 0; k < kSinks; ++k) {
      if (!sinks[k].wanted() || !sinks[k].summed) continue;
      if (sinks[k].numel == 1) {
        totals_.push_back(k);
        continue;
      }
      const int64_t run = dims.run(sinks[k]);
      if (run < kShortestRun) {
        gathered_.push_back(k);
        continue;
      }
      by_run_.push_back(k);
      segment_ = std::min(segment_, run);
    }
  }

  // The length of the segments that the main kernel works on: all elements of one share each of the sums by run.
  int64_t segment() const { return segment_; }
  const std::vector<int>& totals() const { return totals_; }
  const std::vector<int>& by_run() const { return by_run_; }
  const std::vector<int>& gathered() const { return gathered_; }

 private:
  int64_t segment_;
  std::vector<int> totals_, by_run_, gathered_;
};

// The length of segments, `segment` at most, in each of which a slowly varying operand, such as one scale per channel, has
// one element (Place kPerUnit). `in_order`: sums of whole rows are wanted, and it would take a kernel more to add up those of
// shorter segments. `many_sums`: sums of segments are kept, so that segments should not become short.
inline int64_t segment_length(int64_t segment, const Dimensions& dims, const std::vector<const View*>& slowly_varying,
                              bool in_order, bool many_sums) {
  constexpr int64_t kShortest = 16, kWholeGroups = 4;
  constexpr int64_t kWorthALaunch = int64_t{1} << 20;  // elements, which take some microseconds to read
  if (in_order && dims.elements() < kWorthALaunch) return segment;
  const int64_t shortest = many_sums ? kShortestRun : kShortest;
  for (const View* view : slowly_varying) {
    if (view->data == nullptr) continue;
    const int64_t run = dims.run(*view);
    if (run >= shortest && run % kWholeGroups == 0) segment = std::min(segment, run);
  }
  return segment;
}

template <int kSums>
bool any_sum(const SumPlan<kSums>& plan) {
  return std::any_of(plan.kind, plan.kind + kSums, [](SumKind kind) { return kind != kNoSum; });
}
// Whether a kernel writes elements: to one of the slots [first, end).
template <int kSlots>
bool any_written(const Layout<kSlots>& layout, int first, int end) {
  return std::any_of(layout.place + first, layout.place + end, [](Place place) { return place != kAbsent; });
}

// The memory of the total sums; `blocks` is that of the kernel.
template <int kSums>
const char* prepare_totals(SumPlan<kSums>& plan, int64_t blocks, const CudaCall& call) {
  const bool any = std::find(plan.kind, plan.kind + kSums, kTotalSum) != plan.kind + kSums;
  if (!any || blocks == 1) return nullptr;
  // Fresh for every call, and set to 0 on its stream: a counter that outlives the call would be shared by kernels that
  // run at the same time on other streams, or in replays of a graph.
  char* memory = static_cast<char*>(call.workspace(256 + kSums * blocks * sizeof(double)));
  if (call.out_of_memory) return kOutOfMemory;
  plan.arrived = reinterpret_cast<unsigned*>(memory);
  plan.block = reinterpret_cast<double*>(memory + 256);
  return message(cudaMemsetAsync(memory, 0, sizeof(unsigned), static_cast<cudaStream_t>(call.stream)));
}

}  // namespace
}  // namespace elbo_ext
