// The operators of terms over a dimension. Schemas: schema.cpp.
#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../terms/categorical.h"
#include "device.h"

namespace elbo_ext {
namespace {

#define ELBO_KL_NUMBER(number, Term, name) number,
constexpr int kNumbers[] = {ELBO_FOR_EACH_CLASS_TERM(ELBO_KL_NUMBER)};
#undef ELBO_KL_NUMBER
constexpr int kLabelsTerm = kNumbers[0], kKLTerm = kNumbers[2];

void check_forms(int64_t forms) { STD_TORCH_CHECK(forms == 0, "elbo_ext: terms over a dimension have no forms ", forms); }

// A term over its operands: what all operators have in common.
struct ClassCall {
  const OptionalTensors& operands;
  int64_t batch_dims, reduction;
  Dims shape, rows;  // with the classes, and without
  const Tensor* like;
  CategoricalProblem problem;

  ClassCall(int64_t term, const OptionalTensors& operands, const std::vector<double>& constants, int64_t batch_dims,
            int64_t reduction)
      : operands(operands), batch_dims(batch_dims), reduction(reduction) {
    STD_TORCH_CHECK(std::count(std::begin(kNumbers), std::end(kNumbers), term) == 1,
                    "elbo_ext: there is no term over a dimension ", term);
    STD_TORCH_CHECK(operands.size() == kClassOperands && constants.size() == operands.size(),
                    "elbo_ext: a term over a dimension takes two inputs and a weight, each with a constant");
    const bool labels = term == kLabelsTerm;
    const std::optional<Tensor>& logits = operands[term == kKLTerm ? 0 : 1];
    STD_TORCH_CHECK(logits.has_value() && (operands[0].has_value()), "elbo_ext: x and logits are tensors");
    std::vector<const Tensor*> tensors;
    for (size_t k = 0; k < operands.size(); ++k) {
      if (operands[k]) tensors.push_back(&*operands[k]);
      problem.operand[k].constant = constants[k];
    }
    like = &*logits;
    for (const Tensor* tensor : tensors) check_device("a term over a dimension", *tensor, *like);
    shape = broadcast_shape(tensors);
    STD_TORCH_CHECK(!shape.empty() && shape.back() > 0, "elbo_ext: there have to be classes");
    for (const size_t k : {size_t{0}, size_t{2}})
      STD_TORCH_CHECK(!operands[k] || (k == 0 && !labels) || (operands[k]->dim() > 0 && operands[k]->size(-1) == 1),
                      "elbo_ext: labels and the weight have one element for all classes");
    rows = Dims(shape.begin(), shape.end() - 1);
    check_numbers(batch_dims, reduction, rows);
    problem.term = static_cast<int>(term);
    problem.classes = shape.back();
    problem.compute_double = any_double(tensors);
  }

  // Adds a tensor of the whole shape, or one that broadcasts to it.
  template <class Member>
  void add(Member& member, const Tensor& tensor, SpaceBuilder& builder) const {
    Dims strides = broadcast_strides(tensor, shape);
    set_view(member, tensor);
    member.class_stride = strides.back();
    strides.pop_back();
    builder.add(member, strides);
  }
  // The same with a first axis of samples, whose distance it returns.
  template <class Member>
  int64_t add_samples(Member& member, const Tensor& tensor, bool has_axis, SpaceBuilder& builder) const {
    Dims all = shape;
    if (has_axis) all.insert(all.begin(), tensor.size(0));
    Dims strides = broadcast_strides(tensor, all);
    const int64_t distance = has_axis ? strides.front() : 0;
    if (has_axis) strides.erase(strides.begin());
    set_view(member, tensor);
    member.class_stride = strides.back();
    strides.pop_back();
    builder.add(member, strides);
    return distance;
  }

  SpaceBuilder builder() const { return SpaceBuilder(rows, static_cast<int64_t>(rows.size()), /*any_order=*/false); }
  void add_operands(SpaceBuilder& builder) {
    for (size_t k = 0; k < operands.size(); ++k)
      if (operands[k]) add(problem.operand[k], *operands[k], builder);
  }

  int64_t examples() const { return numel_of(Dims(rows.begin(), rows.begin() + batch_dims)); }
  void run(const char* op) {
    if (problem.space.rows > 0) device_of(*like).categorical({op, shape, *like}, problem);
  }

  // The values of the rows, which the kernel writes, and what is to be made of them.
  Tensor row_values() {
    const Tensor values = empty(rows, compute_type(problem.compute_double), *like);
    problem.row_value = values.data_ptr();
    return values;
  }
  Tensor reduced(const char* op, const Tensor& values) const {
    if (reduction == kNone && batch_dims == static_cast<int64_t>(rows.size())) return values;
    const Tensor result = empty_values(rows, batch_dims, reduction, problem.compute_double, *like);
    FoldProblem fold;
    fold.compute_double = problem.compute_double;
    fold.count = result.numel();
    fold.length = fold.count == 0 ? 0 : values.numel() / fold.count;
    fold.numbers = values.data_ptr();
    fold.divisor = reduction == kMean ? static_cast<double>(examples()) : 1.0;
    fold.out = result.data_ptr();
    if (fold.count > 0) device_of(*like).fold({op, shape, *like}, fold);
    return result;
  }

