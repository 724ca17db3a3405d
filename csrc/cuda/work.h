// The work of a main kernel, and its sums: from segments to units and blocks, the launch, and what is left to add up after
// it. On the host.
#pragma once

#include "gather.cuh"

namespace elbo_ext {
namespace {

template <int kSums>
class Work {
 public:
  // Fills `units`, for segments of `length` elements. `by_segment`: there are sums of each. `per_step`: the elements that a
  // thread takes at once. `resident`: the blocks that a multiprocessor holds.
  Work(Units& units, SumPlan<kSums>& sums, const Dimensions& dims, int64_t length, bool by_segment, int64_t per_step,
       int resident, const CudaCall& call)
      : units_(units), sums_(sums), dims_(dims), length_(length), call_(call) {
    const Spread work =
        spread(length == 0 ? 1 : dims.elements() / length, length, by_segment, per_step, resident, call.device);
    units = work.units;
    blocks_ = work.blocks;
  }
  int64_t blocks() const { return blocks_; }

  // Sum k, one number per segment or per several segments: all elements of a segment share one element of `out`. The kernel
  // writes straight into `out` where that has one element per unit, in order; else into doubles, which are added up after
  // it.
  void add_segment_sums(int k, const View& out) {
    sums_.kind[k] = kUnitSum;
    std::vector<GatherDimension<2>> segments;
    int64_t length = 1, number = units_.pieces.size, place = 1;
    bool in_order = units_.pieces.size == 1;
    for (int dim = dims_.count - 1; dim >= 0; --dim) {
      if (length < length_) {
        length *= dims_.size[dim];
        continue;
      }
      segments.insert(segments.begin(), {dims_.size[dim], {number, dims_.stride(out, dim)}});
      in_order = in_order && dims_.stride(out, dim) == place;
      number *= dims_.size[dim];
      place *= dims_.size[dim];
    }
    sums_.out[k] = array_of(out);
    if (in_order) return;
    if (units_.pieces.size > 1) segments.push_back({units_.pieces.size, {1, 0}});
    auto* numbers = static_cast<double*>(call_.workspace(number * static_cast<int64_t>(sizeof(double))));
    sums_.out[k] = {reinterpret_cast<char*>(numbers), DType::kDouble};
    pending_.push_back({numbers, array_of(out), std::move(segments)});
  }

  // Sum k of the values of a forward pass: over each row of the space, or over everything.
  void add_values(int k, const Values& values, DType compute, const Space& space) {
    if (values.row != nullptr) add_segment_sums(k, dense_rows(values.row, compute, space));
    if (values.total != nullptr) sums_.total(k, {as_bytes(values.total), compute}, values.divisor);
  }
  // Those of the gradients that are sums: over everything, or over runs of neighbours.
  template <int kSinks>
  void add_gradients(const SinkPlan& sinks, const GradientSink (&gradient)[kSinks]) {
    for (int k : sinks.totals()) sums_.total(k, array_of(gradient[k]));
    for (int k : sinks.by_run()) add_segment_sums(k, gradient[k]);
  }

  // Launches the kernel, by launch_kernel(), and adds up what it leaves. A kernel that neither `writes` elements nor makes
  // sums is left out: all gradients are gathered.
  template <class Launch>
  const char* run(bool writes, Launch&& launch_kernel) {
    const char* error = prepare_totals(sums_, blocks_, call_);
    if (error == nullptr && (writes || any_sum(sums_))) error = launch_kernel();
    for (Pending& sum : pending_)
      if (error == nullptr) error = fold(sum.from, sum.out, std::move(sum.dims), call_);
    return error;
  }

 private:
  struct Pending {
    const double* from;
    Array out;
    std::vector<GatherDimension<2>> dims;
  };
  const Units& units_;
  SumPlan<kSums>& sums_;
  const Dimensions& dims_;
  int64_t length_, blocks_;
  const CudaCall& call_;
  std::vector<Pending> pending_;
};

}  // namespace
}  // namespace elbo_ext
