// The operators of the term_sum family on the CPU. Schemas: schema.cpp.
#include <torch/csrc/stable/library.h>

#include "cpu_run.h"
#include "gradients.h"

namespace elbo_ext {

namespace {

// Fewer elements than this are not worth waking another thread for.
constexpr int64_t kLeastElements = 65536;

// A term over its operands: what all three operators have in common.
struct Call {
  const OptionalTensors& inputs;
  const std::optional<Tensor>& weight;
  int64_t batch_dims;
  Dims shape;
  const Tensor* like;  // any operand, for the device
  TermSumProblem problem;

  Call(int64_t term, const OptionalTensors& inputs, const std::vector<double>& constants,
       const std::optional<Tensor>& weight, int64_t form, int64_t prior_form, int64_t batch_dims)
      : inputs(inputs), weight(weight), batch_dims(batch_dims) {
    STD_TORCH_CHECK(inputs.size() <= kMaxInputs && constants.size() == inputs.size(),
                    "elbo_ext: a term takes at most ", kMaxInputs, " inputs, each with a constant");
    std::vector<const Tensor*> tensors;
    for (size_t k = 0; k < inputs.size(); ++k) {
      if (inputs[k]) tensors.push_back(&*inputs[k]);
      problem.input[k].constant = constants[k];
    }
    STD_TORCH_CHECK(!tensors.empty(), "elbo_ext: a term needs a tensor");
    if (weight) tensors.push_back(&*weight);
    like = tensors.front();
    shape = broadcast_shape(tensors);
    STD_TORCH_CHECK(0 <= batch_dims && batch_dims <= static_cast<int64_t>(shape.size()), "elbo_ext: batch_dims is ",
                    batch_dims, " for ", shape.size(), " dimensions");
    problem.term = static_cast<int>(term);
    problem.form = static_cast<int>(form);
    problem.prior_form = static_cast<int>(prior_form);
    problem.compute_double = any_double(tensors);
  }

  const std::optional<Tensor>& operand(int k) const { return k == kWeight ? weight : inputs[k]; }

  // Calls visit(slot, tensor) for the operands that are tensors.
  template <class Visit>
  void for_each_operand(Visit&& visit) const {
    for (size_t k = 0; k < inputs.size(); ++k)
      if (inputs[k]) visit(static_cast<int>(k), *inputs[k]);
    if (weight) visit(kWeight, *weight);
  }

  void enter_operands(SpaceBuilder& builder) {
    for_each_operand([&](int k, const Tensor& tensor) {
      set_view(problem.input[k], tensor);
      builder.add(problem.input[k], tensor);
    });
  }

  // needs: one flag for each input, and one for the weight.
  void enter_gradients(const std::vector<bool>& needs, Gradients& gradients, SpaceBuilder& builder) {
    STD_TORCH_CHECK(needs.size() == inputs.size() + 1, "elbo_ext: needs has ", needs.size(), " flags");
    for_each_operand([&](int k, const Tensor& tensor) {
      if (needs[k == kWeight ? inputs.size() : k]) gradients.add(tensor, problem.gradient[k], builder);
    });
    problem.wants_gradient = !gradients.tensors().empty();
  }

