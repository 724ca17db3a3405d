#include "gradients.h"

#include <algorithm>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace elbo_ext {
namespace {

// A group's buffers together may take this part of what the operands of the space take, and no more groups than the
// second number are ever needed to keep the threads busy.
constexpr int64_t kElementsPerPartial = 32, kMostGroups = 64;

template <class S>
void add_up(const GradientSink& sink, int64_t groups, void* out) {
  for (int64_t i = 0; i < sink.numel; ++i) {
    double sum = 0;
    for (int64_t group = 0; group < groups; ++group) sum += sink.partial[group * sink.numel + i];
    static_cast<S*>(out)[i] = static_cast<S>(static_cast<float>(sum));
  }
}
template <>
void add_up<double>(const GradientSink& sink, int64_t groups, void* out) {
  for (int64_t i = 0; i < sink.numel; ++i) {
    double sum = 0;
    for (int64_t group = 0; group < groups; ++group) sum += sink.partial[group * sink.numel + i];
    static_cast<double*>(out)[i] = sum;
  }
}

}  // namespace

void Gradients::add(const Tensor& operand, GradientSink& sink, SpaceBuilder& space) {
  sink.numel = operand.numel();
  sink.summed = sink.numel != numel_;
  tensors_.push_back(empty_like(operand));  // dense: a place in memory is a number below numel
  set_view(sink, tensors_.back());
  space.add(sink, tensors_.back());
  sinks_.push_back(&sink);
}

int64_t Gradients::max_groups() const {
  int64_t numel = 0;
  for (const GradientSink* sink : sinks_)
    if (sink->summed) numel += sink->numel;
  return numel == 0 ? 0 : std::clamp<int64_t>(numel_ / (kElementsPerPartial * numel), 1, kMostGroups);
}

void Gradients::allocate_partials(const Blocks& blocks) {
  int64_t total = 0;
  for (const GradientSink* sink : sinks_)
    if (sink->summed) total += sink->numel * blocks.groups;
  partials_ = std::make_unique<double[]>(total);  // zeros
  double* next = partials_.get();
  for (GradientSink* sink : sinks_) {
    if (!sink->summed) continue;
    sink->partial = next;
    sink->partial_stride = sink->numel;
    next += sink->numel * blocks.groups;
  }
}

void Gradients::finish(const Blocks& blocks) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  for (size_t i = 0; i < sinks_.size(); ++i) {
    const GradientSink& sink = *sinks_[i];
    if (!sink.summed) continue;
    switch (sink.dtype) {
      case DType::kDouble: add_up<double>(sink, blocks.groups, sink.data); break;
      case DType::kFloat: add_up<float>(sink, blocks.groups, sink.data); break;
      case DType::kBFloat16: add_up<BFloat16>(sink, blocks.groups, sink.data); break;
      default: add_up<Half>(sink, blocks.groups, sink.data); break;
    }
  }
}

void Gradients::zero() const {
  for (const Tensor& tensor : tensors_) fill_with_zeros(tensor);
}

}  // namespace elbo_ext