  std::vector<Tensor> add_gradients(const std::vector<bool>& needs, SpaceBuilder& builder) {
    STD_TORCH_CHECK(needs.size() == operands.size(), "elbo_ext: needs has ", needs.size(), " flags");
    std::vector<Tensor> gradients;
    for (size_t k = 0; k < operands.size(); ++k) {
      if (!operands[k] || !needs[k]) continue;
      const Tensor& operand = *operands[k];
      const int64_t whole = k == 2 ? numel_of(rows) : numel_of(shape);
      STD_TORCH_CHECK(operand.numel() == whole, "elbo_ext: an operand that has a gradient has the joint shape ", text_of(shape));
      gradients.push_back(elbo_ext::empty_like(operand));
      add(problem.gradient[k], gradients.back(), builder);
    }
    problem.wants_gradient = !gradients.empty();
    return gradients;
  }
};

Tensor categorical(int64_t term, OptionalTensors operands, std::vector<double> constants, int64_t forms,
                   int64_t batch_dims, int64_t reduction) {
  check_forms(forms);
  ClassCall call(term, operands, constants, batch_dims, reduction);
  SpaceBuilder builder = call.builder();
  call.add_operands(builder);
  const Tensor values = call.row_values();
  call.problem.space = builder.build();
  call.run("categorical");
  return call.reduced("categorical", values);
}

std::vector<Tensor> categorical_backward(int64_t term, OptionalTensors operands, std::vector<double> constants,
                                         int64_t forms, int64_t batch_dims, int64_t reduction, Tensor grad,
                                         std::vector<bool> needs) {
  check_forms(forms);
  ClassCall call(term, operands, constants, batch_dims, reduction);
  check_device("categorical_backward", grad, *call.like);
  SpaceBuilder builder = call.builder();
  call.add_operands(builder);
  std::vector<Tensor> gradients = call.add_gradients(needs, builder);
  add_upstream(call.problem.upstream, grad, call.rows, batch_dims, reduction, builder);
  call.problem.space = builder.build();
  call.run("categorical_backward");
  return gradients;
}

std::vector<Tensor> categorical_with_gradients(int64_t term, OptionalTensors operands, std::vector<double> constants,
                                               int64_t forms, int64_t batch_dims, int64_t reduction, double factor,
                                               std::vector<bool> needs) {
  check_forms(forms);
  ClassCall call(term, operands, constants, batch_dims, reduction);
  STD_TORCH_CHECK(reduction != kNone, "elbo_ext: gradients in the forward pass need a reduced result");
  SpaceBuilder builder = call.builder();
  call.add_operands(builder);
  const Tensor values = call.row_values();
  std::vector<Tensor> results = call.add_gradients(needs, builder);
  call.problem.upstream.constant = factor / (reduction == kMean ? static_cast<double>(call.examples()) : 1.0);
  call.problem.space = builder.build();
  call.run("categorical_with_gradients");
  results.insert(results.begin(), call.reduced("categorical_with_gradients", values));
  return results;
}

std::vector<Tensor> categorical_sample(OptionalTensors operands, std::vector<double> constants, std::optional<Tensor> seed,
                                       std::optional<Tensor> noise, std::optional<int64_t> num_samples, int64_t batch_dims,
                                       int64_t reduction) {
  ClassCall call(kKLTerm, operands, constants, batch_dims, reduction);
  STD_TORCH_CHECK(seed.has_value() != noise.has_value(), "elbo_ext: categorical_sample takes either a seed or noise");
  CategoricalProblem& problem = call.problem;
  SpaceBuilder builder = call.builder();
  call.add_operands(builder);
  Dims shape = call.shape;
  if (num_samples) shape.insert(shape.begin(), *num_samples);
  const Tensor z = empty(shape, dtype_of(*call.like), *call.like);
  fill_with_zeros(z);
  problem.z_sample_stride = call.add_samples(problem.z, z, num_samples.has_value(), builder);
  if (noise) {
    check_device("categorical_sample", *noise, *call.like);
    problem.noise_sample_stride = call.add_samples(problem.noise, *noise, num_samples.has_value(), builder);
  } else {
    STD_TORCH_CHECK(is_seed(*seed) && seed->is_contiguous() && seed->numel() == 1, "elbo_ext: seed is an int64 tensor of one element");
    problem.seed = static_cast<const int64_t*>(seed->data_ptr());
    problem.seed_on_host = on_cpu(*seed);
    if (!problem.seed_on_host) check_device("categorical_sample", *seed, *call.like);
  }
  problem.samples = num_samples.value_or(1);
  const Tensor values = call.row_values();
  problem.space = builder.build();
  call.run("categorical_sample");
  return {z, call.reduced("categorical_sample", values)};
}

std::vector<Tensor> categorical_sample_backward(OptionalTensors operands, std::vector<double> constants, int64_t batch_dims,
                                                int64_t reduction, std::optional<Tensor> grad_z,
                                                std::optional<Tensor> grad_kl, std::vector<bool> needs) {
  ClassCall call(kKLTerm, operands, constants, batch_dims, reduction);
  SpaceBuilder builder = call.builder();
  call.add_operands(builder);
  std::vector<Tensor> gradients = call.add_gradients(needs, builder);
  if (grad_z) {
    check_device("categorical_sample_backward", *grad_z, *call.like);
    call.add(call.problem.grad_z, *grad_z, builder);
  }
  if (grad_kl) {
    check_device("categorical_sample_backward", *grad_kl, *call.like);
    add_upstream(call.problem.upstream, *grad_kl, call.rows, batch_dims, reduction, builder);
  }
  call.problem.space = builder.build();
  call.run("categorical_sample_backward");
  return gradients;
}

void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("categorical", TORCH_BOX(&categorical));
  library.impl("categorical_backward", TORCH_BOX(&categorical_backward));
  library.impl("categorical_with_gradients", TORCH_BOX(&categorical_with_gradients));
  library.impl("categorical_sample", TORCH_BOX(&categorical_sample));
  library.impl("categorical_sample_backward", TORCH_BOX(&categorical_sample_backward));
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) { elbo_ext::register_ops(library); }
STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CUDA, library) { elbo_ext::register_ops(library); }
