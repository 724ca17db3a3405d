// A sample with log q and log p, and its backward pass. The formulas: terms/sample.h.
#include "kernels.h"
#include "latent_tile.h"

namespace elbo_ext {
namespace {

template <class R>
bool prior_varies(const TermTile<R>& t) {
  return t.operand[kPriorScale].step != 0;
}

// Each sample is a row, or several.
template <class R>
void run_forward(const LatentProblem& p, int64_t begin, int64_t end) {
  using V = Vec<R>;
  const V zero(R(0));
  Buffer<R> buffer[kLatentInputs], z_buffer;
  Noise<R> noise;
  Sums<R> sums_q(p.space, p.log_q.row, p.block_sum_q), sums_p(p.space, p.log_p.row, p.block_sum_p);
  TermTile<R> t;
  const Forms forms = forms_of(p, t);
  const ScaleForm<R> form(forms, kScale), prior_form(forms, kPriorScale);

  for (int64_t group = begin; group < end; ++group) {  // a group is one block here
    for_each_tile(p.space, p.blocks, group, TileLimits{}, [&](const Tile& tile) {
      t.size = tile.size();
      for (int k = 0; k < kLatentInputs; ++k) t.operand[k] = load(p.space, p.input[k], tile, buffer[k]);
      const Lane<R> eps = noise.load(p, tile, 0);
      R* const out = begin_store(p.space, p.z, tile, z_buffer);
      R *const values_q = sums_q.values_of_short_rows(), *const values_p = sums_p.values_of_short_rows();
      const bool varies = prior_varies(t);
      Scale<V> prior = make_scale(prior_form, V(t.operand[kPriorScale].data[0]));
      V sum_q = zero, sum_p = zero;
      for_each_register<R>(t.size, [&](int64_t i, int64_t count) {
        const V scale = get(t.operand[kScale], i, count), noise_i = get(eps, i, count);
        const V z = at::vec::fmadd(standard_deviation(form, scale), noise_i, get(t.operand[kMu], i, count));
        if (varies) prior = make_scale(prior_form, get(t.operand[kPriorScale], i, count));
        const V in[] = {z, get(t.operand[kPriorMu], i, count)};
        const V log_q = log_prob_of_sample(form, scale, noise_i), log_p = Gaussian<V>::value(prior, in);
        put(out + i, z, count);
        if (values_q) put(values_q + i, log_q, count);
        if (values_p) put(values_p + i, log_p, count);
        sum_q = sum_q + V::set(zero, log_q, count);
        sum_p = sum_p + V::set(zero, log_p, count);
      });
      finish_store(p.space, p.z, tile, out, z_buffer);
      sums_q.add(tile, sum_lanes(sum_q));
      sums_p.add(tile, sum_lanes(sum_p));
    });
    sums_q.end_block(group);
    sums_p.end_block(group);
  }
}

// One of the tensors with a slice for each sample; absent: 0.
template <class R>
Lane<R> load_sample(const Space& space, Operand operand, int64_t offset, const Tile& tile, Buffer<R>& buffer) {
  if (operand.present()) operand.data = Noise<R>::advance(operand, offset);
  return load(space, operand, tile, buffer);
}

// Calls body(first_forms, results) with what does not change from register to register as constants: whether both scales are
// in their first form, logvar, and the results. This spares the loop the branches for all else (benchmarks/NOTES.md).
template <class Body>
void with_constants(const LatentProblem& p, Body&& body) {
  const auto with_results = [&](auto first_forms) {
    switch (p.results) {
      case kPathwise: return body(first_forms, std::integral_constant<int, kPathwise>{});
      case kStickingTheLanding: return body(first_forms, std::integral_constant<int, kStickingTheLanding>{});
      default: return body(first_forms, std::integral_constant<int, kScore>{});
    }
  };
  if (p.forms == 0) return with_results(std::true_type{});
  with_results(std::false_type{});
}

template <class R>
void run_backward(const LatentProblem& p, int64_t begin, int64_t end) {
  using V = Vec<R>;
  Buffer<R> buffer[kLatentInputs], z_buffer, q_buffer, p_buffer, noise_gradient_buffer;
  Buffer<R> sum[kLatentInputs];  // the gradients of one sample; in the end, of all
  SampleSum<R> total[kLatentInputs];
  Noise<R> noise;
  TermTile<R> t;
  const Forms forms_as_given = forms_of(p, t);

  const auto add_sample = [&](const Tile& tile, int64_t sample, R* const(&to)[kLatentInputs]) {
    const Lane<R> eps = noise.load(p, tile, sample);
    const Lane<R> grad_z = load_sample(p.space, p.grad_z, sample * p.grad_z_sample_stride, tile, z_buffer);
    const Lane<R> grad_q = load_sample(p.space, p.upstream_q, sample * p.upstream_q_sample_stride, tile, q_buffer);
    const Lane<R> grad_p = load_sample(p.space, p.upstream_p, sample * p.upstream_p_sample_stride, tile, p_buffer);
    View view = p.noise_gradient;
    R* out = nullptr;
    if (view.data != nullptr) {
      view.data = Noise<R>::advance(view, sample * p.noise_gradient_sample_stride);
      out = begin_store(p.space, view, tile, noise_gradient_buffer);
    }
    const bool varies = prior_varies(t);
    with_constants(p, [&](auto first_forms, auto results) {
      const Forms forms = first_forms ? Forms{0} : forms_as_given;
      const ScaleForm<R> form(forms, kScale), prior_form(forms, kPriorScale);
      Scale<V> prior = make_scale(prior_form, V(t.operand[kPriorScale].data[0]));
      for_each_register<R>(t.size, [&](int64_t i, int64_t count) {
        const SampleScale<V> q = make_sample_scale(form, get(t.operand[kScale], i, count));
        if (varies) prior = make_scale(prior_form, get(t.operand[kPriorScale], i, count));
        const SampleGradient<V> d(results, q, prior, get(t.operand[kMu], i, count), get(t.operand[kPriorMu], i, count),
                                  get(eps, i, count), get(grad_z, i, count), get(grad_q, i, count), get(grad_p, i, count));
        const V gradient[kLatentInputs] = {d.mu, d.scale, d.prior_mu, d.prior_scale};
        for (int k = 0; k < kLatentInputs; ++k)
          if (to[k]) put(to[k] + i, gradient[k], count);
        if (out) put(out + i, d.eps, count);
      });
    });
    if (out) finish_store(p.space, view, tile, out, noise_gradient_buffer);
    for (int k = 0; k < kLatentInputs && p.samples > 1; ++k)
      if (to[k]) total[k].add(sum[k], t.size, sample == 0);
  };

  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * p.blocks.per_group;
    for (int64_t block = first; block < std::min(first + p.blocks.per_group, p.blocks.count); ++block) {
      for_each_tile(p.space, p.blocks, block, TileLimits{}, [&](const Tile& tile) {
        t.size = tile.size();
        for (int k = 0; k < kLatentInputs; ++k) t.operand[k] = load(p.space, p.input[k], tile, buffer[k]);
        R* to[kLatentInputs];  // one sample goes where the gradient is wanted, several are added up in a buffer
        for (int k = 0; k < kLatentInputs; ++k) {
          t.gradient[k].begin(p.space, p.gradient[k], tile);
          R* const numbers = t.gradient[k].numbers;
          to[k] = !p.gradient[k].wanted() ? nullptr : p.samples == 1 && numbers ? numbers
                                                                                : sum[k].data;
        }
        for (int64_t sample = 0; sample < p.samples; ++sample) add_sample(tile, sample, to);
        for (int k = 0; k < kLatentInputs; ++k) {
          if (to[k] && p.samples > 1) total[k].finish(sum[k], t.size);
          if (to[k] == sum[k].data)
            deliver(t.gradient[k], t.size, false, [&](int64_t i, int64_t) { return V::loadu(sum[k].data + i); });
          t.gradient[k].finish(p.space, p.gradient[k], tile, group);
        }
      });
    }
  }
}

}  // namespace

namespace CPU_CAPABILITY {

void sample_log_prob(const LatentProblem& p, int64_t begin, int64_t end) {
  p.compute_double ? run_forward<double>(p, begin, end) : run_forward<float>(p, begin, end);
}

void sample_log_prob_backward(const LatentProblem& p, int64_t begin, int64_t end) {
  p.compute_double ? run_backward<double>(p, begin, end) : run_backward<float>(p, begin, end);
}

}  // namespace CPU_CAPABILITY
}  // namespace elbo_ext
