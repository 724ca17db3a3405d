// The operators of the term_sum family. Schemas: schema.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "device.h"
#include "gradients.h"
#include "terms.h"

namespace elbo_ext {

namespace {

// A term over its operands: what all three operators have in common.
struct TermCall {
  const OptionalTensors& operands;  // the inputs, and the weight
  int64_t batch_dims;
  Dims shape;
  const Tensor* like;  // any operand, for the device
  TermSumProblem problem;

  TermCall(int64_t term, const OptionalTensors& operands, const std::vector<double>& constants, int64_t forms,
           int64_t batch_dims, int64_t reduction)
      : operands(operands), batch_dims(batch_dims) {
    const TermInfo* const info = find_term(term);
    STD_TORCH_CHECK(info != nullptr, "elbo_ext: there is no term ", term);
    STD_TORCH_CHECK(operands.size() == info->inputs.size() + 1 && constants.size() == operands.size(), "elbo_ext: ",
                    info->name, " takes ", info->inputs.size(), " inputs and a weight, each with a constant");
    STD_TORCH_CHECK(has_forms(*info, forms), "elbo_ext: ", info->name, " has no forms ", forms);
    std::vector<const Tensor*> tensors;
    for (size_t k = 0; k < operands.size(); ++k) {
      STD_TORCH_CHECK(!operands[k] || k < info->tensors || k == info->inputs.size(), "elbo_ext: ", info->name,
                      " takes no tensor for its input ", k, ", which is a number");
      if (operands[k]) tensors.push_back(&*operands[k]);
      problem.operand[k].constant = constants[k];
    }
    STD_TORCH_CHECK(!tensors.empty(), "elbo_ext: a term needs a tensor");
    like = tensors.front();
    for (const Tensor* tensor : tensors) check_device("a term", *tensor, *like);
    shape = broadcast_shape(tensors);
    check_numbers(batch_dims, reduction, shape);
    problem.term = static_cast<int>(term);
    problem.forms = static_cast<int>(forms);
    problem.compute_double = any_double(tensors);
  }

  void add_operands(SpaceBuilder& builder) {
    for (size_t k = 0; k < operands.size(); ++k) {
      if (!operands[k]) continue;
      set_view(problem.operand[k], *operands[k]);
      builder.add(problem.operand[k], *operands[k]);
    }
  }

  // needs: one flag for each operand.
  void add_gradients(const std::vector<bool>& needs, Gradients& gradients, SpaceBuilder& builder) {
    STD_TORCH_CHECK(needs.size() == operands.size(), "elbo_ext: needs has ", needs.size(), " flags");
    for (size_t k = 0; k < operands.size(); ++k)
      if (operands[k] && needs[k]) gradients.add(*operands[k], problem.gradient[k], builder);
    problem.wants_gradient = !gradients.tensors().empty();
  }

  int64_t examples() const { return numel_of(Dims(shape.begin(), shape.begin() + batch_dims)); }

  void run(const char* op) { device_of(*like).term_sum({op, shape, *like}, problem); }
};

Tensor term_sum(int64_t term, OptionalTensors operands, std::vector<double> constants, int64_t forms,
                int64_t batch_dims, int64_t reduction) {
  TermCall call(term, operands, constants, forms, batch_dims, reduction);
  TermSumProblem& problem = call.problem;
  const Tensor result = empty_values(call.shape, batch_dims, reduction, problem.compute_double, *call.like);
  set_values(problem.values, result, reduction, call.examples());

  // Rows matter only where their sums are asked for; a row of one element is its own sum.
  const bool elementwise = reduction == kNone && call.examples() == numel_of(call.shape);
  if (elementwise) std::swap(problem.values.element, problem.values.row);
  SpaceBuilder builder(call.shape, reduction == kNone && !elementwise ? batch_dims : 0, /*any_order=*/!elementwise);
  call.add_operands(builder);
  problem.space = builder.build();
  if (problem.space.elements() == 0 && reduction == kNone) fill_with_zeros(result);
  else call.run("term_sum");
  return result;
}

std::vector<Tensor> term_sum_backward(int64_t term, OptionalTensors operands, std::vector<double> constants, int64_t forms,
                                      int64_t batch_dims, int64_t reduction, Tensor grad,
                                      std::vector<bool> needs) {
  TermCall call(term, operands, constants, forms, batch_dims, reduction);
  check_device("term_sum_backward", grad, *call.like);
  TermSumProblem& problem = call.problem;
  SpaceBuilder builder(call.shape, 0, /*any_order=*/true);
  Gradients gradients(call.shape);
  call.add_operands(builder);
  call.add_gradients(needs, gradients, builder);
  add_upstream(problem.upstream, grad, call.shape, batch_dims, reduction, builder);
  problem.space = builder.build();
  if (problem.space.elements() == 0) gradients.zero();
  else call.run("term_sum_backward");
  return gradients.take();
}

// Adds the reduced value to a call, and the gradients of factor * value.
struct ValueAndGradients {
  Tensor value;
  Gradients gradients;