  void run() const {
    run_parallel(problem.blocks, numel_of(shape), kLeastElements,
                 [&](int64_t begin, int64_t end) { cpu_kernels().term_sum(problem, begin, end); });
  }
};

Tensor term_sum(int64_t term, OptionalTensors inputs, std::vector<double> constants, std::optional<Tensor> weight,
                int64_t form, int64_t prior_form, int64_t batch_dims, int64_t reduction) {
  Call call(term, inputs, constants, weight, form, prior_form, batch_dims);
  TermSumProblem& problem = call.problem;
  Values values(call.shape, batch_dims, reduction, problem.compute_double, *call.like);

  // Rows matter only where their sums are asked for; a row of one element is its own sum.
  const bool elementwise = reduction == kNone && values.examples() == numel_of(call.shape);
  const bool rows = reduction == kNone && !elementwise;
  SpaceBuilder builder(call.shape, rows ? batch_dims : 0, /*any_order=*/!elementwise);
  call.enter_operands(builder);
  problem.space = builder.build();
  problem.blocks = make_blocks(problem.space, 0);
  if (problem.blocks.count == 0) {
    if (reduction == kNone) fill_with_zeros(values.result());
    else values.finish(problem.blocks);
    return values.result();
  }
  if (elementwise) problem.element_value = values.result().data_ptr();
  else values.connect(problem);
  call.run();
  if (!elementwise) values.finish(problem.blocks);
  return values.result();
}

std::vector<Tensor> term_sum_backward(int64_t term, OptionalTensors inputs, std::vector<double> constants,
                                      std::optional<Tensor> weight, int64_t form, int64_t prior_form,
                                      int64_t batch_dims, int64_t reduction, Tensor grad, std::vector<bool> needs) {
  Call call(term, inputs, constants, weight, form, prior_form, batch_dims);
  TermSumProblem& problem = call.problem;
  SpaceBuilder builder(call.shape, 0, /*any_order=*/true);
  Gradients gradients(call.shape);
  call.enter_operands(builder);
  call.enter_gradients(needs, gradients, builder);

  if (reduction == kNone) {
    STD_TORCH_CHECK(grad.dim() == batch_dims, "elbo_ext: grad has ", grad.dim(), " dimensions, not ", batch_dims);
    Dims strides(call.shape.size(), 0);
    for (int64_t i = 0; i < batch_dims; ++i) {
      STD_TORCH_CHECK(grad.size(i) == call.shape[i], "elbo_ext: grad has the wrong shape");
      if (call.shape[i] != 1) strides[i] = grad.stride(i);
    }
    set_view(problem.upstream, grad);
    builder.add(problem.upstream, strides);
  } else {
    STD_TORCH_CHECK(grad.numel() == 1, "elbo_ext: grad of a reduced result has one element");
    const Dims batch(call.shape.begin(), call.shape.begin() + batch_dims);
    problem.upstream.constant = read_scalar(grad) / (reduction == kMean ? static_cast<double>(numel_of(batch)) : 1.0);
  }
  problem.space = builder.build();
  problem.blocks = make_blocks(problem.space, gradients.max_groups());
  if (problem.blocks.count == 0) {
    gradients.zero();
    return gradients.take();
  }
  gradients.allocate_partials(problem.blocks);
  call.run();
  gradients.finish(problem.blocks);
  return gradients.take();
}

// The reduced value, and behind it the gradients of factor * value.
struct ValueAndGradients {
  Tensor value;
  int64_t examples;
  std::vector<Tensor> gradients;
};

ValueAndGradients run_with_gradients(Call& call, int64_t reduction, double factor, const std::vector<bool>& needs) {
  STD_TORCH_CHECK(reduction != kNone, "elbo_ext: gradients in the forward pass need a reduced result");
  TermSumProblem& problem = call.problem;
  Values values(call.shape, call.batch_dims, reduction, problem.compute_double, *call.like);
  SpaceBuilder builder(call.shape, 0, /*any_order=*/true);
  Gradients gradients(call.shape);
  call.enter_operands(builder);
  call.enter_gradients(needs, gradients, builder);
  problem.upstream.constant = reduction == kMean ? factor / static_cast<double>(values.examples()) : factor;
  problem.space = builder.build();
  problem.blocks = make_blocks(problem.space, gradients.max_groups());
  if (problem.blocks.count == 0) gradients.zero();
  gradients.allocate_partials(problem.blocks);
  values.connect(problem);
  call.run();
  values.finish(problem.blocks);
  gradients.finish(problem.blocks);
  return {values.result(), values.examples(), gradients.take()};
}

std::vector<Tensor> term_sum_with_gradients(int64_t term, OptionalTensors inputs, std::vector<double> constants,
                                            std::optional<Tensor> weight, int64_t form, int64_t prior_form,
                                            int64_t batch_dims, int64_t reduction, double factor,
                                            std::vector<bool> needs) {
  Call call(term, inputs, constants, weight, form, prior_form, batch_dims);
  ValueAndGradients result = run_with_gradients(call, reduction, factor, needs);
  result.gradients.insert(result.gradients.begin(), result.value);
  return std::move(result.gradients);
}

std::vector<Tensor> elbo_with_gradients(int64_t term, OptionalTensors inputs, std::vector<double> constants,
                                        std::optional<Tensor> weight, int64_t form, int64_t prior_form,
                                        int64_t batch_dims, int64_t reduction, Tensor kl, double beta,
                                        std::vector<bool> needs) {
  Call call(term, inputs, constants, weight, form, prior_form, batch_dims);
  ValueAndGradients result = run_with_gradients(call, reduction, /*factor=*/-1.0, needs);

  const Tensor dense = kl.is_contiguous() ? kl : torch::stable::contiguous(kl);
  const int64_t count = dense.numel(), repeats = count == 0 ? 0 : result.examples / count;
  const double of_each = reduction == kMean ? 1.0 / static_cast<double>(count) : static_cast<double>(repeats);
  const double reduced_kl = sum_of(dense) * of_each;
  const double loss = beta * reduced_kl - read_scalar(result.value);
  const DType type = compute_type(call.problem.compute_double);
  const Dims kl_shape(kl.sizes().begin(), kl.sizes().end());
  std::vector<Tensor> results{scalar(loss, {}, type, kl), result.value, scalar(reduced_kl, {}, type, kl),
                              scalar(of_each, kl_shape, type, kl)};
  results.insert(results.end(), result.gradients.begin(), result.gradients.end());
  return results;
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) {
  library.impl("term_sum", TORCH_BOX(&elbo_ext::term_sum));
  library.impl("term_sum_backward", TORCH_BOX(&elbo_ext::term_sum_backward));
  library.impl("term_sum_with_gradients", TORCH_BOX(&elbo_ext::term_sum_with_gradients));
  library.impl("elbo_with_gradients", TORCH_BOX(&elbo_ext::elbo_with_gradients));
}
