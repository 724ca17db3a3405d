// The operators of the latent stage. Schemas: schema.cpp.
#include <torch/csrc/stable/library.h>

#include "../terms/sample.h"
#include "device.h"
#include "gradients.h"

namespace elbo_ext {
namespace {

struct LatentCall {
  const OptionalTensors& inputs;
  const std::optional<Tensor>& noise;
  std::optional<int64_t> num_samples;
  Dims shape;                // of one sample
  Dims sample_shape;         // with the leading axis of samples, if there is one
  bool samples_are_rows = false;
  const Tensor* like;
  LatentProblem problem;

  LatentCall(const OptionalTensors& inputs, const std::vector<double>& constants, int64_t forms,
             const std::optional<Tensor>& seed, const std::optional<Tensor>& noise, std::optional<int64_t> num_samples,
             int64_t results, int64_t batch_dims, int64_t reduction)
      : inputs(inputs), noise(noise), num_samples(num_samples) {
    STD_TORCH_CHECK(kZAlone <= results && results <= kScore, "elbo_ext: latent has no results ", results);
    STD_TORCH_CHECK(inputs.size() == (results == kZAlone ? 2 : 4) && constants.size() == inputs.size(),
                    "elbo_ext: latent takes mu and scale, and for more than z prior_mu and prior_scale");
    STD_TORCH_CHECK(seed.has_value() != noise.has_value(), "elbo_ext: latent takes either a seed or noise");
    std::vector<const Tensor*> tensors;
    for (size_t k = 0; k < inputs.size(); ++k) {
      if (inputs[k]) tensors.push_back(&*inputs[k]);
      problem.input[k].constant = constants[k];
    }
    STD_TORCH_CHECK(inputs[0] || inputs[1], "elbo_ext: latent needs a tensor for mu or its scale");
    like = tensors.front();
    for (const Tensor* tensor : tensors) check_device("latent", *tensor, *like);
    if (noise) check_device("latent", *noise, *like);
    shape = broadcast_shape(tensors);
    check_numbers(batch_dims, reduction, shape);
    // z alone has no prior, and takes a form for one all the same: kernels are compiled for pairs of forms.
    using Forms = ScaleForms<1, 3>;
    const int known = static_cast<int>(forms);
    STD_TORCH_CHECK(Forms::within<kAnyForms>(known) == forms && form_of(known, 1) < kNumbersOfForms &&
                        form_of(known, 3) < kNumbersOfForms,
                    "elbo_ext: latent has no forms ", forms);
    problem.compute_double = any_double(tensors);
    problem.forms = static_cast<int>(forms);
    problem.results = static_cast<int>(results);
    problem.samples = num_samples.value_or(1);
    sample_shape = shape;
    if (num_samples) sample_shape.insert(sample_shape.begin(), *num_samples);
    if (seed) {
      STD_TORCH_CHECK(is_seed(*seed) && seed->numel() == 1,
                      "elbo_ext: seed is an int64 tensor of one element");
      problem.seed = static_cast<const int64_t*>(seed->data_ptr());
      problem.seed_on_host = on_cpu(*seed);
      if (!problem.seed_on_host) check_device("latent", *seed, *like);
    }
  }

  void add_operands(SpaceBuilder& builder) {
    for (size_t k = 0; k < inputs.size(); ++k)
      if (inputs[k]) {
        set_view(problem.input[k], *inputs[k]);
        builder.add(problem.input[k], *inputs[k]);
      }
    if (noise) problem.noise_sample_stride = add_samples(problem.noise, *noise, builder);
  }

  // A tensor with one slice per sample: the view is of the first slice; returns the distance of the slices.
  int64_t add_samples(View& view, const Tensor& tensor, SpaceBuilder& builder) const {
    Dims strides = broadcast_strides(tensor, sample_shape);
    int64_t sample_stride = 0;
    if (num_samples && !samples_are_rows) {
      sample_stride = strides.front();
      strides.erase(strides.begin());
    }
    set_view(view, tensor);
    builder.add(view, strides);
    return sample_stride;
  }

  // z is of the dtype that mu and scale promote to.
  DType z_type() const {
    std::vector<const Tensor*> both;
    for (int k : {0, 1})
      if (inputs[k]) both.push_back(&*inputs[k]);
    const std::vector<const Tensor*> promoting = leading(both);
    const DType first = dtype_of(*promoting.front());
    return first == dtype_of(*promoting.back()) ? first : compute_type(any_double(promoting));
  }