  ValueAndGradients(TermCall& call, int64_t reduction, double factor, const std::vector<bool>& needs)
      : value(empty_values(call.shape, call.batch_dims, reduction, call.problem.compute_double, *call.like)),
        gradients(call.shape) {
    STD_TORCH_CHECK(reduction != kNone, "elbo_ext: gradients in the forward pass need a reduced result");
    TermSumProblem& problem = call.problem;
    SpaceBuilder builder(call.shape, 0, /*any_order=*/true);
    call.add_operands(builder);
    call.add_gradients(needs, gradients, builder);
    set_values(problem.values, value, reduction, call.examples());
    problem.upstream.constant = factor / problem.values.divisor;
    problem.space = builder.build();
    if (problem.space.elements() > 0) return;
    gradients.zero();
    for (GradientSink& sink : problem.gradient) sink = {};  // nothing is left for the device but the value of no element
  }

  // The values, and after them the gradients.
  std::vector<Tensor> take(std::vector<Tensor> values) {
    for (Tensor& gradient : gradients.take()) values.push_back(std::move(gradient));
    return values;
  }
};

std::vector<Tensor> term_sum_with_gradients(int64_t term, OptionalTensors operands, std::vector<double> constants,
                                            int64_t forms, int64_t batch_dims, int64_t reduction, double factor,
                                            std::vector<bool> needs) {
  TermCall call(term, operands, constants, forms, batch_dims, reduction);
  ValueAndGradients result(call, reduction, factor, needs);
  call.run("term_sum_with_gradients");
  return result.take({result.value});
}

std::vector<Tensor> elbo_with_gradients(int64_t term, OptionalTensors operands, std::vector<double> constants, int64_t forms,
                                        int64_t batch_dims, int64_t reduction, Tensor kl, double beta,
                                        std::vector<bool> needs) {
  TermCall call(term, operands, constants, forms, batch_dims, reduction);
  check_device("elbo_with_gradients", kl, *call.like);
  ValueAndGradients result(call, reduction, /*factor=*/-1.0, needs);

  const Tensor dense = kl.is_contiguous() ? kl : torch::stable::contiguous(kl);
  const DType type = compute_type(call.problem.compute_double);
  const Tensor loss = empty({}, type, kl), reduced_kl = empty({}, type, kl);
  const Tensor kl_factor = empty_expanded(Dims(kl.sizes().begin(), kl.sizes().end()), type, kl);
  ELBO& elbo = call.problem.elbo;
  elbo.kl = dense.data_ptr();
  elbo.kl_dtype = dtype_of(kl);
  elbo.kl_count = dense.numel();
  const int64_t repeats = elbo.kl_count == 0 ? 0 : call.examples() / elbo.kl_count;
  elbo.kl_factor = reduction == kMean ? 1.0 / static_cast<double>(elbo.kl_count) : static_cast<double>(repeats);
  elbo.beta = beta;
  elbo.loss = loss.data_ptr();
  elbo.reduced_kl = reduced_kl.data_ptr();
  elbo.kl_factor_out = elbo.kl_count == 0 ? nullptr : kl_factor.data_ptr();
  call.run("elbo_with_gradients");
  return result.take({loss, result.value, reduced_kl, kl_factor});
}

void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("term_sum", TORCH_BOX(&term_sum));
  library.impl("term_sum_backward", TORCH_BOX(&term_sum_backward));
  library.impl("term_sum_with_gradients", TORCH_BOX(&term_sum_with_gradients));
  library.impl("elbo_with_gradients", TORCH_BOX(&elbo_with_gradients));
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) { elbo_ext::register_ops(library); }
STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CUDA, library) { elbo_ext::register_ops(library); }
