// The operators of the latent stage. Schemas: schema.cpp.
#include <deque>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../terms/sample.h"
#include "device.h"
#include "gradients.h"

namespace elbo_ext {
namespace {

// mu and the scale, and for more than z the prior's.
size_t inputs_of(int64_t results) { return results == kZAlone ? 2 : kLatentInputs; }

struct LatentCall {
  const OptionalTensors& inputs;
  const std::optional<Tensor>& noise;
  std::optional<int64_t> num_samples;
  Dims shape;                // of one sample
  Dims sample_shape;         // with the leading axis of samples, if there is one
  bool samples_are_rows = false;
  const Tensor* like;
  LatentProblem problem;

  // `number`: of the seed, where there are several.
  LatentCall(const OptionalTensors& inputs, const std::vector<double>& constants, int64_t forms,
             const std::optional<Tensor>& seed, const std::optional<Tensor>& noise, std::optional<int64_t> num_samples,
             int64_t results, int64_t batch_dims, int64_t reduction, int64_t number = 0)
      : inputs(inputs), noise(noise), num_samples(num_samples) {
    STD_TORCH_CHECK(kZAlone <= results && results <= kScore, "elbo_ext: latent has no results ", results);
    STD_TORCH_CHECK(inputs.size() == inputs_of(results) && constants.size() == inputs.size(),
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
    STD_TORCH_CHECK(Forms::within<kAnyForms>(known) == forms && form_of(known, 1) < kFormsWithFloors &&
                        form_of(known, 3) < kFormsWithFloors,
                    "elbo_ext: latent has no forms ", forms);
    problem.compute_double = any_double(tensors);
    problem.forms = static_cast<int>(forms);
    problem.results = static_cast<int>(results);
    problem.samples = num_samples.value_or(1);
    sample_shape = shape;
    if (num_samples) sample_shape.insert(sample_shape.begin(), *num_samples);
    if (seed) {
      STD_TORCH_CHECK(is_seed(*seed) && seed->is_contiguous() && number < seed->numel(),
                      "elbo_ext: seed is a contiguous int64 tensor of one element for each sample");
      problem.seed = static_cast<const int64_t*>(seed->data_ptr()) + number;
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

  Dims batch(int64_t batch_dims) const { return Dims(shape.begin(), shape.begin() + batch_dims); }
  int64_t examples(int64_t batch_dims) const { return numel_of(batch(batch_dims)); }

  // The space of a forward pass, and z, which the call returns. `row_dims`: of z where samples are rows, else of one sample.
  Tensor add_sample(int64_t row_dims) {
    const Tensor& mu = inputs[0] ? *inputs[0] : *like;
    // The layout of mu carries over to z (channels_last stays channels_last) where they have one shape.
    const auto mu_sizes = mu.sizes();
    const bool like_mu = std::equal(mu_sizes.begin(), mu_sizes.end(), sample_shape.begin(), sample_shape.end());
    const Tensor z = like_mu ? empty_like(mu, z_type()) : empty(sample_shape, z_type(), mu);
    SpaceBuilder builder(samples_are_rows ? sample_shape : shape, row_dims, /*any_order=*/false);
    add_operands(builder);
    problem.z_sample_stride = add_samples(problem.z, z, builder);
    problem.space = builder.build();
    return z;
  }

  // The space of a backward pass, and the gradients of the inputs that need one and, by the last flag, of the noise. Absent
  // gradients of results are 0.
  struct BackwardPass {
    Gradients gradients;
    std::optional<Tensor> noise_gradient;
    std::optional<Tensor> prior_gradient[kLatentInputs];
  };
  BackwardPass add_gradients(const std::vector<bool>& needs, std::optional<Tensor> grad_z,
                             const std::optional<Tensor>& grad_kl, std::optional<Tensor> grad_log_q,
                             std::optional<Tensor> grad_log_p, int64_t batch_dims, int64_t reduction) {
    for (const std::optional<Tensor>* grad : std::initializer_list<const std::optional<Tensor>*>{&grad_z, &grad_kl, &grad_log_q, &grad_log_p})
      if (*grad) check_device("latent_backward", **grad, *like);
    SpaceBuilder builder(shape, 0, /*any_order=*/false);
    BackwardPass pass{Gradients(shape), std::nullopt, {}};
    add_operands(builder);
    for (size_t k = 0; k < inputs.size(); ++k) {
      if (!inputs[k] || !needs[k]) continue;
      pass.gradients.add(*inputs[k], problem.gradient[k], builder);
      if (k >= 2) pass.prior_gradient[k] = pass.gradients.tensors().back();
    }
    if (noise && needs[inputs.size()]) {
      pass.noise_gradient = empty(sample_shape, dtype_of(*noise), *noise);
      problem.noise_gradient_sample_stride = add_samples(problem.noise_gradient, *pass.noise_gradient, builder);
    }
    if (problem.samples == 0)  // of no samples
      for (std::optional<Tensor>* grad : {&grad_z, &grad_log_q, &grad_log_p}) grad->reset();
    if (grad_z) {
      STD_TORCH_CHECK(grad_z->dim() == static_cast<int64_t>(sample_shape.size()), "elbo_ext: grad_z has ",
                      grad_z->dim(), " dimensions, not ", sample_shape.size());
      problem.grad_z_sample_stride = add_samples(problem.grad_z, *grad_z, builder);
    }
    problem.with_kl = grad_kl.has_value();
    if (grad_kl) add_upstream(problem.upstream_kl, *grad_kl, shape, batch_dims, reduction, builder);
    problem.with_log_prob = grad_log_q || grad_log_p;
    if (grad_log_q)
      problem.upstream_q_sample_stride = add_sample_upstream(problem.upstream_q, *grad_log_q, batch_dims, builder);
    if (grad_log_p)
      problem.upstream_p_sample_stride = add_sample_upstream(problem.upstream_p, *grad_log_p, batch_dims, builder);
    problem.space = builder.build();
    return pass;
  }
  bool has_gradient_of_prior() const { return problem.with_kl || problem.with_log_prob; }
  // Nothing to run: there is no element, or no gradient of a result.
  bool is_zero() const {
    return problem.space.elements() == 0 || (!has_gradient_of_prior() && !problem.grad_z.present());
  }
  // Those of the gradients that are 0 and that no kernel writes.
  void fill_zeros(const BackwardPass& pass) const {
    if (pass.noise_gradient && !problem.grad_z.present() && !problem.with_log_prob)
      fill_with_zeros(*pass.noise_gradient);  // it is not of the KL
    if (is_zero()) pass.gradients.zero();
    else if (!has_gradient_of_prior())  // the sample does not depend on the prior
      for (int k : {2, 3})
        if (pass.prior_gradient[k]) fill_with_zeros(*pass.prior_gradient[k]);
  }
};

std::vector<Tensor> latent(OptionalTensors inputs, std::vector<double> constants, int64_t forms,
                           std::optional<Tensor> seed, std::optional<Tensor> noise, std::optional<int64_t> num_samples,
                           int64_t results, int64_t batch_dims, int64_t reduction) {
  LatentCall call(inputs, constants, forms, seed, noise, num_samples, results, batch_dims, reduction);
  LatentProblem& problem = call.problem;
  const bool with_kl = results == kWithKL;
  call.samples_are_rows = results >= kPathwise;
  int64_t row_dims = with_kl && reduction == kNone ? batch_dims : 0;
  if (call.samples_are_rows) {
    row_dims = batch_dims + (num_samples ? 1 : 0);
    problem.samples = 1;
  }
  const Tensor z = call.add_sample(row_dims);
  const bool nothing = problem.space.elements() == 0;
  LatentProblems problems{{&problem}, {}, compute_type(problem.compute_double)};
  std::vector<Tensor> tensors{z};
  if (with_kl) {
    tensors.push_back(empty_values(call.shape, batch_dims, reduction, problem.compute_double, *call.like));
    set_values(reduction == kNone ? problem.kl : problems.kl, tensors.back(), reduction, call.examples(batch_dims));
    if (nothing && reduction == kNone) problem.kl.row = nullptr;
  }
  if (call.samples_are_rows) {
    for (Values* values : {&problem.log_q, &problem.log_p}) {
      tensors.push_back(empty_values(call.sample_shape, row_dims, kNone, problem.compute_double, *call.like));
      if (!nothing) set_values(*values, tensors.back(), kNone, 1);
    }
  }
  if (nothing && problems.kl.total == nullptr)  // sums of nothing
    for (size_t k = 1; k < tensors.size(); ++k) fill_with_zeros(tensors[k]);
  if (problem.elements() > 0 || problem.kl.row != nullptr || problems.kl.total != nullptr)
    device_of(z).latent({"latent", call.sample_shape, z}, problems);
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
  LatentCall::BackwardPass pass =
      call.add_gradients(needs, grad_z, grad_kl, grad_log_q, grad_log_p, batch_dims, reduction);
  call.fill_zeros(pass);
  if (!call.is_zero())
    device_of(*call.like).latent_backward({"latent_backward", call.sample_shape, *call.like}, {&call.problem});
  std::vector<Tensor> tensors = pass.gradients.take();
  if (pass.noise_gradient) tensors.push_back(*pass.noise_gradient);
  return tensors;
}

// Several calls that are run together. The noise of each is from a seed of its own.
class LatentCalls {
 public:
  LatentCalls(const OptionalTensors& inputs, const std::vector<double>& constants, int64_t forms, const Tensor& seeds,
              std::optional<int64_t> num_samples, int64_t results, int64_t batch_dims, int64_t reduction)
      : seed_(seeds), num_samples_(num_samples) {
    STD_TORCH_CHECK(results == kZAlone || results == kWithKL, "elbo_ext: latent_list has no results ", results);
    const size_t width = inputs_of(results);
    STD_TORCH_CHECK(!inputs.empty() && inputs.size() % width == 0 && constants.size() == inputs.size() &&
                        static_cast<int64_t>(inputs.size() / width) == seeds.numel(),
                    "elbo_ext: latent_list takes ", width, " inputs and a seed for each sample");
    for (size_t first = 0; first < inputs.size(); first += width) {
      const OptionalTensors& own = inputs_.emplace_back(inputs.begin() + first, inputs.begin() + first + width);
      calls_.emplace_back(own, std::vector<double>(constants.begin() + first, constants.begin() + first + width), forms,
                          seed_, no_noise_, num_samples_, results, batch_dims, reduction,
                          static_cast<int64_t>(calls_.size()));
      check_device("latent_list", *calls_.back().like, *calls_.front().like);
      STD_TORCH_CHECK(calls_.back().batch(batch_dims) == calls_.front().batch(batch_dims) &&
                          calls_.back().problem.compute_double == calls_.front().problem.compute_double,
                      "elbo_ext: latent_list takes tensors of one batch shape and precision");
    }
  }
  std::deque<LatentCall>& all() { return calls_; }
  LatentCall& first() { return calls_.front(); }
  int64_t count() const { return static_cast<int64_t>(calls_.size()); }

 private:
  const std::optional<Tensor> seed_, no_noise_;
  std::optional<int64_t> num_samples_;
  std::deque<OptionalTensors> inputs_;  // whose elements stay where they are
  std::deque<LatentCall> calls_;
};

std::vector<Tensor> latent_list(OptionalTensors inputs, std::vector<double> constants, int64_t forms, Tensor seeds,
                                std::optional<int64_t> num_samples, int64_t results, int64_t batch_dims,
                                int64_t reduction) {
  LatentCalls calls(inputs, constants, forms, seeds, num_samples, results, batch_dims, reduction);
  const LatentCall& first = calls.first();
  const bool compute_double = first.problem.compute_double, with_kl = results == kWithKL;
  std::optional<Tensor> row_kl;  // of each tensor, one below the other
  if (with_kl && reduction == kNone) {
    Dims shape = first.batch(batch_dims);
    shape.insert(shape.begin(), calls.count());
    row_kl = empty(shape, compute_type(compute_double), *first.like);
    fill_with_zeros(*row_kl);
  }
  const int64_t row_bytes = first.examples(batch_dims) * bytes_of(compute_type(compute_double));

  LatentProblems problems{{}, {}, compute_type(compute_double)};
  std::vector<Tensor> tensors;
  for (LatentCall& call : calls.all()) {
    LatentProblem& problem = call.problem;
    if (row_kl) problem.kl.row = static_cast<char*>(row_kl->data_ptr()) + static_cast<int64_t>(tensors.size()) * row_bytes;
    tensors.push_back(call.add_sample(row_kl ? batch_dims : 0));
    if (problem.elements() > 0 || (with_kl && problem.space.elements() > 0)) problems.each.push_back(&problem);
  }
  std::optional<Tensor> sums = row_kl;
  if (with_kl && !row_kl) {
    sums = empty({calls.count()}, compute_type(compute_double), *first.like);
    set_values(problems.kl, *sums, reduction, first.examples(batch_dims));
    if (problems.each.empty()) problems.each.push_back(&calls.first().problem);  // the sum of nothing, or no mean
  }
  int count = 0;
  if (!problems.each.empty())
    count = device_of(*first.like).latent({"latent_list", first.sample_shape, *first.like}, problems);
  if (sums) {
    if (!row_kl) sums = torch::stable::narrow(*sums, 0, 0, count);
    const int64_t of_list = 0;
    tensors.push_back(torch::stable::sum(*sums, torch::headeronly::IntHeaderOnlyArrayRef(&of_list, 1)));
  }
  return tensors;
}

std::vector<Tensor> latent_list_backward(OptionalTensors inputs, std::vector<double> constants, int64_t forms, Tensor seeds,
                                         std::optional<int64_t> num_samples, int64_t results, int64_t batch_dims,
                                         int64_t reduction, OptionalTensors grad_z, std::optional<Tensor> grad_kl,
                                         std::vector<bool> needs) {
  LatentCalls calls(inputs, constants, forms, seeds, num_samples, results, batch_dims, reduction);
  STD_TORCH_CHECK(needs.size() == inputs.size() && static_cast<int64_t>(grad_z.size()) == calls.count() &&
                      (results == kWithKL || !grad_kl),
                  "elbo_ext: latent_list_backward takes a gradient of each result and a flag for each input");
  std::vector<Tensor> tensors;
  std::vector<LatentProblem*> problems;
  const size_t width = inputs_of(results);
  size_t number = 0;
  for (LatentCall& call : calls.all()) {
    const std::vector<bool> own(needs.begin() + number * width, needs.begin() + (number + 1) * width);
    LatentCall::BackwardPass pass =
        call.add_gradients(own, grad_z[number++], grad_kl, std::nullopt, std::nullopt, batch_dims, reduction);
    call.fill_zeros(pass);
    std::vector<Tensor> gradients = pass.gradients.take();
    if (!gradients.empty() && !call.is_zero()) problems.push_back(&call.problem);
    tensors.insert(tensors.end(), gradients.begin(), gradients.end());
  }
  const LatentCall& first = calls.first();
  if (!problems.empty())
    device_of(*first.like).latent_backward({"latent_list_backward", first.sample_shape, *first.like}, problems);
  return tensors;
}

void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("latent", TORCH_BOX(&latent));
  library.impl("latent_backward", TORCH_BOX(&latent_backward));
  library.impl("latent_list", TORCH_BOX(&latent_list));
  library.impl("latent_list_backward", TORCH_BOX(&latent_list_backward));
}

}  // namespace
}  // namespace elbo_ext

STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CPU, library) { elbo_ext::register_ops(library); }
STABLE_TORCH_LIBRARY_IMPL(elbo_ext, CUDA, library) { elbo_ext::register_ops(library); }
