// Reparameterized sampling, z = mu + sigma * eps, alone or together with the KL to the prior, and its backward pass.
// The noise is made in registers from (seed, element number), here and again in the backward pass; it is never stored.
#include "kernels.h"
#include "latent_tile.h"

namespace elbo_ext {
namespace {

template <class R>
void run_forward(const LatentProblem& p, int64_t begin, int64_t end) {
  Buffer<R> buffer[kLatentInputs], sigma, z_buffer;
  Noise<R> noise;
  Sums<R> sums(p.space, p.kl.row, p.block_sum);
  const bool with_kl = p.results == kWithKL;
  TermTile<R> t;
  const ScaleForm<R> form(forms_of(p, t), kScale);

  for (int64_t group = begin; group < end; ++group) {  // a group is one block here
    for_each_tile(p.space, p.blocks, group, TileLimits{}, [&](const Tile& tile) {
      t.size = tile.size();
      const int inputs = with_kl ? kLatentInputs : 2;
      for (int k = 0; k < inputs; ++k) t.operand[k] = load(p.space, p.input[k], tile, buffer[k]);
      if (with_kl) {
        t.value = sums.values_of_short_rows();
        run_term<GaussianKL, R, false>(t, p.forms);
        sums.add(tile, t.sum);
      }
      for_each_register<R>(t.size, [&](int64_t i, int64_t count) {
        put(sigma.data + i, standard_deviation(form, get(t.operand[kScale], i, count)), count);
      });
      for (int64_t sample = 0; sample < p.samples; ++sample) {
        const Lane<R> eps = noise.load(p, tile, sample);
        View z = p.z;
        z.data = Noise<R>::advance(z, sample * p.z_sample_stride);
        R* out = begin_store(p.space, z, tile, z_buffer);
        for_each_register<R>(t.size, [&](int64_t i, int64_t count) {
          const Vec<R> s = Vec<R>::loadu(sigma.data + i);
          put(out + i, at::vec::fmadd(s, get(eps, i, count), get(t.operand[kMu], i, count)), count);
        });
        finish_store(p.space, z, tile, out, z_buffer);
      }
    });
    sums.end_block(group);
  }
}

template <class R>
void run_backward(const LatentProblem& p, int64_t begin, int64_t end) {
  using V = Vec<R>;
  Buffer<R> buffer[kLatentInputs], upstream_buffer, grad_z_buffer, noise_gradient_buffer;
  Buffer<R> grad, grad_eps;  // gz and gz * eps of one sample; in the end, of all
  SampleSum<R> grad_sum, grad_eps_sum;
  Noise<R> noise;
  TermTile<R> t;
  const bool samples = p.grad_z.present();
  const bool scale_needed = p.gradient[kScale].wanted();
  const ScaleForm<R> form(forms_of(p, t), kScale);

  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * p.blocks.per_group;
    for (int64_t block = first; block < std::min(first + p.blocks.per_group, p.blocks.count); ++block) {
      for_each_tile(p.space, p.blocks, block, TileLimits{}, [&](const Tile& tile) {
        t.size = tile.size();
        const int inputs = p.with_kl ? kLatentInputs : 2;
        for (int k = 0; k < inputs; ++k) t.operand[k] = load(p.space, p.input[k], tile, buffer[k]);
        for (int k = 0; k < inputs; ++k) t.gradient[k].begin(p.space, p.gradient[k], tile);
        if (p.with_kl) {
          t.upstream = load(p.space, p.upstream_kl, tile, upstream_buffer);
          run_term<GaussianKL, R, true>(t, p.forms);
        }
        if (samples) {
          for (int64_t sample = 0; sample < p.samples; ++sample) {
            Operand grad_z = p.grad_z;
            grad_z.data = Noise<R>::advance(grad_z, sample * p.grad_z_sample_stride);
            const Lane<R> gz = load(p.space, grad_z, tile, grad_z_buffer);
            const Lane<R> eps = scale_needed ? noise.load(p, tile, sample) : gz;
            for_each_register<R>(t.size, [&](int64_t i, int64_t count) {
              const V g = get(gz, i, count);
              g.store(grad.data + i);
              (g * get(eps, i, count)).store(grad_eps.data + i);
            });
            if (p.samples > 1) {
              grad_sum.add(grad, t.size, sample == 0);
              grad_eps_sum.add(grad_eps, t.size, sample == 0);
            }
            if (p.noise_gradient.data != nullptr) {
              View view = p.noise_gradient;
              view.data = Noise<R>::advance(view, sample * p.noise_gradient_sample_stride);
              R* out = begin_store(p.space, view, tile, noise_gradient_buffer);
              for_each_register<R>(t.size, [&](int64_t i, int64_t count) {  // dz/deps = sigma
                put(out + i, get(gz, i, count) * standard_deviation(form, get(t.operand[kScale], i, count)), count);
              });
              finish_store(p.space, view, tile, out, noise_gradient_buffer);
            }
          }
          if (p.samples > 1) {
            grad_sum.finish(grad, t.size);
            grad_eps_sum.finish(grad_eps, t.size);
          }
          deliver(t.gradient[kMu], t.size, p.with_kl, [&](int64_t i, int64_t) {  // dz/dmu = 1
            return V::loadu(grad.data + i);
          });
          deliver(t.gradient[kScale], t.size, p.with_kl, [&](int64_t i, int64_t count) {  // dz/dscale = eps dsigma/dscale
            return V::loadu(grad_eps.data + i) * sigma_and_slope(form, get(t.operand[kScale], i, count)).slope;
          });
        }
        for (int k = 0; k < inputs; ++k) t.gradient[k].finish(p.space, p.gradient[k], tile, group);
      });
    }
  }
}

}  // namespace

namespace CPU_CAPABILITY {

void latent(const LatentProblem& p, int64_t begin, int64_t end) {
  p.compute_double ? run_forward<double>(p, begin, end) : run_forward<float>(p, begin, end);
}

void latent_backward(const LatentProblem& p, int64_t begin, int64_t end) {
  p.compute_double ? run_backward<double>(p, begin, end) : run_backward<float>(p, begin, end);
}

}  // namespace CPU_CAPABILITY
}  // namespace elbo_ext