  // The gradient of log q or log p, one number for each sample and example; returns the distance of the samples.
  int64_t add_sample_upstream(Upstream& upstream, const Tensor& grad, int64_t batch_dims, SpaceBuilder& builder) const {
    const int64_t axes = num_samples ? 1 : 0;
    STD_TORCH_CHECK(grad.dim() == batch_dims + axes, "elbo_ext: grad has ", grad.dim(), " dimensions, not ",
                    batch_dims + axes);
    Dims strides(shape.size(), 0);
    for (int64_t i = 0; i < grad.dim(); ++i) {
      STD_TORCH_CHECK(grad.size(i) == sample_shape[i], "elbo_ext: grad has the wrong shape");
      if (i >= axes && sample_shape[i] != 1) strides[i - axes] = grad.stride(i);
    }
    set_view(upstream, grad);
    builder.add(upstream, strides);
    return axes == 0 ? 0 : grad.stride(0);
  }

  int64_t examples(int64_t batch_dims) const { return numel_of(Dims(shape.begin(), shape.begin() + batch_dims)); }
};

std::vector<Tensor> latent(OptionalTensors inputs, std::vector<double> constants, int64_t forms,
                           std::optional<Tensor> seed, std::optional<Tensor> noise, std::optional<int64_t> num_samples,
                           int64_t results, int64_t batch_dims, int64_t reduction) {
  LatentCall call(inputs, constants, forms, seed, noise, num_samples, results, batch_dims, reduction);
  LatentProblem& problem = call.problem;
  const Tensor& mu = inputs[0] ? *inputs[0] : *call.like;
  // The layout of mu carries over to z (channels_last stays channels_last) where they have one shape.
  const auto mu_sizes = mu.sizes();
  const bool like_mu = std::equal(mu_sizes.begin(), mu_sizes.end(), call.sample_shape.begin(), call.sample_shape.end());
  const Tensor z = like_mu ? empty_like(mu, call.z_type()) : empty(call.sample_shape, call.z_type(), mu);

  const bool with_kl = results == kWithKL;
  call.samples_are_rows = results >= kPathwise;
  int64_t row_dims = with_kl && reduction == kNone ? batch_dims : 0;
  if (call.samples_are_rows) {
    row_dims = batch_dims + (num_samples ? 1 : 0);
    problem.samples = 1;
  }
  SpaceBuilder builder(call.samples_are_rows ? call.sample_shape : call.shape, row_dims, /*any_order=*/false);
  call.add_operands(builder);
  problem.z_sample_stride = call.add_samples(problem.z, z, builder);
  problem.space = builder.build();
  const bool nothing = problem.space.elements() == 0;
  std::vector<Tensor> tensors{z};
  if (with_kl) {
    tensors.push_back(empty_values(call.shape, batch_dims, reduction, problem.compute_double, *call.like));
    set_values(problem.kl, tensors.back(), reduction, call.examples(batch_dims));
    if (nothing && reduction == kNone) problem.kl.row = nullptr;
  }
  if (call.samples_are_rows) {
    for (Values* values : {&problem.log_q, &problem.log_p}) {
      tensors.push_back(empty_values(call.sample_shape, row_dims, kNone, problem.compute_double, *call.like));
      if (!nothing) set_values(*values, tensors.back(), kNone, 1);
    }
  }
  if (nothing && problem.kl.total == nullptr)  // sums of nothing
    for (size_t k = 1; k < tensors.size(); ++k) fill_with_zeros(tensors[k]);
  if (problem.elements() > 0 || problem.kl.row != nullptr || problem.kl.total != nullptr)
    device_of(z).latent({"latent", call.sample_shape, z}, problem);
  return tensors;
}

std::vector<Tensor> latent_backward(OptionalTensors inputs, std::vector<double> constants, int64_t forms,
                                    std::optional<Tensor> seed, std::optional<Tensor> noise,
                                    std::optional<int64_t> num_samples, int64_t results, int64_t batch_dims,
                                    int64_t reduction, std::optional<Tensor> grad_z, std::optional<Tensor> grad_kl,
                                    std::optional<Tensor> grad_log_q, std::optional<Tensor> grad_log_p,
                                    std::vector<bool> needs) {
  STD_TORCH_CHECK(needs.size() == inputs.size() + 1, "elbo_ext: needs has ", needs.size(), " flags");
  LatentCall call(inputs, constants, forms, seed, noise, num_samples, results, batch_dims, reduction);
  STD_TORCH_CHECK((results == kWithKL || !grad_kl) && (results >= kPathwise || (!grad_log_q && !grad_log_p)),
                  "elbo_ext: latent_backward got the gradient of a result that there is not");
  for (const std::optional<Tensor>* grad : {&grad_z, &grad_kl, &grad_log_q, &grad_log_p})
    if (*grad) check_device("latent_backward", **grad, *call.like);
  LatentProblem& problem = call.problem;
  SpaceBuilder builder(call.shape, 0, /*any_order=*/false);
  Gradients gradients(call.shape);
  call.add_operands(builder);
  std::optional<Tensor> prior_gradient[kLatentInputs];
  for (size_t k = 0; k < inputs.size(); ++k) {
    if (!inputs[k] || !needs[k]) continue;
    gradients.add(*inputs[k], problem.gradient[k], builder);
    if (k >= 2) prior_gradient[k] = gradients.tensors().back();
  }
  std::optional<Tensor> noise_gradient;
  if (noise && needs.back()) {
    noise_gradient = empty(call.sample_shape, dtype_of(*noise), *noise);
    problem.noise_gradient_sample_stride = call.add_samples(problem.noise_gradient, *noise_gradient, builder);
  }
  if (problem.samples == 0)  // of no samples
    for (std::optional<Tensor>* grad : {&grad_z, &grad_log_q, &grad_log_p}) grad->reset();
  if (grad_z)
    STD_TORCH_CHECK(grad_z->dim() == static_cast<int64_t>(call.sample_shape.size()), "elbo_ext: grad_z has ",
                    grad_z->dim(), " dimensions, not ", call.sample_shape.size());
  if (grad_z) problem.grad_z_sample_stride = call.add_samples(problem.grad_z, *grad_z, builder);
  problem.with_kl = grad_kl.has_value();
  if (grad_kl) add_upstream(problem.upstream_kl, *grad_kl, call.shape, batch_dims, reduction, builder);
  problem.with_log_prob = grad_log_q || grad_log_p;
  if (grad_log_q)
    problem.upstream_q_sample_stride = call.add_sample_upstream(problem.upstream_q, *grad_log_q, batch_dims, builder);
  if (grad_log_p)
    problem.upstream_p_sample_stride = call.add_sample_upstream(problem.upstream_p, *grad_log_p, batch_dims, builder);
  problem.space = builder.build();
  const bool of_prior = problem.with_kl || problem.with_log_prob;
  if (noise_gradient && !grad_z && !problem.with_log_prob) fill_with_zeros(*noise_gradient);  // it is not of the KL
  if (problem.space.elements() == 0 || (!of_prior && !grad_z)) {
    gradients.zero();
  } else {
    device_of(*call.like).latent_backward({"latent_backward", call.sample_shape, *call.like}, problem);
    if (!of_prior)  // the sample does not depend on the prior
      for (int k : {2, 3})
        if (prior_gradient[k]) fill_with_zeros(*prior_gradient[k]);
  }
  std::vector<Tensor> tensors = gradients.take();
  if (noise_gradient) tensors.push_back(*noise_gradient);
  return tensors;
}

Tensor normal_noise(Tensor seed, int64_t count, bool double_precision, int64_t first) {
  STD_TORCH_CHECK(is_seed(seed) && seed.is_contiguous() && count >= 0 && first >= 0,
                  "elbo_ext: seed is a contiguous int64 tensor, count and first are not negative");
  const Dims shape{seed.numel(), count};
  const Tensor result = empty(shape, compute_type(double_precision), seed);
  if (result.numel() > 0) device_of(seed).normal_noise({"normal_noise", shape, seed}, seed, first, result);
  return result;
}

void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("latent", TORCH_BOX(&latent));
  library.impl("latent_backward", TORCH_BOX(&latent_backward));
  library.impl("normal_noise", TORCH_BOX(&normal_noise));
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) { elbo_ext::register_ops(library); }
STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CUDA, library) { elbo_ext::register_ops(library); }
